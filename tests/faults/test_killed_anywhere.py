"""SIGKILL before every step on the disk: training, its ranks, evaluation and import continue."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from dml_dist.data.write_shards import import_dataset
from tests.faults.forked import Ended, command, forked
from tests.faults.runs import assert_same_end, attempts, part_of
from tests.oracles_data import folder_bytes, noise_importer

KILLED = -9


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run.

    Attributes:
        arguments: Its command line.
        run: Its folder.
        steps: What each rank did to the disk below the folder.
    """

    arguments: tuple[str, ...]
    run: Path
    steps: list[list[str]]


@pytest.fixture
def whole(config_file: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Whole:
    """A run of 12 steps with 3 checkpoints, of which the best and the last are kept."""
    return train_whole(config_file, tmp_path, getattr(request, "param", 1))


def train_whole(config_file: Path, folder: Path, world_size: int) -> Whole:
    sets = ["train.steps=12", "checkpoint.keep=1", "launch.timeout_seconds=20"]
    arguments = (
        *("train", str(config_file), "--run-dir", "run"),
        *(part for change in sets for part in ("--set", change)),
    )
    run = folder / "run"
    done = forked(command, *arguments, folder=folder, below=run, world_size=world_size)
    assert done.codes == [0] * world_size, done.output
    shutil.move(run, folder / "whole")
    return Whole(arguments, folder / "whole", done.steps)


def kill_and_continue(whole: Whole, folder: Path, rank: int, number: int) -> None:
    """Kill one rank before a step on the disk; what is left continues, or says why not."""
    run, world_size = folder / "run", len(whole.steps)
    what = f"rank {rank}, step {number}: {whole.steps[rank][number - 1]}"
    shutil.rmtree(run, ignore_errors=True)
    options = {"folder": folder, "below": run, "world_size": world_size}
    killed = forked(command, *whole.arguments, kill=(rank, number), **options)
    assert killed.codes[rank] == KILLED, what
    others_say_why(killed, rank, what)
    if not (run / "run.json").exists():
        # Nothing was trained. Both commands report it, and neither changes existing files.
        for arguments in (whole.arguments, (*whole.arguments, "--resume")):
            if arguments == whole.arguments and not any(run.iterdir() if run.exists() else ()):
                continue
            refused = forked(command, *arguments, **options)
            assert set(refused.codes) == {2}, (what, refused.output)
            assert "Traceback" not in "".join(refused.output), (what, refused.output)
        return
    done = forked(command, *whole.arguments, "--resume", **options)
    assert set(done.codes) == {0}, (what, done.output)
    assert len(attempts(run)) <= 2
    try:
        assert_same_end(run, whole.run)
    except AssertionError as error:
        raise AssertionError(what) from error


def others_say_why(ended: Ended, rank: int, what: str) -> None:
    """The ranks that live end by themselves, with a message that names what they waited for."""
    assert ended.seconds < 60, what
    for other, code in enumerate(ended.codes):
        if other == rank:
            continue
        assert code == 1, (what, ended.output)
        assert "Another rank ended, is late or called" in ended.output[other], what
        assert "Traceback" not in ended.output[other], (what, ended.output)


def last(steps: list[str], name: str) -> int:
    """The last step on the disk whose description holds a name, counted from 1."""
    return max(at for at, step in enumerate(steps, 1) if name in step)


def different(steps: list[str]) -> list[int]:
    """The steps on the disk, counted from 1, but of many pictures of the report only the last."""
    pictures = [at for at, step in enumerate(steps, 1) if re.search(r"\.\d+\.png", step)]
    return [at for at in range(1, len(steps) + 1) if at not in pictures[:-2]]


def test_killed_during_checkpoint(whole: Whole, tmp_path: Path) -> None:
    """Before a checkpoint takes its name, and while one is deleted; the slow form: anywhere."""
    for step in ("rename .step_", "remove optim.pt"):
        kill_and_continue(whole, tmp_path, 0, last(whole.steps[0], step))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_every_step_on_the_disk(whole: Whole, tmp_path: Path) -> None:
    numbers = different(whole.steps[0])
    assert len(numbers) > 40
    for number in part_of(numbers):
        kill_and_continue(whole, tmp_path, 0, number)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("whole", [2], indirect=True)
def test_one_of_two_ranks_killed(whole: Whole, tmp_path: Path) -> None:
    """Rank 1 at each of its steps on the disk, rank 0 at every fourth."""
    assert whole.steps[1]
    for rank, stride in ((1, 1), (0, 4)):
        for number in part_of(different(whole.steps[rank])[::stride]):
            kill_and_continue(whole, tmp_path, rank, number)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_during_evaluation(whole: Whole, tmp_path: Path) -> None:
    target = whole.run / "metrics-test-best.json"
    options = {"folder": tmp_path, "below": whole.run}
    done = forked(command, "evaluate", "whole", **options)
    assert done.codes == [0], done.output
    expected = target.read_text()
    target.unlink()
    before = sorted(path.name for path in whole.run.iterdir())
    for number, step in part_of(list(enumerate(done.steps[0], 1))):
        killed = forked(command, "evaluate", "whole", kill=(0, number), **options)
        assert killed.codes == [KILLED], step
        assert not target.exists(), step
    again = forked(command, "evaluate", "whole", **options)
    assert again.codes == [0], again.output
    assert target.read_text().partition('"seconds"')[0] == expected.partition('"seconds"')[0]
    left = {path.name for path in whole.run.iterdir()} - set(before) - {target.name}
    assert all(name.startswith(".") and name.endswith(".tmp") for name in left)


def write_shards(out: str) -> None:
    import_dataset(noise_importer(), Path(out), samples_per_shard=16, processes=1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_import_killed_at_every_step_on_the_disk(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = forked(write_shards, "out", folder=tmp_path, below=out)
    assert done.codes == [0], done.output
    whole = folder_bytes(out)
    steps = done.steps[0]
    assert len(steps) > 10
    for number, step in part_of(list(enumerate(steps, 1))):
        shutil.rmtree(out)
        killed = forked(write_shards, "out", folder=tmp_path, below=out, kill=(0, number))
        assert killed.codes == [KILLED], step
        out.mkdir(exist_ok=True)
        done = forked(write_shards, "out", folder=tmp_path, below=out)
        assert done.codes == [0], (step, done.output)
        assert folder_bytes(out) == whole, step
