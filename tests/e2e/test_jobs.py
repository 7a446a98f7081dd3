"""Jobs through a real Ray head with a token: submit, follow, list, stop, resume, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import yaml

from tests.faults.runs import ENVIRONMENT, descendants, running, wait_for, weights

Cli = Callable[..., tuple[int, str]]
_SECONDS_TO_START = 60.0
_TRIES = 3
_SHIPPED = """
from tests.faults.act import Act

class Shipped(Act):
    '''A transform that is nowhere but in the folder that is uploaded.'''
"""


class Head:
    """`ray start --head` in a process of its own, with two CPUs, a token and ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.token = folder / "token"
        self.token.write_text(os.urandom(16).hex())
        self._folder = folder
        with ExitStack() as held:  # Below Ray's ports for workers' traffic, above those of workers.
            servers = [held.enter_context(_listening()) for _ in range(4)]
            self._ports = [server.getsockname()[1] for server in servers]
        self.url = f"http://127.0.0.1:{self._ports[1]}"

    def start(self) -> None:
        """Start Ray and wait until its dashboard answers; `ray start` gives up after 30 s."""
        for _ in range(_TRIES):
            self._start()
            with suppress(AssertionError):
                wait_for(self._answers, seconds=_SECONDS_TO_START, what="the head's dashboard")
                return
            self.stop()
        raise AssertionError((self._folder / "output").read_text())

    def _start(self) -> None:
        gcs, dashboard, agent, client = self._ports
        options = {
            "port": gcs,
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "ray-client-server-port": client,
            "num-cpus": 2,
            "object-store-memory": 100 * 2**20,
            "temp-dir": self._folder / "ray",
            "include-dashboard": "true",
        }
        environment = {
            **ENVIRONMENT,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            "RAY_prestart_worker_first_driver": "0",
        }
        environment.pop("RAY_AUTH_TOKEN", None)
        ray = Path(sys.executable).with_name("ray")
        with (self._folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                [ray, "start", "--head", "--block", *(f"--{k}={v}" for k, v in options.items())],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def _answers(self) -> bool:
        assert self._process.poll() is None
        with suppress(OSError), socket.create_connection(("127.0.0.1", self._ports[1]), 1):
            return True
        return False

    def stop(self) -> None:
        """End Ray's processes, and no other ones."""
        own = descendants(self._process.pid)
        self._process.kill()
        self._process.wait()
        for pid in filter(running, own):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _listening() -> socket.socket:
    for port in range(20_000 + os.getpid() % 10_000, 32_000):
        server = socket.socket()
        with suppress(OSError):
            server.bind(("127.0.0.1", port))
            return server
        server.close()
    raise AssertionError("no free port")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="head", dir="/tmp"))  # Paths of sockets must be short.
    head = Head(folder)
    head.start()
    yield head
    head.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def to(
    head: Head, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, ...]:
    """Options that name the head, in a folder with code that the configuration needs."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(head.token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "shipped", raising=False)
    (tmp_path / "shipped.py").write_text(_SHIPPED)
    config = yaml.safe_load(config_file.read_text())
    config["data"]["transform"] = {"name": "custom", "target": "shipped:Shipped"}
    config["evaluation"]["final"] = "none"
    config_file.write_text(yaml.safe_dump(config))
    settings = {"target": "ray", "address": head.url, "python": sys.executable}
    (tmp_path / "head.yaml").write_text(yaml.safe_dump(settings))
    return "--to", "head.yaml"


@pytest.mark.timeout(300)
def test_a_training_is_submitted_and_followed(
    to: tuple[str, ...], cli: Cli, tmp_path: Path
) -> None:
    code, output = cli("submit", *to, "--", "train", "small.yaml")
    assert code == 0, output
    assert "submitted small-1 to ray" in output
    assert "step 12: validation R@1" in output
    assert output.count("step 4: validation R@1") == 1
    assert output.strip().splitlines()[-1] == "small-1 succeeded"
    # The folder of the run is the one below the folder of the command, not of the package.
    status = json.loads((tmp_path / "runs/small/run.json").read_text())["status"]
    assert status["state"] == "finished"
    code, output = cli("job", "list")
    assert (code, "small-1" in output, "succeeded" in output) == (0, True, True)
    code, output = cli("job", "status", "small-1")
    assert (code, "exit code:  0" in output) == (0, True)
    code, output = cli("job", "logs", "small-1")
    assert "step 12: validation R@1" in output


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_job_saves_a_checkpoint_and_is_resumed(
    to: tuple[str, ...], cli: Cli, tmp_path: Path
) -> None:
    slow = ("--set", "data.transform.options.pause=0.05")
    code, output = cli("submit", *to, "--detach", "--", "train", "small.yaml", *slow)
    assert code == 0, output
    records = tmp_path / "runs/small/records/evaluations.jsonl"
    wait_for(lambda: records.is_file() and records.read_text(), seconds=120, what="step 4")
    code, output = cli("job", "stop", "small-1")
    assert (code, "a training saves a checkpoint first" in output) == (0, True)
    code, output = cli("job", "logs", "small-1", "--follow")
    assert (code, output.strip().splitlines()[-1]) == (1, "small-1 stopped")
    assert "with a checkpoint (SIGTERM)" in output

    code, output = cli("submit", *to, "--", "train", "small.yaml", "--resume")
    assert code == 2, output  # A difference that this machine sees is not sent.
    assert "submitted" not in output
    code, output = cli("submit", *to, "--", "train", "small.yaml", *slow, "--resume")
    assert code == 0, output
    assert "continuing at step" in output
    assert output.strip().splitlines()[-1] == "small-2 succeeded"
    whole = ("--run-dir", tmp_path / "whole")
    code, output = cli("submit", *to, "--", "train", "small.yaml", *slow, *whole)
    assert code == 0, output
    one, two = (weights(tmp_path / name) for name in ("runs/small", "whole"))
    assert all((one[name] == two[name]).all() for name in two)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_that_fails_returns_its_code_and_shows_its_log(
    to: tuple[str, ...], cli: Cli, tmp_path: Path
) -> None:
    # Data that this machine has not: the job finds out.
    lost = ("--set", "data.path=/nowhere/glyphs")
    code, output = cli("submit", *to, "--", "train", "small.yaml", *lost)
    assert code == 2, output
    assert "the plan could not be checked here: data.path /nowhere/glyphs has no index" in output
    assert output.strip().splitlines()[-1] == "small-1 failed"
    code, output = cli("job", "status", "small-1")
    assert "exit code:  2" in output
    assert "end of the log:" in output
    assert output.count("error: ") == 1
    # A command that does not even start.
    code, output = cli("submit", *to, "--set", "python=/no/python", "--", "train", "small.yaml")
    assert (code, "/no/python: not found" in output) == (127, True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_wrong_token_and_a_cluster_too_small_send_nothing(
    to: tuple[str, ...], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = cli("submit", *to, "--", "train", "small.yaml", "--workers", 3)
    assert (code, "do not fit the cluster" in output) == (2, True)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    code, output = cli("submit", *to, "--", "train", "small.yaml")
    assert (code, "refuses the token from RAY_AUTH_TOKEN" in output) == (2, True)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    code, output = cli("submit", *to, "--", "train", "small.yaml")
    assert (code, "needs a token, and none was found" in output) == (2, True)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_queued_job_is_called_queued_also_when_it_is_stopped(
    to: tuple[str, ...], cli: Cli, tmp_path: Path
) -> None:
    slow = ("--set", "data.transform.options.pause=0.05")
    driver = ("--set", "driver_cpus=1")
    cli("submit", *to, *driver, "--detach", "--", "train", "small.yaml", *slow)
    wait_for((tmp_path / "runs/small/checkpoints").is_dir, seconds=60, what="the first job")
    time.sleep(10)  # Its rank has its CPU.
    other = tmp_path / "other"
    cli("submit", *to, *driver, "--detach", "--", "train", "small.yaml", "--run-dir", other)
    code, output = cli("job", "status", "small-2")
    assert (code, "state:      queued" in output) == (0, True)
    code, output = cli("job", "stop", "small-2")
    assert (code, "still queued" in output) == (0, True)
    cli("job", "stop", "small-1")
    code, output = cli("job", "logs", "small-1", "--follow")
    assert (code, output.strip().splitlines()[-1]) == (1, "small-1 stopped")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ctrl_c_leaves_the_job(to: tuple[str, ...], cli: Cli, tmp_path: Path) -> None:
    said = tmp_path / "output"
    with said.open("wb") as output, ExitStack() as held:
        process = subprocess.Popen(
            [sys.executable, "-m", "dml_dist", "submit", *to, "--", "train", "small.yaml"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": ENVIRONMENT["PYTHONPATH"]},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        held.callback(process.kill)
        wait_for(lambda: "starting 1 ranks" in said.read_text(), seconds=120, what="the log")
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 1
    lines = said.read_text().strip().splitlines()[-3:]
    assert lines == [
        "small-1 goes on in the cluster",
        "follow: dml-dist job logs small-1 --follow",
        "stop:   dml-dist job stop small-1",
    ]
    code, text = cli("job", "logs", "small-1", "--follow")
    assert (code, text.strip().splitlines()[-1]) == (0, "small-1 succeeded")
