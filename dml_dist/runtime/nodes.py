"""What all nodes of a run must share, checked before its first step: run folder, data, clocks.

An error names the node, and every rank raises it, so that no rank waits for another.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from dml_dist.data.index import INDEX_NAME
from dml_dist.errors import ConfigError, DataError, DmlDistError
from dml_dist.parallel.comm import Comm
from dml_dist.runs.folder import RunFolder
from dml_dist.runtime.context import RunContext, open_context
from dml_dist.runtime.progress import Emit, note
from dml_dist.runtime.tasks import Assignment
from dml_dist.topology import Topology
from dml_dist.urls import shown_url

# Clocks that are synchronised differ by less than a second.
_SECONDS_OF_CLOCKS = 30.0


@dataclass(frozen=True)
class _View:
    """What a rank sees on its node.

    Attributes:
        node: Name of the node.
        run: When the run in the run folder was created, and its name.
        index: Digest of the index.
        clock: Seconds since 1970, at a time that is about the same on all ranks.
    """

    node: str
    run: tuple[str, str] | None = None
    index: str | None = None
    clock: float = 0.0


def open_on_nodes(assignment: Assignment, topology: Topology, comm: Comm, emit: Emit) -> RunContext:
    """Open data and run folder on this rank and compare them with rank 0's; every rank calls it.

    Args:
        assignment: The task.
        topology: Rank, world size and device.
        comm: The collectives of all ranks.
        emit: Receives progress events; called on rank 0 only.

    Raises:
        DmlDistError: If a rank cannot open them, or another node has other ones; on every rank.
    """
    folder = RunFolder(Path(assignment.run_dir))
    view = _View(topology.node)
    error: DmlDistError | None = None
    context: RunContext | None = None
    try:
        view = replace(view, run=_run_of(folder, writes=assignment.kind == "train"))
        context = open_context(assignment.config, topology, comm, emit)
        view = replace(view, index=_digest(context.index.root / INDEX_NAME))
    except DmlDistError as caught:
        error = caught
    comm.barrier(what="start of all nodes")
    view = replace(view, clock=time.time())
    views = comm.gather_objects(view, what="data and run folders of all nodes")
    if error is not None and _may_be_elsewhere(assignment, views):
        error = type(error)(f"on the node {topology.node}: {error}")
    if error is None:
        error = _difference(view, views[0], folder, assignment.config.data.path)
    comm.agree(error, what="data and run folders of all nodes")
    assert context is not None
    if topology.is_main and (text := _clocks(views)) is not None:
        emit(note(text))
    return context


def _run_of(folder: RunFolder, *, writes: bool) -> tuple[str, str]:
    """Return what tells the run in the folder from others.

    Not the whole of run.json: a network file system may show an older content for some seconds.
    """
    try:
        info = folder.info()
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(
            f"{folder.info_path} does not exist. All nodes need the run's folder at the same "
            "path: mount the file system that holds it, or give another --run-dir"
        ) from None
    if writes and not os.access(folder.checkpoints, os.W_OK):
        raise ConfigError(
            f"{folder.checkpoints} cannot be written. All ranks write checkpoints: mount the file "
            "system for writing, or give another --run-dir"
        )
    return info.created, info.name


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(
    own: _View, main: _View, folder: RunFolder, data_path: str
) -> ConfigError | DataError | None:
    """Return the error of a node that has another run or another data set than rank 0's."""
    if None not in (own.run, main.run) and own.run != main.run:
        return ConfigError(
            f"{folder.path} holds one run on the node {own.node} and another one on {main.node}. "
            "Mount the same file system at this path on all nodes"
        )
    if None not in (own.index, main.index) and own.index != main.index:
        return DataError(
            f"{INDEX_NAME} of {shown_url(data_path)} on the node {own.node} differs from the one "
            f"on {main.node}. Copy the data set again, or mount the same file system on all nodes"
        )
    return None


def _may_be_elsewhere(assignment: Assignment, views: list[_View]) -> bool:
    """Whether a user needs the name of a node to find it."""
    return assignment.config.launch.address is not None or len({view.node for view in views}) > 1


def _clocks(views: list[_View]) -> str | None:
    """Return a warning of the clock that differs most from rank 0's, if it differs by much."""
    main = views[0]
    worst = max(views, key=lambda view: abs(view.clock - main.clock))
    seconds = worst.clock - main.clock
    if abs(seconds) < _SECONDS_OF_CLOCKS:
        return None
    return (
        f"warning: the clock of {worst.node} is {abs(seconds):,.0f} s "
        f"{'ahead of' if seconds > 0 else 'behind'} that of {main.node}; synchronise them: times "
        "in run.json and the records are those of rank 0's node, which may change in a restart"
    )
