"""Starting commands as processes of their own, and comparing what runs left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from dml_dist.runs.records import read_records
from dml_dist.train.checkpoint_files import checkpoint_folders, is_whole
from tests.e2e.conftest import REPOSITORY

T = TypeVar("T")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def act(config_file: Path, **options: Any) -> Path:
    """Write a copy of a configuration whose transform is `Act` with these options."""
    config = yaml.safe_load(config_file.read_text())
    config["data"]["transform"] = {
        "name": "custom",
        "target": "tests.faults.act:Act",
        "options": {name: _plain(value) for name, value in options.items()},
    }
    path = config_file.with_name("act.yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def part_of(points: Sequence[T]) -> list[T]:
    """All points where faults are injected, or with DML_DIST_FAULT_SHARE=K/N every N-th of them.

    So tests that take minutes can be run again and again: K = 1 .. N together inject at all.
    """
    number, _, of = os.environ.get("DML_DIST_FAULT_SHARE", "1/1").partition("/")
    return list(points[int(number) - 1 :: int(of)])


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@contextmanager
def started(*arguments: object, cwd: Path, name: str = "output") -> Iterator[subprocess.Popen[str]]:
    """A `dml-dist` command in a process of its own; its output goes to the file `name`."""
    with open(cwd / name, "w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dml_dist", *map(str, arguments)],
            cwd=cwd,
            env=ENVIRONMENT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_for(condition: Any, *, seconds: float, what: str) -> float:
    """Wait until `condition()` is true and return the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{what} did not come within {seconds} s"
        time.sleep(0.02)
    return time.monotonic() - start


def running(pid: int) -> bool:
    """Whether a process lives (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and those that they have."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (parent := parent_of(int(entry.name))) is not None:
            children.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    stack = [pid]
    while stack:
        new = children.get(stack.pop(), [])
        found.update(new)
        stack.extend(new)
    return found


def parent_of(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return None


def command_of(pid: int) -> str:
    """The name of a process's program, "" where it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint: network, optimiser and proxies."""
    folder = checkpoint_folders(run / "checkpoints")[0]
    tensors = {}
    for path in sorted(folder.glob("*.pt")):
        stack = [(path.name, torch.load(path, weights_only=True))]
        while stack:
            name, value = stack.pop()
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif isinstance(value, dict):
                stack.extend((f"{name}.{key}", item) for key, item in value.items())
            elif isinstance(value, list | tuple):
                stack.extend((f"{name}.{i}", item) for i, item in enumerate(value))
    return tensors


def attempts(run: Path) -> list[dict[str, Any]]:
    """The attempts in run.json."""
    found: list[dict[str, Any]] = json.loads((run / "run.json").read_text())["attempts"]
    return found


def assert_same_end(run: Path, whole: Path) -> None:
    """A run that met a fault ended as the uninterrupted one: weights, measures, records."""
    one, two = weights(run), weights(whole)
    assert one.keys() == two.keys()
    assert any("proxies" in name for name in two)
    assert [name for name in two if not torch.equal(one[name], two[name])] == []
    first, second = (json.loads((path / "metrics.json").read_text()) for path in (run, whole))
    assert first["trained"] == second["trained"]
    assert first["untrained"] == second["untrained"]
    assert samples(run) == samples(whole)
    assert evaluations(run) == evaluations(whole)
    assert (run / "report/index.html").exists()
    assert_nothing_left(run)


def samples(run: Path) -> list[tuple[int, int, float]]:
    """What the records count: steps, images seen until then, loss."""
    records = read_records(run / "records/steps.jsonl")
    assert len({record["step"] for record in records}) == len(records)
    return [(record["step"], record["samples_seen"], record["loss"]) for record in records]


def evaluations(run: Path) -> list[dict[str, Any]]:
    """What was measured, without the times."""
    records = read_records(run / "records/evaluations.jsonl")
    return [{k: v for k, v in r.items() if k not in ("time", "attempt")} for r in records]


def assert_nothing_left(run: Path) -> None:
    """No folder of Ray's, whole checkpoints, at most one hidden file of a killed writer."""
    left = [path.name for path in run.rglob("*.tmp")]
    assert len(left) <= 1
    assert all(re.fullmatch(r"\..+\.[0-9a-f]{12}\.tmp", name) for name in left)
    assert not (run / ".ray").exists()
    assert all(is_whole(folder) for folder in checkpoint_folders(run / "checkpoints"))
