"""Faults under a real Ray cluster: killed drivers and ranks, stopped ranks, used-up restarts."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dml_dist.orchestration import ray_train
from dml_dist.runs.records import read_records
from dml_dist.train.checkpoint_files import checkpoint_folders, is_whole
from tests.faults.forked import command, forked
from tests.faults.runs import (
    ENVIRONMENT,
    act,
    assert_nothing_left,
    assert_same_end,
    attempts,
    command_of,
    descendants,
    running,
    samples,
    started,
    wait_for,
    weights,
)

Cli = Callable[..., tuple[int, str]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ON_RAY = ("--launcher", "ray", "--workers", 2)
# No command below may take longer, on a machine with other work: a hang is a failure.
PATIENCE = 300.0


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a cluster that this process starts find the tests."""
    monkeypatch.syspath_prepend(ENVIRONMENT["PYTHONPATH"])


def ended(process: subprocess.Popen[str], cwd: Path, name: str = "output") -> tuple[int, str]:
    """Wait for a command and return its exit code and output."""
    code = process.wait(PATIENCE)
    return code, (cwd / name).read_text()


def continued(
    config: Path, folder: Path, *arguments: str, run: str = "run", world_size: int = 2
) -> None:
    """Continue a run without Ray, which takes a tenth of the time and gives the same."""
    words = ("train", str(config), "--resume", "--run-dir", run, *arguments)
    done = forked(command, *words, folder=folder, world_size=world_size)
    assert not any(done.codes), done.output


def test_killed_driver(config_file: Path, cli: Cli, whole_on_two: Path, tmp_path: Path) -> None:
    """Ranks end with a driver that is killed; the run continues on as many ranks and on more."""
    mark, pid = tmp_path / "mark", tmp_path / "pid"
    config = act(config_file, mark=mark, action="kill other", path=pid, after=70, pause=0.05)
    children: set[int] = set()
    with started("train", config, *ON_RAY, "--run-dir", "run", cwd=tmp_path) as driver:
        pid.write_text(str(driver.pid))
        while driver.poll() is None:
            children |= descendants(driver.pid)
            time.sleep(0.2)
        code, output = ended(driver, tmp_path)
    assert code == -signal.SIGKILL, output
    assert mark.exists()
    killed_at = mark.stat().st_mtime
    assert len(children) >= 4
    # At once: the ranks that the driver left behind may still be about to end.
    code, output = cli("train", config, *ON_RAY, "--resume", "--run-dir", "run")
    assert code == 0, output
    # The ranks may have come to the next checkpoint before they ended.
    assert re.search("continuing at step (4|8) of 12", output), output
    assert [attempt["attempt"] for attempt in attempts(tmp_path / "run")] == [1, 2]
    assert_same_end(tmp_path / "run", whole_on_two)
    # The killed attempt wrote nothing more once the next one had begun.
    written = (tmp_path / "run/records/steps.jsonl").read_text().splitlines()
    numbers = [json.loads(line)["attempt"] for line in written]
    assert numbers == sorted(numbers)
    first = next(json.loads(line) for line in written if json.loads(line)["attempt"] == 2)
    print(f"\ndriver killed: training again after {first['time'] - killed_at:.1f} s")
    wait_for(lambda: not any(map(running, children)), seconds=60, what="the end of all processes")


def test_resume_on_another_number_of_workers(
    config_file: Path, cli: Cli, whole_on_two: Path, tmp_path: Path
) -> None:
    code, output = cli("train", config_file, *ON_RAY, "--run-dir", "run", "--set", "train.steps=8")
    assert code == 0, output
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    code, output = cli(
        *("train", config_file, "--launcher", "ray", "--workers", 3, "--resume"),
        *("--run-dir", "run"),
    )
    assert code == 0, output
    assert "continuing at step 8 of 12" in output
    found = attempts(tmp_path / "run")
    assert [attempt["world_size"] for attempt in found] == [2, 3]
    assert "launch.num_workers: 2 -> 3" in found[1]["changes"]
    continued(config_file, tmp_path, run="copy", world_size=3)
    assert_same_end(tmp_path / "run", tmp_path / "copy")
    # The same images as on two ranks; sums in another order alone make a difference.
    one, two = samples(tmp_path / "run"), samples(whole_on_two)
    assert [row[:2] for row in one] == [row[:2] for row in two]
    assert all(abs(a[2] - b[2]) < 1e-4 for a, b in zip(one, two, strict=True))


def test_restarts_used_up(config_file: Path, cli: Cli, whole_on_two: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    config = act(config_file, mark=mark, action="kill", after=70, again=True)
    sets = ("--set", "launch.max_failures=1", "--set", "checkpoint.every_steps=2")
    code, output = cli("train", config, *ON_RAY, "--run-dir", "run", *sets)
    # Attempt 1 dies after 70 images of rank 1, attempt 2 after 70 more.
    assert code == 1, output
    assert "the ranks failed 2 times (launch.max_failures: 1 restarts)" in output
    assert " is kept: fix the cause and continue with --resume" in output
    assert "Traceback" not in output
    assert len(attempts(tmp_path / "run")) == 2
    folders = checkpoint_folders(tmp_path / "run/checkpoints")
    assert folders
    assert all(is_whole(folder) for folder in folders)
    continued(config, tmp_path, *sets)
    one, two = weights(tmp_path / "run"), weights(whole_on_two)
    assert [name for name in two if not (one[name] == two[name]).all()] == []
    assert_nothing_left(tmp_path / "run")


@pytest.fixture
def cluster() -> Iterator[str]:
    """A Ray cluster started like `ray start --head`; yields its address."""
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Paths of sockets must be short.
    ports = free_ports(6)
    options = {
        "port": ports[0],
        "ray-client-server-port": ports[1],
        "dashboard-agent-listen-port": ports[2],
        "node-manager-port": ports[3],
        "object-manager-port": ports[4],
        "runtime-env-agent-port": ports[5],
        "num-cpus": 3,
        "object-store-memory": 100 * 2**20,
        "temp-dir": folder,
        "include-dashboard": "false",
        "node-ip-address": "127.0.0.1",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    environment = ENVIRONMENT | {
        "RAY_AUTH_MODE": "token",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
        "RAY_prestart_worker_first_driver": "0",
    }
    ray = Path(sys.executable).with_name("ray")
    with open(Path(folder) / "output", "w") as output:
        head = subprocess.Popen(
            [ray, "start", "--head", "--block", *arguments],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        text = Path(folder) / "output"
        wait_for(
            lambda: "Ray runtime started" in text.read_text() or head.poll() is not None,
            seconds=120,
            what="a cluster",
        )
        assert head.poll() is None, text.read_text()
        yield f"127.0.0.1:{ports[0]}"
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(60)
        except subprocess.TimeoutExpired:
            head.kill()
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(number: int) -> list[int]:
    """Unused ports, outside of the range that Ray's workers use."""
    found: list[int] = []
    port = 20000 + os.getpid() % 9000
    while len(found) < number:
        port += 1
        with socket.socket() as one:
            try:
                one.bind(("127.0.0.1", port))
            except OSError:
                continue
            found.append(port)
    return found


def test_an_existing_cluster_is_joined(
    cluster: str, config_file: Path, cli: Cli, whole_on_two: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    config = act(config_file, mark=mark, action="kill", after=70)
    address = ("--set", f"launch.address={cluster}")
    with started("train", config, *ON_RAY, "--run-dir", "run", *address, cwd=tmp_path) as driver:
        code, output = ended(driver, tmp_path)
    assert code == 0, output
    assert f"with Ray Train on {cluster}" in output
    assert mark.exists()
    assert len(attempts(tmp_path / "run")) == 2
    assert_same_end(tmp_path / "run", whole_on_two)
    # The cluster outlives the command and serves the next one.
    with started("evaluate", "run", *ON_RAY, *address, cwd=tmp_path) as driver:
        code, output = ended(driver, tmp_path)
    assert code == 0, output
    too_many = ("--launcher", "ray", "--workers", 4)
    with started("train", config, *too_many, "--run-dir", "n", *address, cwd=tmp_path) as driver:
        code, output = ended(driver, tmp_path)
    assert code == 2, output
    assert f"the cluster {cluster} has 3" in " ".join(output.split())


@pytest.mark.parametrize("during", ["train", "evaluation"])
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_a_killed_rank_or_loader_worker_is_noticed(
    during: str, loader_workers: int, config_file: Path, whole_on_two: Path, tmp_path: Path
) -> None:
    """Also measured: how soon it is noticed, and how soon the run trains again."""
    mark = tmp_path / "mark"
    after = {"train": 70, "evaluation": 60}[during] // max(1, loader_workers)
    options = {"mark": mark, "after": after, "during": during}
    config = act(config_file, action="kill", **options)
    loader = ("--set", f"data.loader_workers={loader_workers}")
    with started("train", config, *ON_RAY, "--run-dir", "run", *loader, cwd=tmp_path) as driver:
        wait_for(mark.exists, seconds=PATIENCE, what="the kill")
        output = tmp_path / "output"
        wait_for(
            lambda: re.search("lost a rank|one died|attempt 2", output.read_text()),
            seconds=PATIENCE,
            what="a word of the kill",
        )
        noticed = time.time() - mark.stat().st_mtime
        code, text = ended(driver, tmp_path)
    assert code == 0, text
    assert [attempt["attempt"] for attempt in attempts(tmp_path / "run")] == [1, 2]
    records = read_records(tmp_path / "run/records/steps.jsonl")
    again = next((r["time"] for r in records if r["attempt"] == 2), None)
    if again is not None:
        print(
            f"\n{during}, {loader_workers} loader workers: noticed after {noticed:.1f} s, "
            f"training again after {again - mark.stat().st_mtime:.1f} s"
        )
    assert_same_end(tmp_path / "run", whole_on_two)


@pytest.mark.parametrize("action", ["stop", "sleep"])
def test_blocked_rank(action: str, config_file: Path, whole_on_two: Path, tmp_path: Path) -> None:
    """Above the limit a slow or stopped rank is taken for lost, and all start again."""
    mark = tmp_path / "mark"
    config = act(config_file, mark=mark, action=action, after=70, seconds=500.0)
    sets = ("--set", "launch.timeout_seconds=15")
    with started("train", config, *ON_RAY, "--run-dir", "run", *sets, cwd=tmp_path) as driver:
        code, text = ended(driver, tmp_path)
    assert code == 0, text
    assert "lost a rank: rank 0 of 2: the collective" in text
    assert len(attempts(tmp_path / "run")) == 2
    records = (tmp_path / "run/records/steps.jsonl").read_text().splitlines()
    again = next(r["time"] for r in map(json.loads, records) if r["attempt"] == 2)
    print(f"\n{action}, limit 15 s: training again after {again - mark.stat().st_mtime:.1f} s")
    assert_same_end(tmp_path / "run", whole_on_two)


def test_exception_on_one_rank(config_file: Path, cli: Cli, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    config = act(config_file, mark=mark, action="raise", after=70, again=True)
    sets = ("--set", "launch.max_failures=0")
    code, output = cli("train", config, *ON_RAY, "--run-dir", "run", *sets)
    assert code == 1, output
    assert "rank 1: " in output
    assert "a fault of the transform" in output
    assert is_whole(checkpoint_folders(tmp_path / "run/checkpoints")[0])


def test_incomplete_ray_state_is_not_restored(config_file: Path, cli: Cli, tmp_path: Path) -> None:
    code, output = cli("train", config_file, *ON_RAY, "--run-dir", "run", "--set", "train.steps=8")
    assert code == 0, output
    folder = tmp_path / "run/.ray/train-0123"
    folder.mkdir(parents=True)
    (folder / "checkpoint_manager_snapshot.json").write_text('{"checkpoint_results": [{"che')
    (folder / ".validate_storage_marker").write_bytes(b"")
    code, output = cli("train", config_file, *ON_RAY, "--run-dir", "run", "--resume")
    assert code == 0, output
    assert "continuing at step 8 of 12" in output
    assert not (tmp_path / "run/.ray").exists()


def test_missing_heartbeats_end_the_command(
    config_file: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray Train waits for its processes without a limit; the command does not."""
    monkeypatch.setattr(ray_train, "_SECONDS_BEFORE_A_NOTE", 0.2)
    monkeypatch.setattr(ray_train, "_SECONDS_OF_SILENCE", 0.5)
    start = time.monotonic()
    code, output = cli("train", config_file, *ON_RAY, "--run-dir", "run")
    assert code == 1, output
    assert "no rank has answered for" in output
    assert "no heartbeat from any rank for 0.5 s" in output
    assert time.monotonic() - start < PATIENCE
    monkeypatch.undo()
    continued(config_file, tmp_path)
    assert_nothing_left(tmp_path / "run")
    monkeypatch.setattr(ray_train, "_SECONDS_OF_SILENCE", 0.5)
    code, output = cli("evaluate", tmp_path / "run", *ON_RAY)
    assert code == 1, output
    # There is nothing to resume.
    assert "then run the command again" in " ".join(output.split())
    assert "--resume" not in output


def test_ctrl_c(config_file: Path, tmp_path: Path) -> None:
    config = act(config_file, pause=0.05)
    records = tmp_path / "run/records/steps.jsonl"
    with started("train", config, *ON_RAY, "--run-dir", "run", cwd=tmp_path) as driver:
        wait_for(
            lambda: records.exists() and records.stat().st_size, seconds=PATIENCE, what="a step"
        )
        children = descendants(driver.pid)
        driver.send_signal(signal.SIGINT)
        code, output = ended(driver, tmp_path)
    assert code == 1, output
    assert output.strip().splitlines()[-1].endswith("--resume"), output
    assert json.loads((tmp_path / "run/run.json").read_text())["status"]["state"] == "stopped"
    assert "Traceback" not in output
    wait_for(lambda: not any(map(running, children)), seconds=60, what="the end of all processes")


def test_no_free_port(config_file: Path, tmp_path: Path) -> None:
    """In a network of its own that has two ports: Ray cannot start, which is said."""
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        pytest.skip("a network of its own is not permitted here")
    script = (
        "ip link set lo up; echo '40000 40001' > /proc/sys/net/ipv4/ip_local_port_range; exec "
        f"{sys.executable} -m dml_dist train {config_file} {' '.join(map(str, ON_RAY))}"
    )
    done = subprocess.run(
        ["unshare", "--net", "bash", "-c", script],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Ray could not start a cluster on this machine" in done.stderr
    assert "Traceback" not in done.stderr.rpartition("error:")[2]


@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_killed_process_of_ray(
    name: str, config_file: Path, cli: Cli, whole_on_two: Path, tmp_path: Path
) -> None:
    """Without its daemons Ray fails: the command ends in bounded time and can be resumed."""
    mark = tmp_path / "mark"
    config = act(config_file, mark=mark, action="sleep", after=70, seconds=PATIENCE)
    with started("train", config, *ON_RAY, "--run-dir", "run", cwd=tmp_path) as driver:
        wait_for(mark.exists, seconds=PATIENCE, what="step 5")
        children = descendants(driver.pid)
        (daemon,) = [pid for pid in children if command_of(pid) == name]
        os.kill(daemon, signal.SIGKILL)
        start = time.monotonic()
        code, output = ended(driver, tmp_path)
        took = time.monotonic() - start
    assert code != 0, output
    # Ray itself ends the driver, without its store after its limit of 60 s.
    words = f"Ray's {name} has died, and Ray will end without it; then continue with --resume"
    assert f"{words}: continue with --resume" in " ".join(output.split()), output
    print(f"\n{name} killed: the command ended after {took:.1f} s")
    wait_for(lambda: not any(map(running, children)), seconds=120, what="the end of all processes")
    continued(config, tmp_path)
    assert_same_end(tmp_path / "run", whole_on_two)
