"""A run folder: is never overwritten, and records its attempts and their provenance."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import dml_dist
from dml_dist.errors import ConfigError, DataError
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.provenance import GitState

ATTEMPT = {"world_size": 2, "launcher": "ray", "device": "2 x cpu", "command": "dml-dist train"}


def make(path: Path) -> RunFolder:
    return RunFolder.create(path, "name: demo\n", name="demo", seed=7)


def test_a_new_run_has_its_files(tmp_path: Path) -> None:
    run = make(tmp_path / "runs" / "demo")
    assert run.config_path.read_text() == "name: demo\n"
    assert run.records("steps") == tmp_path / "runs" / "demo" / "records" / "steps.jsonl"
    assert run.records("evaluations").parent.is_dir()
    assert run.checkpoints.is_dir()
    info = RunFolder.open(run.path).info()
    assert (info.name, info.seed, info.finished, info.attempts) == ("demo", 7, None, ())
    assert info.created.endswith("+00:00")


def test_an_empty_folder_is_taken_and_relative_paths_become_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    run = make(Path("x"))
    assert run.path == tmp_path / "x"
    assert run.info_path.is_file()


def test_an_existing_run_is_refused_with_its_state(tmp_path: Path) -> None:
    run = make(tmp_path / "demo")
    with pytest.raises(
        ConfigError, match=r"already holds the run 'demo' \(running since 2.*, no checkpoint yet\)"
    ):
        make(tmp_path / "demo")
    run.begin_attempt(**ATTEMPT)
    for name in ("step_00000050-a1", "step_00000400-a1", "notes", "step_00000100-a1"):
        (run.checkpoints / name).mkdir()
    with pytest.raises(ConfigError) as caught:
        make(tmp_path / "demo")
    for part in ("last checkpoint at step 400", "--resume", "--run-dir", str(run.path)):
        assert part in str(caught.value)
    run.finish({"trained": {}})
    with pytest.raises(ConfigError, match=r"\(finished since 2.*, last checkpoint at step 400\)"):
        make(tmp_path / "demo")
    assert run.config_path.read_text() == "name: demo\n"


def test_other_folders_and_files_are_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match="not empty and holds no run"):
        make(tmp_path / "photos")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["a.jpg"]
    with pytest.raises(ConfigError, match="is a file"):
        make(tmp_path / "photos" / "a.jpg")


def test_a_run_that_another_command_is_starting_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunFolder, "require_new", lambda self: None)  # both looked before
    make(tmp_path / "demo")
    with pytest.raises(ConfigError, match="another command is starting"):
        make(tmp_path / "demo")


def test_opening_another_folder_names_nearby_runs(tmp_path: Path) -> None:
    make(tmp_path / "runs" / "one")
    with pytest.raises(ConfigError, match=r"does not exist; runs near it: .*runs.one;"):
        RunFolder.open(tmp_path / "runs" / "two")
    with pytest.raises(ConfigError, match=r"no run\.json; runs near it: .*runs.one;"):
        RunFolder.open(tmp_path / "runs")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder.open(tmp_path / "runs" / "one" / "config.yaml")
    with pytest.raises(ConfigError, match="does not exist; give the folder"):
        RunFolder.open(tmp_path / "no" / "such")


def test_attempts_are_numbered_and_keep_what_changed(tmp_path: Path) -> None:
    run = make(tmp_path / "demo")
    assert run.begin_attempt(**ATTEMPT) == 1
    changes = ["launch.num_workers: 2 -> 3"]
    assert RunFolder.open(run.path).begin_attempt(**{**ATTEMPT, "world_size": 3}, changes=changes)
    first, second = run.info().attempts
    assert (first.attempt, first.world_size, first.changes) == (1, 2, ())
    assert (second.attempt, second.world_size, second.changes) == (2, 3, tuple(changes))
    assert second.command == "dml-dist train"
    assert second.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "torch" in second.versions
    assert isinstance(second.git, GitState)
    assert second.host
    assert second.platform


def test_finish_writes_the_metrics_and_another_attempt_unmarks_the_run(tmp_path: Path) -> None:
    run = make(tmp_path / "demo")
    run.begin_attempt(**ATTEMPT)
    run.add_facts({"training classes": 450})
    run.add_facts({"steps": 1000})
    run.finish({"trained": {"recall_at_1": 0.875, "map_at_r": float("nan")}})
    assert json.loads(run.metrics_path.read_text()) == {
        "trained": {"recall_at_1": 0.875, "map_at_r": "nan"}
    }
    assert run.info().finished is not None
    assert run.info().facts == {"training classes": 450, "steps": 1000}
    run.begin_attempt(**ATTEMPT)
    assert run.info().finished is None
    assert run.metrics_path.exists()


def test_a_run_is_finished_only_at_its_end(tmp_path: Path) -> None:
    run = make(tmp_path / "demo")
    assert run.info().status.state == "running"
    run.end("stopped", "SIGTERM", 40)
    status = run.info().status
    assert (status.state, status.reason, status.step) == ("stopped", "SIGTERM", 40)
    assert json.loads(run.info_path.read_text())["status"] == {
        "state": "stopped",
        "time": status.time,
        "reason": "SIGTERM",
        "step": 40,
    }
    with pytest.raises(ConfigError, match=r"\(stopped since 2.*continue it with --resume"):
        make(run.path)
    run.begin_attempt(**ATTEMPT)
    status = run.info().status
    assert (status.state, status.reason, status.step) == ("running", None, None)
    run.end("failed", "the disk is full")
    status = run.info().status
    assert (status.state, status.reason, status.step) == ("failed", "the disk is full", None)
    assert run.info().finished is None
    run.finish({})
    assert run.info().finished == run.info().status.time


@pytest.mark.parametrize("finished", [None, "2026-01-02T03:04:05+00:00"])
def test_runs_from_before_there_was_a_status_are_read(tmp_path: Path, finished: str | None) -> None:
    run = make(tmp_path / "demo")
    values = json.loads(run.info_path.read_text())
    del values["status"]
    run.info_path.write_text(json.dumps({**values, "finished": finished}))
    info = run.info()
    assert info.finished == finished
    assert info.status.state == ("finished" if finished else "running")
    run.begin_attempt(**ATTEMPT)
    assert "finished" not in json.loads(run.info_path.read_text())


@pytest.mark.parametrize("text", ['{"name": "x"', "{}", '{"attempts": [], "color": 1}', "[]"])
def test_damaged_run_json_is_named(tmp_path: Path, text: str) -> None:
    run = make(tmp_path / "demo")
    run.info_path.write_text(text)
    with pytest.raises(DataError, match=r"run\.json"):
        run.info()


def test_the_run_folder_needs_no_torch() -> None:
    program = "import sys, dml_dist.runs.folder; sys.exit('torch' in sys.modules)"
    folder = Path(dml_dist.__file__).parent.parent
    assert subprocess.run([sys.executable, "-c", program], cwd=folder, check=False).returncode == 0


def test_a_run_that_failed_before_its_first_step_leaves_its_folder_free(tmp_path: Path) -> None:
    """The corrected command may use it; one that has begun, or may be alive, is refused."""
    path = tmp_path / "run"
    run = RunFolder.create(path, "lr: 1", name="demo", seed=1)
    with pytest.raises(ConfigError, match="already holds the run"):
        run.require_new()
    run.begin_attempt(**ATTEMPT)
    run.end("failed", "the weights cannot be read")
    run.require_new()
    again = RunFolder.create(path, "lr: 2", name="demo", seed=2)
    assert (again.info().seed, again.info().attempts) == (2, ())
    assert again.config_path.read_text() == "lr: 2"
    for state in ("failed", "stopped"):
        again.begin_attempt(**ATTEMPT)
        again.begin_training(0)
        again.end(state, "disk full")
        with pytest.raises(ConfigError, match="already holds the run"):
            RunFolder.create(path, "lr: 3", name="demo", seed=3)
    assert again.config_path.read_text() == "lr: 2"
