"""A small glyph data set and configurations on it, shared by the end-to-end tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from dml_dist.cli import main
from dml_dist.config.data import GlyphsConfig
from dml_dist.data.datasets import build_importer
from dml_dist.data.write_shards import import_dataset
from dml_dist.runtime.datasets import describe
from tests.blank_figures import save_blank

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 60 glyph classes (30 of them train) with 8 images each, in several tar shards."""
    out = tmp_path_factory.mktemp("glyphs")
    config = GlyphsConfig(num_classes=60, images_per_class=8, image_size=24)
    import_dataset(build_importer(config), out, samples_per_shard=100, description=describe(config))
    return out


@pytest.fixture
def config_file(glyphs: Path, tmp_path: Path) -> Path:
    """A run of 12 steps on the small glyphs, in one process."""
    return write_config(glyphs, tmp_path)


def write_config(glyphs: Path, folder: Path) -> Path:
    """Write the configuration of a run of 12 steps into a folder."""
    config = {
        "name": "small",
        "data": {
            "path": str(glyphs),
            "batches": {"name": "shuffled", "window": 2, "last": "keep"},
            "transform": {"size": 24, "crop_scale": [0.7, 1.0], "flip": 0.0},
            "loader_workers": 0,
        },
        "model": {"backbone": {"name": "conv4", "width": 16}, "embedding_size": 16},
        "train": {"global_batch_size": 26, "steps": 12, "log_every": 3},
        "validation": {"name": "fraction", "fraction": 0.2},
        "evaluation": {"batch_size": 32, "every_steps": 4},
        "checkpoint": {"every_steps": 4, "keep": 5},
        "launch": {"launcher": "inprocess", "threads_per_rank": 1, "timeout_seconds": 60.0},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str]]:
    """Run the command line in this process, in an empty folder; give exit code and output."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # main sets it; unset again at the end.

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dml-dist", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        captured = capfd.readouterr()
        return code, captured.out + captured.err

    return run


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the figures of this process's pages blank."""
    monkeypatch.setattr(Figure, "savefig", save_blank)


def torchrun(num_ranks: int, *arguments: object, cwd: Path, timeout: float = 120) -> str:
    """Run the command line on ranks that torchrun starts, and give their output."""
    command: Sequence[str] = [
        sys.executable,
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)),
        *("-m", "dml_dist", *map(str, arguments)),
    ]
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout
