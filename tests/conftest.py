"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
import signal
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

from tests import forkserver

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray reads it when it is imported, which some unit test may do before a cluster is started.
os.environ.setdefault("RAY_AUTH_MODE", "token")
# Ray's workers run at 15 by default: a second process of tests would take all cores from them.
os.environ.setdefault("RAY_worker_niceness", "0")
# A shell ignores SIGINT in what it starts in the background, and so would commands of tests.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_PROCESSES = 2
# Files that start Ray here go to one process: two clusters at a time would need the memory and the
# cores of four to ten ranks.
_RAY = {
    *("tests/e2e/test_elastic.py", "tests/e2e/test_jobs.py", "tests/e2e/test_ray.py"),
    *("tests/e2e/test_tune.py", "tests/faults/test_nodes.py"),
}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two processes for folders; none for single files, slow tests and tests of the one GPU."""
    is_default = config.option.markexpr == "not slow and not gpu"
    return _PROCESSES if is_default and any(Path(arg).is_dir() for arg in config.args) else 0


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadFileScheduling:
    """Give a process whole files, whose tests share fixtures."""
    return _FileScheduling(config, log)


class _FileScheduling(LoadFileScheduling):
    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return "ray" if file in _RAY else file


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Keep torch to one thread, so that tests side by side with ranks do not fight for cores."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _server_of_processes() -> None:
    """Before any code of the project starts it with fewer imports."""
    forkserver.start()


@pytest.fixture(scope="session")
def real_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with omniglot_small/ and tiny_imagenet_50/, unpacked from DML_DIST_TEST_DATA."""
    source = os.environ.get("DML_DIST_TEST_DATA")
    if not source:
        pytest.skip("DML_DIST_TEST_DATA does not name the folder with the real images")
    folder = tmp_path_factory.mktemp("real-images")
    for name in ("omniglot_small", "tiny_imagenet_50"):
        with tarfile.open(Path(source) / f"{name}.tar") as archive:
            archive.extractall(folder / name, filter="data")
    return folder
