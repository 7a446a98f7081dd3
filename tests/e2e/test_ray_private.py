"""A cluster on this machine is nobody else's: loopback alone, its own folder, its own token."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dml_dist.orchestration import ray_launch
from tests.e2e.conftest import REPOSITORY, write_config

# Imported on every rank, while all of Ray's processes run.
WATCHER = """
import json, os, stat, torch

def parent(pid):
    return int(open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[1])

def below(top):
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    found = [top]
    for pid in found:
        for other in pids:
            try:
                found += [other] if parent(other) == pid else []
            except OSError:
                pass
    return found

def listening(pid):
    try:
        held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
    except OSError:
        return
    for kind in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{kind}").read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in held:
                yield fields[1].split(":")[0]

def optimizer(groups, **options):
    token = os.environ["RAY_AUTH_TOKEN_PATH"]
    found = {
        "addresses": sorted({a for pid in below(int(os.environ["TOP"])) for a in listening(pid)}),
        "token": stat.S_IMODE(os.stat(token).st_mode),
        "folder": [os.path.dirname(token), stat.S_IMODE(os.stat(os.path.dirname(token)).st_mode)],
    }
    with open(os.path.join(os.path.dirname(__file__), "found.json"), "w") as file:
        json.dump(found, file)
    return torch.optim.SGD(groups, lr=0.1)
"""
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_local_cluster_listens_on_loopback_and_leaves_nothing(
    glyphs: Path, tmp_path: Path
) -> None:
    (tmp_path / "watcher.py").write_text(WATCHER)
    config = write_config(glyphs, tmp_path)
    program = (
        "import os; os.environ['TOP'] = str(os.getpid()); from dml_dist.cli import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "TOP"):
        environment.pop(name, None)
    done = subprocess.run(
        [
            *(sys.executable, "-c", program, "train", str(config)),
            *("--launcher", "ray", "--workers", "2", "--set", "evaluation.final=none"),
            *("--set", "optim={name: custom, target: 'watcher:optimizer'}"),
        ],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["addresses"]
    assert set(found["addresses"]) <= LOOPBACK
    folder, mode = found["folder"]
    assert (found["token"], mode) == (0o600, 0o700)
    assert not Path(folder).exists()


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_users_token_is_kept(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, "own")
    with ray_launch._own_folder() as folder:
        assert os.environ[name] == "own"
        assert not list(folder.parent.iterdir())
    assert os.environ[name] == "own"


def test_the_folder_goes_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    held = contextlib.ExitStack()
    place = held.enter_context(ray_launch._own_folder()).parent
    assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((place / "token").stat().st_mode) == 0o600
    assert not held.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert not place.exists()
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ


@pytest.fixture
def token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The token of `ray get-auth-token`, which all users can read."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    file = tmp_path / ".ray" / "auth_token"
    file.parent.mkdir()
    file.write_text("token")
    file.chmod(0o644)
    return file


def test_a_token_that_others_can_read_is_guarded(token_file: Path) -> None:
    ray_launch._guard_token_file()
    assert stat.S_IMODE(token_file.stat().st_mode) == 0o600
    token_file.unlink()
    ray_launch._guard_token_file()  # There is none.
