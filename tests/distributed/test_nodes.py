"""Before its first step a run checks that all nodes see the same run folder and data."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

from dml_dist.config.load import dump_config, load_config
from dml_dist.data.index import INDEX_NAME, read_index, write_index
from dml_dist.errors import DmlDistError
from dml_dist.parallel.comm import Comm
from dml_dist.runs.folder import RunFolder
from dml_dist.runtime import nodes
from dml_dist.runtime.progress import Event
from dml_dist.runtime.tasks import Assignment
from dml_dist.topology import Topology
from tests.e2e.conftest import config_file, glyphs
from tests.ranks import run_ranks

__all__ = ["config_file", "glyphs"]

NODES = ("alpha (10.0.0.1)", "alpha (10.0.0.1)", "beta (10.0.0.2)")


def opened(
    topology: Topology,
    config: str,
    folders: tuple[str, str],
    data: tuple[str, str],
    seconds: float,
    kind: Literal["train", "evaluate"],
) -> tuple[str, str, list[Event]]:
    """Open a run on three ranks; the last one is on a node with another folder, data and clock."""
    events: list[Event] = []
    elsewhere = topology.rank == 2
    topology = replace(topology, node=NODES[topology.rank])
    loaded = load_config(Path(config), [f"data.path={data[elsewhere]}"])
    assignment = Assignment(kind, loaded, folders[elsewhere])
    now = time.time
    nodes.time.time = lambda: now() + seconds * elsewhere  # type: ignore[method-assign]
    try:
        comm = Comm.from_default_group()
        context = nodes.open_on_nodes(assignment, topology, comm, events.append)
    except DmlDistError as error:
        return type(error).__name__, str(error), events
    return "", str(len(context.index)), events


@pytest.fixture
def run(config_file: Path, tmp_path: Path) -> Path:
    """A new run's folder."""
    text = dump_config(load_config(config_file))
    return RunFolder.create(tmp_path / "run", text, name="small", seed=0).path


def found_on_nodes(
    config: Path,
    folders: tuple[Path, Path],
    data: tuple[Path | str, Path | str],
    *,
    seconds: float = 0.0,
    kind: Literal["train", "evaluate"] = "train",
) -> tuple[str, str, list[Event]]:
    """The same outcome of all ranks, with what rank 0 emitted."""
    arguments: list[Any] = [[str(path) for path in pair] for pair in (folders, data)]
    found = run_ranks(opened, 3, str(config), *arguments, seconds, kind)
    assert len({one[:2] for one in found}) == 1
    assert found[1][2] == found[2][2] == []
    first: tuple[str, str, list[Event]] = found[0]
    return first


def test_the_same_folder_and_data(config_file: Path, run: Path, glyphs: Path) -> None:
    # Less than 30 s apart: no clock is that exact.
    found = found_on_nodes(config_file, (run, run), (glyphs, glyphs), seconds=20.0)
    assert found == ("", "480", [])


def test_a_node_without_the_run_folder(
    config_file: Path, run: Path, glyphs: Path, tmp_path: Path
) -> None:
    missing = tmp_path / "missing"
    kind, text, _ = found_on_nodes(config_file, (run, missing), (glyphs, glyphs))
    assert kind == "ConfigError"
    assert text.startswith(
        f"rank 2 of 3: on the node {NODES[2]}: {missing}/run.json does not exist"
    )


def test_a_node_with_the_folder_of_another_run(
    config_file: Path, run: Path, glyphs: Path, tmp_path: Path
) -> None:
    other = RunFolder.create(tmp_path / "other", "", name="other", seed=0).path
    kind, text, _ = found_on_nodes(config_file, (run, other), (glyphs, glyphs))
    assert kind == "ConfigError"
    start = (
        f"rank 2 of 3: {other} holds one run on the node {NODES[2]} and another one on {NODES[0]}"
    )
    assert text.startswith(start)


def test_a_node_without_the_data(
    config_file: Path, run: Path, glyphs: Path, tmp_path: Path
) -> None:
    data = shutil.copytree(glyphs, tmp_path / "data")
    shard = data / read_index(data).tar_shards[1]
    shard.unlink()
    kind, text, _ = found_on_nodes(config_file, (run, run), (glyphs, data))
    assert kind == "DataError"
    assert text.startswith(f"rank 2 of 3: on the node {NODES[2]}: {shard} is listed in")
    # Where all nodes lack it, it is not the node that is wrong.
    kind, text, _ = found_on_nodes(config_file, (run, run), (data, data), kind="evaluate")
    assert kind == "DataError"
    assert f"{shard} is listed in" in text


def test_a_node_with_other_data(config_file: Path, run: Path, glyphs: Path, tmp_path: Path) -> None:
    data = shutil.copytree(glyphs, tmp_path / "data")
    index = read_index(data)
    write_index(replace(index, label=index.label[::-1].copy()))
    kind, text, _ = found_on_nodes(config_file, (run, run), (glyphs, data))
    assert kind == "DataError"
    words = f"{INDEX_NAME} of {data} on the node {NODES[2]} differs from the one on {NODES[0]}"
    assert words in text


def test_a_clock_that_differs(config_file: Path, run: Path, glyphs: Path) -> None:
    for seconds, words in ((-400.0, "400 s behind"), (95.0, "95 s ahead of")):
        found = found_on_nodes(config_file, (run, run), (glyphs, glyphs), seconds=seconds)
        assert found[0] == ""
        (event,) = found[2]
        text = f"warning: the clock of {NODES[2]} is {words} that of {NODES[0]}"
        assert event["text"].startswith(text), event


def test_in_one_process_no_node_is_named(config_file: Path, tmp_path: Path) -> None:
    assignment = Assignment("train", load_config(config_file), str(tmp_path / "missing"))
    with pytest.raises(DmlDistError, match=f"^{tmp_path}/missing/run.json does not exist"):
        nodes.open_on_nodes(assignment, Topology(), Comm.single(), lambda event: None)
    # A rank of a cluster may run on another machine than the command.
    config = load_config(config_file, ["launch.launcher=ray", "launch.address=head:6379"])
    assignment = replace(assignment, config=config)
    with pytest.raises(DmlDistError, match=r"^on the node alpha: .*run\.json does not exist"):
        nodes.open_on_nodes(assignment, Topology(node="alpha"), Comm.single(), lambda event: None)
