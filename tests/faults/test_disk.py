"""Full and read-only disks, vanished tar shards: a message, and a state that continues."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from dml_dist.data.index import read_index
from dml_dist.data.verify import verify
from tests.faults.forked import command, forked
from tests.faults.runs import act, assert_same_end, attempts, part_of
from tests.oracles_data import folder_bytes

Resize = Callable[[str], None]
Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tuple[Path, Resize]]:
    """A small disk of its own, and the function that changes its options (`size=2m`, `ro`)."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder))
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")

    def change(options: str) -> None:
        done = mount("-o", f"remount,{options}", str(folder))
        assert done.returncode == 0, done.stderr

    try:
        yield folder, change
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)


def needed_for(folder: Path) -> int:
    """KiB that the files of a folder take on a disk with pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*"))


def train_on_disks(
    config_file: Path,
    folder: Path,
    disk: tuple[Path, Resize],
    shares: Sequence[float],
    world_size: int = 1,
) -> None:
    """Train with disks of shares of what a run needs; each continues on a larger one."""
    mounted, change = disk
    change("size=64m")
    sets = ("--set", "train.steps=8", "--set", "launch.timeout_seconds=20")
    arguments = ("train", str(config_file), *sets, "--run-dir")
    options = {"folder": folder, "world_size": world_size}
    done = forked(command, *arguments, str(mounted / "run"), **options)
    assert done.codes == [0] * world_size, done.output
    shutil.move(mounted / "run", folder / "whole")
    needed = needed_for(folder / "whole")
    for share in shares:
        size = max(4, int(needed * share))
        change(f"size={size}k")
        full = forked(command, *arguments, str(mounted / "run"), **options)
        what = (size, needed, full.output)
        # Without space for its page alone a run is finished, and says so.
        finished = "`dml-dist report` writes it again" in "".join(full.output)
        assert not any(full.codes) if finished else all(full.codes), what
        assert "No space left on device" in "".join(full.output), what
        assert "Traceback" not in "".join(full.output), what
        assert full.seconds < 60, what
        change("size=64m")
        if (mounted / "run/run.json").exists():
            done = forked(command, *arguments, str(mounted / "run"), "--resume", **options)
            assert not any(done.codes), (what, done.output)
            assert_same_end(mounted / "run", folder / "whole")
        shutil.rmtree(mounted / "run", ignore_errors=True)


def test_full_disk_in_training(
    config_file: Path, disk: tuple[Path, Resize], tmp_path: Path
) -> None:
    train_on_disks(config_file, tmp_path, disk, [0.5])


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world_size", [1, 2])
def test_full_disk_at_any_step(
    world_size: int, config_file: Path, disk: tuple[Path, Resize], tmp_path: Path
) -> None:
    """Records, parts of checkpoints, manifests, the gallery, metrics and the page run out."""
    shares = part_of([part / 40 for part in range(40)])
    train_on_disks(config_file, tmp_path, disk, shares, world_size)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_full_disk_under_ray(
    config_file: Path, disk: tuple[Path, Resize], cli: Cli, whole_on_two: Path, tmp_path: Path
) -> None:
    """No restart of the ranks fixes it: the command ends, and resumes where there is space."""
    mounted, change = disk
    run = mounted / "run"
    for share in (0.2, 0.5):
        change(f"size={int(needed_for(whole_on_two) * share)}k")
        arguments = ("train", config_file, "--launcher", "ray", "--workers", 2, "--run-dir", run)
        code, output = cli(*arguments)
        assert code == 1, output
        assert "No space left on device" in output
        assert "Traceback" not in output
        assert len(attempts(run)) == 1
        change("size=64m")
        words = ("train", str(config_file), "--run-dir", str(run), "--resume")
        done = forked(command, *words, folder=tmp_path, world_size=2)
        assert not any(done.codes), done.output
        assert_same_end(run, whole_on_two)
        shutil.rmtree(run)


def glyphs_into(out: Path) -> tuple[str, ...]:
    options = {"classes": 40, "images-per-class": 5, "image-size": 24}
    parts = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return ("data", "import", "glyphs", "--out", str(out), *parts)


def on_one_core(*arguments: str) -> None:
    """Run a command that starts no writer processes: each would import torch again."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    command(*arguments)


@pytest.mark.parametrize(
    "shares", [(0.5,), pytest.param((0.1, 0.2, 0.9, 0.95, 1.0, 1.1), marks=pytest.mark.slow)]
)
@pytest.mark.timeout(600)
def test_full_disk_in_an_import(
    shares: tuple[float, ...], disk: tuple[Path, Resize], tmp_path: Path
) -> None:
    mounted, change = disk
    done = forked(on_one_core, *glyphs_into(tmp_path / "whole"), folder=tmp_path)
    assert done.codes == [0], done.output
    whole = folder_bytes(tmp_path / "whole")
    needed = sum(-(-len(data) // 4096) * 4 for data in whole.values())
    out = mounted / "out"
    for size in (max(4, int(needed * share)) for share in shares):
        change(f"size={size}k")
        full = forked(on_one_core, *glyphs_into(out), folder=tmp_path)
        if size < needed:
            assert full.codes == [1], (size, full.output)
        if full.codes == [1]:
            assert "No space left on device" in full.output[0], (size, full.output)
            assert "Traceback" not in full.output[0], (size, full.output)
        change("size=64m")
        done = forked(on_one_core, *glyphs_into(out), folder=tmp_path)
        assert done.codes == [0], (size, done.output)
        assert folder_bytes(out) == whole
        assert not verify(out, processes=1).problems
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_read_only_disk(config_file: Path, disk: tuple[Path, Resize], tmp_path: Path) -> None:
    mounted, change = disk
    change("size=64m")
    arguments = ("train", str(config_file), "--run-dir", str(mounted / "run"))
    done = forked(command, *arguments, "--set", "train.steps=4", folder=tmp_path)
    assert done.codes == [0], done.output
    change("ro")
    commands = {
        "new run": ("train", str(config_file), "--run-dir", str(mounted / "new")),
        "resume": (*arguments, "--resume"),
        "evaluate": ("evaluate", str(mounted / "run")),
        "report": ("report", str(mounted / "run")),
        "import": glyphs_into(mounted / "out"),
    }
    for name, words in commands.items():
        refused = forked(on_one_core, *words, folder=tmp_path)
        assert refused.codes == [1], (name, refused.output)
        assert "Read-only file system" in refused.output[0], (name, refused.output)
        assert "Traceback" not in refused.output[0], (name, refused.output)
    change("rw")
    done = forked(command, *commands["resume"], folder=tmp_path)
    assert done.codes == [0], done.output


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("loader_workers", [0, 2])
def test_missing_tar_shard_during_training(
    loader_workers: int, config_file: Path, glyphs: Path, tmp_path: Path
) -> None:
    """It is named as soon as a process opens it; put back, the run continues."""
    data, away = tmp_path / "data", tmp_path / "away"
    shutil.copytree(glyphs, data)
    index = read_index(data)
    # The last tar shard of the first epoch: it is not open yet while the first is being read.
    rows = index.rows("train")
    shards = sorted({index.tar_shards[at] for at in index.tar_shard[rows]})
    config = act(config_file)
    loader = f"data.loader_workers={loader_workers}"
    sets = ("--set", f"data.path={data}", "--set", loader)
    arguments = ("train", str(config), *sets, "--run-dir")
    done = forked(command, *arguments, str(tmp_path / "whole"), folder=tmp_path)
    assert done.codes == [0], done.output
    for shard in shards:
        mark = tmp_path / f"mark-{shard}"
        config = act(config_file, mark=mark, action="remove", path=data / shard, after=1, rank=0)
        os.link(data / shard, away)
        run = tmp_path / f"run-{shard}"
        failed = forked(command, *arguments, str(run), folder=tmp_path)
        assert mark.exists()
        assert failed.codes == [2], (shard, failed.output)
        assert str(data / shard) in failed.output[0]
        assert "No such file" in failed.output[0]
        assert "Traceback" not in failed.output[0]
        os.rename(away, data / shard)
        done = forked(command, *arguments, str(run), "--resume", folder=tmp_path)
        assert done.codes == [0], (shard, done.output)
        assert_same_end(run, tmp_path / "whole")
