"""SIGTERM and SIGINT to `dml-dist train`: a checkpoint, exit code 1, a command that continues."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.e2e.conftest import write_config
from tests.faults.forked import command, forked
from tests.faults.runs import (
    ENVIRONMENT,
    act,
    attempts,
    descendants,
    evaluations,
    running,
    wait_for,
    weights,
)

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dml_dist")


def status(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text())["status"]
    return found


def resumed(output: str, folder: Path, *, program: str, world_size: int) -> None:
    """Continue the run in the last line of a command's output, without its launcher."""
    words = shlex.split(output.strip().splitlines()[-1])
    assert words[:2] == ["continue", "with:"], output
    at = words.index("train")
    assert shlex.join(words[2:at]) == program
    assert words[-1] == "--resume"
    launcher = () if world_size == 1 else ("--launcher", "torchrun")
    done = forked(command, *words[at:], *launcher, folder=folder, world_size=world_size)
    assert not any(done.codes), done.output


def assert_stopped(run: Path, output: str, number: int) -> None:
    """The run ended before its last step, with a checkpoint, and says so."""
    name = signal.Signals(number).name
    found = status(run)
    assert (found["state"], found["reason"]) == ("stopped", name), output
    step = found["step"]
    assert 1 <= step < 12
    assert (run / f"checkpoints/step_{step:08d}-a1/manifest.json").is_file()
    assert f"small stopped at step {step}, with a checkpoint ({name})" in output
    assert not (run / "metrics.json").exists()


def assert_equal_end(run: Path, whole: Path) -> None:
    """Weights, results and validations are those of the uninterrupted run.

    Its records are not: the stopped run has one more, of its last step.
    """
    assert status(run)["state"] == "finished"
    assert [attempt["attempt"] for attempt in attempts(run)] == [1, 2]
    one, two = weights(run), weights(whole)
    assert one.keys() == two.keys()
    assert [name for name in two if not torch.equal(one[name], two[name])] == []
    first, second = (json.loads((path / "metrics.json").read_text()) for path in (run, whole))
    assert first["trained"] == second["trained"]
    assert evaluations(run) == evaluations(whole)


@pytest.fixture(scope="module")
def whole(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `config_file`, uninterrupted; to be read only."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = ("train", str(write_config(glyphs, folder)), "--run-dir", "whole")
    done = forked(command, *arguments, folder=folder)
    assert done.codes == [0], done.output
    return folder / "whole"


def test_one_process(config_file: Path, whole: Path, tmp_path: Path) -> None:
    # A signal in the third of twelve steps. The first steps ask after each or every second one.
    config = act(config_file, mark=tmp_path / "m", action="terminate", after=60, rank=0)
    done = forked(command, "train", str(config), "--run-dir", "run", folder=tmp_path)
    assert done.codes == [1], done.output
    (output,) = done.output
    assert_stopped(tmp_path / "run", output, signal.SIGTERM)
    assert "Traceback" not in output
    resumed(output, tmp_path, program="dml-dist", world_size=1)
    assert_equal_end(tmp_path / "run", whole)


def test_one_of_two_ranks(config_file: Path, whole_on_two: Path, tmp_path: Path) -> None:
    """Rank 1 alone gets the signal; both stop at the same step."""
    config = act(config_file, mark=tmp_path / "m", action="terminate", after=30)
    done = forked(command, "train", str(config), "--run-dir", "run", folder=tmp_path, world_size=2)
    assert done.codes == [1, 1], done.output
    assert_stopped(tmp_path / "run", done.output[0], signal.SIGTERM)
    assert "continue with" not in done.output[1]
    program = "torchrun --nproc-per-node 2 -m dml_dist"
    resumed(done.output[0], tmp_path, program=program, world_size=2)
    assert_equal_end(tmp_path / "run", whole_on_two)


def test_the_final_evaluation_ends_at_once(config_file: Path, whole: Path, tmp_path: Path) -> None:
    """Only the evaluation is left to do when the run is continued."""
    # Three validations of 48 images, then 240 test images.
    options = {"action": "terminate", "during": "evaluation", "rank": 0}
    config = act(config_file, mark=tmp_path / "m", after=3 * 48 + 100, **options)
    done = forked(command, "train", str(config), "--run-dir", "run", folder=tmp_path)
    assert done.codes == [1], done.output
    (output,) = done.output
    assert "was interrupted by SIGTERM (last checkpoint at step 12)" in output
    assert "Traceback" not in output
    found = status(tmp_path / "run")
    assert (found["state"], found["reason"], found["step"]) == ("stopped", "SIGTERM", 12)
    resumed(output, tmp_path, program="dml-dist", world_size=1)
    assert_equal_end(tmp_path / "run", whole)


def test_failed_run_records_its_reason(config_file: Path, tmp_path: Path) -> None:
    sets = ("--set", "optim.lr=1e30")
    done = forked(command, "train", str(config_file), "--run-dir", "run", *sets, folder=tmp_path)
    assert done.codes == [1], done.output
    found = status(tmp_path / "run")
    assert found["state"] == "failed"
    assert "the loss is not finite at step" in found["reason"]


def signalled(
    *arguments: str, folder: Path, number: int, at: Callable[[], object]
) -> tuple[int, str, str]:
    """Run a module, send a signal at a moment; give exit code, standard output and errors."""
    with open(folder / "output", "w") as output, open(folder / "errors", "w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            cwd=folder,
            env=ENVIRONMENT,
            stdout=output,
            stderr=errors,
        )
        try:
            wait_for(lambda: at() or process.poll() is not None, seconds=200, what="the moment")
            children = descendants(process.pid)
            process.send_signal(number)
            code = process.wait(200)
        finally:
            process.kill()
            process.wait()
    wait_for(lambda: not any(map(running, children)), seconds=60, what="the end of all processes")
    return code, (folder / "output").read_text(), (folder / "errors").read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("launcher", "number", "loader_workers"),
    [("torchrun", signal.SIGTERM, 2), ("torchrun", signal.SIGINT, 0), ("ray", signal.SIGTERM, 0)],
)
def test_a_signal_to_the_launcher(
    launcher: str,
    number: int,
    loader_workers: int,
    config_file: Path,
    whole_on_two: Path,
    tmp_path: Path,
) -> None:
    """To torchrun, which passes it on to its ranks' process groups, and to the driver of Ray."""
    config, run = act(config_file, pause=0.05), tmp_path / "run"
    records = run / "records/steps.jsonl"
    arguments = ["train", str(config), "--run-dir", "run"]
    arguments += ["--set", f"data.loader_workers={loader_workers}"]
    module = ("dml_dist", "--launcher", "ray", "--workers", "2")
    program = [*TORCHRUN, *arguments]
    if launcher == "ray":
        program = [module[0], *arguments, *module[1:]]
    code, output, errors = signalled(
        *program,
        folder=tmp_path,
        number=number,
        at=lambda: records.is_file() and records.stat().st_size,
    )
    assert code == 1, output + errors
    assert_stopped(run, output, number)
    assert "Fatal Python error" not in errors
    if launcher == "ray":  # torchrun's own process ends with a traceback of its own.
        assert "Traceback" not in errors
    name = "python -m dml_dist" if launcher == "ray" else "torchrun --nproc-per-node 2 -m dml_dist"
    resumed(output, tmp_path, program=name, world_size=2)
    assert_equal_end(run, whole_on_two)


@pytest.fixture
def study(config_file: Path) -> Path:
    """A comparison of one method over two seeds, with no checkpoint due before the end."""
    plain = yaml.safe_load(config_file.read_text())
    plain["checkpoint"]["every_steps"] = plain["evaluation"]["every_steps"] = 12
    plain["compare"] = {"methods": {"nca": []}, "seeds": [0, 1]}
    config_file.write_text(yaml.safe_dump(plain))
    return config_file


def test_a_run_of_a_study(study: Path, tmp_path: Path) -> None:
    """The whole study stops, and continues with the stopped run."""
    config = act(study, mark=tmp_path / "m", action="terminate", after=60, rank=0)
    done = forked(command, "compare", str(config), "--run-dir", "study", folder=tmp_path)
    assert done.codes == [1], done.output
    last = done.output[0].strip().splitlines()[-1]
    assert last == f"continue with: dml-dist compare {config} --run-dir study --resume"
    first, second = (tmp_path / f"study/runs/nca-seed-{seed}" for seed in (0, 1))
    assert status(first)["state"] == "stopped"
    assert not second.exists()
    words = shlex.split(last.removeprefix("continue with: dml-dist "))
    done = forked(command, *words, folder=tmp_path)
    assert done.codes == [0], done.output
    assert [status(run)["state"] for run in (first, second)] == ["finished"] * 2
    assert (len(attempts(first)), len(attempts(second))) == (2, 1)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_runs_side_by_side(study: Path, tmp_path: Path) -> None:
    """Both runs of a study stop with a checkpoint at a signal to its driver."""
    runs = [tmp_path / f"study/runs/nca-seed-{seed}" for seed in (0, 1)]
    records = [run / "records/steps.jsonl" for run in runs]
    arguments = ("compare", str(act(study, pause=0.05)), "--run-dir", "study", "--parallel", "2")
    code, output, errors = signalled(
        *("dml_dist", *arguments),
        folder=tmp_path,
        number=signal.SIGTERM,
        at=lambda: all(path.is_file() and path.stat().st_size for path in records),
    )
    assert code == 1, output + errors
    assert "Traceback" not in errors
    assert output.strip().splitlines()[-1].endswith("--run-dir study --parallel 2 --resume")
    for run in runs:
        found = status(run)
        assert (found["state"], found["reason"]) == ("stopped", "SIGTERM")
        assert (run / f"checkpoints/step_{found['step']:08d}-a1/manifest.json").is_file()
