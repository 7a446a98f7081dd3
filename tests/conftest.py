"""Fixtures and settings shared by all tests."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
import torch

from tests import forkserver

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Ray reads it when it is imported, which some unit test may do before a cluster is started.
os.environ.setdefault("RAY_AUTH_MODE", "token")


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
