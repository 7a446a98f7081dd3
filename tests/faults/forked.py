"""Commands in processes forked from a server that has imported the project: fast, and killable.

A process can be killed at any step on the disk: an audit hook of the interpreter counts what it is
about to do to the files below a folder, and kills the process before the n-th.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forkserver
from tests.blank_figures import save_blank

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass(frozen=True)
class Ended:
    """How the processes of a command ended.

    Attributes:
        codes: Exit code of each rank; -9 where it was killed.
        output: What each rank printed.
        steps: What each rank did to the disk, one line each.
        seconds: From the start until the last one had ended.
    """

    codes: list[int]
    output: list[str]
    steps: list[list[str]]
    seconds: float


def forked(
    work: Callable[..., Any],
    *arguments: Any,
    folder: Path,
    world_size: int = 1,
    kill: tuple[int, int] | None = None,
    below: Path | None = None,
    timeout: float = 120.0,
) -> Ended:
    """Run `work(*arguments)` on ranks, one process each, until they have ended.

    Args:
        work: A module-level function.
        arguments: Picklable arguments.
        folder: Working folder of the processes.
        world_size: Number of ranks; above 1 they find the variables that torchrun sets.
        kill: Rank and number of the step on the disk, from 1, before which it is killed.
        below: Folder whose steps are counted; `folder` by default.
        timeout: Seconds after which processes that live are a failure: nothing may hang.
    """
    places: list[dict[str, str]] = [{}]
    if world_size > 1:
        port = _free_port()
        places = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
            }
            for rank in range(world_size)
        ]
    forkserver.start()
    out = folder / "forked"
    out.mkdir(exist_ok=True)
    start = time.monotonic()
    processes = []
    for rank, place in enumerate(places):
        number = kill[1] if kill is not None and kill[0] == rank else 0
        files = (str(out / f"output-{rank}"), str(out / f"steps-{rank}"))
        processes.append(
            forkserver.CONTEXT.Process(
                target=_entry,
                args=(work, arguments, str(folder), place, str(below or folder), number, files),
            )
        )
        processes[-1].start()
    deadline = start + timeout
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    output = [(out / f"output-{rank}").read_text() for rank in range(world_size)]
    assert not late, f"ranks {late} had not ended after {timeout} s: {output}"
    return Ended(
        [int(process.exitcode or 0) for process in processes],
        output,
        [(out / f"steps-{rank}").read_text().splitlines() for rank in range(world_size)],
        time.monotonic() - start,
    )


def command(*arguments: str) -> None:
    """Run the command line, with blank figures; a `work` of `forked`."""
    from matplotlib.figure import Figure

    from dml_dist.cli import main

    Figure.savefig = save_blank
    sys.argv = ["dml-dist", *arguments]
    main()


def command_with(prepare: Callable[[], None], *arguments: str) -> None:
    """Change something in this process, then run the command line."""
    prepare()
    command(*arguments)


def _entry(
    work: Callable[..., Any],
    arguments: Sequence[Any],
    folder: str,
    place: dict[str, str],
    below: str,
    kill_at: int,
    files: tuple[str, str],
) -> None:
    import torch

    output = os.open(files[0], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(place)
    os.chdir(folder)
    torch.set_num_threads(1)
    forkserver.raise_warnings()
    steps = os.open(files[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    _count_steps(below, steps, kill_at)
    work(*arguments)


def _count_steps(below: str, steps: int, kill_at: int) -> None:
    """Note every step on the disk below a folder, and die before number `kill_at`."""
    count = 0

    def hook(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        match event:
            case "open":
                path, relative = values[0], False
                if not isinstance(path, str | bytes) or not values[2] & _WRITES:
                    return
            case "os.rename" | "os.remove" | "os.mkdir" | "os.rmdir" | "os.truncate":
                path = values[0]
                relative = event in ("os.remove", "os.rmdir") and values[-1] != -1
            case _:
                return
        name = os.fsdecode(path)
        if not relative and not os.path.abspath(name).startswith(below):
            return
        count += 1
        os.write(steps, f"{event} {os.path.basename(name)}\n".encode())
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])
