"""Process pool for work on many tar shards; its processes end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from dml_dist.errors import RunError

T = TypeVar("T")
R = TypeVar("R")

# Imported once by the server that workers are forked from: webdataset imports torch, 2 s.
_PRELOAD = ["webdataset", "PIL.Image", "numpy", "dml_dist.data.sample"]


def run_tasks(
    function: Callable[[T], R], tasks: Sequence[T], processes: int | None = None
) -> Iterator[tuple[int, R]]:
    """Call `function(task)` for all tasks and yield (position, result) as they finish.

    Args:
        function: A module-level function.
        tasks: Picklable arguments.
        processes: Number of processes, at most one a task; 1 works in this process; None takes
            one for each CPU core that this process may use.

    Raises:
        RunError: If a process was killed.
        Exception: What `function` raised; tasks that have not begun are dropped then.
    """
    processes = min(processes or _num_cores(), len(tasks))
    if processes <= 1:
        for position, task in enumerate(tasks):
            yield position, function(task)
        return
    # Not fork: the caller may hold threads (torch, ray). Not spawn: it imports torch every time.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    executor = ProcessPoolExecutor(processes, mp_context=context, initializer=end_with_parent)
    try:
        futures = {executor.submit(function, task): at for at, task in enumerate(tasks)}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise RunError(
            "a process that worked on tar shards was killed (out of memory?) or could not start (a "
            "script needs `if __name__ == '__main__':`); run the same command again, finished tar "
            "shards are kept"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def end_with_parent() -> None:
    """End this process when its parent is gone, however it ended.

    A worker holds both ends of the pipe it waits on, so without this it would never notice that
    its parent was killed.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
