"""The small glyph runs of the end-to-end tests, and what fault tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import cli, config_file, glyphs, write_config
from tests.faults.forked import command, forked

__all__ = ["cli", "config_file", "glyphs"]


@pytest.fixture(scope="session")
def whole_on_two(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `config_file` on two ranks, uninterrupted; to be read only."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = ("train", str(write_config(glyphs, folder)), "--run-dir", "run")
    done = forked(command, *arguments, folder=folder, world_size=2)
    assert done.codes == [0, 0], done.output
    return folder / "run"
