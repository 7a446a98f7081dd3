"""The cache of remote tar shards: bounded, shared by processes, never emptied under a reader."""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import pickle
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from dml_dist.data import cache as cache_module
from dml_dist.data.cache import ShardCache, part_path
from dml_dist.errors import ConfigError, RunError

FORK = mp.get_context("fork")
SIZE = 1000


class Copies:
    """Writes a file's content and counts how often."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.count = 0
        self.seconds = seconds

    def __call__(self, target: BinaryIO) -> None:
        self.count += 1
        target.write(bytes(SIZE // 2))
        time.sleep(self.seconds)
        target.write(bytes(SIZE // 2))


def lease(cache: ShardCache, name: str, copy: Callable[[BinaryIO], None] | None = None) -> Path:
    path = cache.folder / "data" / name
    cache.lease(path, lambda: SIZE, copy or Copies())
    return path


def names(cache: ShardCache) -> list[str]:
    return sorted(path.name for path in (cache.folder / "data").iterdir())


def in_child(function: Callable[[], Any]) -> mp.process.BaseProcess:
    process = FORK.Process(target=function)
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_is_copied_once_and_whole(tmp_path: Path) -> None:
    cache, copy = ShardCache(tmp_path / "cache", 10 * SIZE), Copies()
    for _ in range(2):
        path = lease(cache, "a", copy)
        cache.release(path)
    assert copy.count == 1
    assert path.read_bytes() == bytes(SIZE)
    assert names(cache) == ["a"]


def test_the_file_not_used_for_longest_goes_first_and_leased_ones_stay(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE, wait_seconds=0.2)
    a, b, c = (lease(cache, name) for name in "abc")
    for path in (b, c, a):
        cache.release(path)
        time.sleep(0.01)
    lease(cache, "d")
    assert names(cache) == ["a", "c", "d"]
    lease(cache, "a")
    lease(cache, "e")
    assert names(cache) == ["a", "d", "e"]
    with pytest.raises(RunError, match=r"f .*already in use; .*raise data.cache.max_gb"):
        lease(cache, "f")
    assert names(cache) == ["a", "d", "e"]


def test_leases_of_other_processes_hold_until_they_end(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE, wait_seconds=0.3)

    def hold() -> None:
        lease(cache, "theirs")
        time.sleep(60)

    process = in_child(hold)
    wait_for(lambda: (tmp_path / "data" / "theirs").exists())
    mine = lease(cache, "a")
    cache.release(mine)
    mine = lease(cache, "b")
    assert names(cache) == ["b", "theirs"]
    # The other process leases one of two places, this one the other.
    start = time.monotonic()
    with pytest.raises(RunError, match=r"already in use|was not available"):
        lease(cache, "c")
    assert time.monotonic() - start < 3
    cache.release(mine)
    lease(cache, "c")
    assert names(cache) == ["c", "theirs"]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lease(cache, "d")
    assert names(cache) == ["c", "d"]
    assert len(list((tmp_path / ".leases").iterdir())) == 1


def test_interrupted_copy_is_repeated(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    process = in_child(lambda: lease(cache, "a", Copies(60)))
    part = part_path(tmp_path / "data" / "a")
    # Its room is kept from the start.
    wait_for(lambda: part.exists() and part.stat().st_size == SIZE)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert part.exists()
    lease(cache, "a")
    assert names(cache) == ["a"]
    process = in_child(lambda: lease(cache, "b", Copies(60)))
    wait_for(part_path(tmp_path / "data" / "b").exists)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    lease(cache, "c")
    assert names(cache) == ["a", "c"]


def test_processes_and_threads_that_want_one_file_copy_it_once(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10 * SIZE)
    log = tmp_path / "log"

    def copy(target: BinaryIO) -> None:
        with open(log, "a") as file:
            file.write("x")
        Copies(0.2)(target)

    def both() -> None:
        threads = [threading.Thread(target=lease, args=(cache, "a", copy)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os._exit(0 if (cache.folder / "data" / "a").read_bytes() == bytes(SIZE) else 1)

    processes = [in_child(both) for _ in range(3)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert log.read_text() == "x"


def test_the_cache_stays_within_its_limit_while_many_copy(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 3 * SIZE)
    largest, stop = 0, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not stop.is_set():
            with cache._locked():  # Without it a part could be taken for one that was left behind.
                files = [status.st_size for status in cache._files().values()]
            largest = max(largest, sum(files))
            time.sleep(0.002)  # The others want the lock, too.

    def work(first: int) -> None:
        for number in range(first, first + 8):
            path = lease(cache, f"{number % 10}", Copies(0.005))
            assert path.stat().st_size == SIZE
            cache.release(path)

    processes = [in_child(lambda first=first: work(first)) for first in (0, 3, 6)]  # type: ignore[misc]
    watcher = threading.Thread(target=watch)  # After the forks: a child would inherit its lock.
    watcher.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    stop.set()
    watcher.join()
    assert 0 < largest <= 3 * SIZE


def test_a_failed_copy_leaves_nothing(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)

    def fail(target: BinaryIO) -> None:
        target.write(b"half")
        raise RunError("lost")

    for _ in range(2):
        with pytest.raises(RunError, match="lost"):
            lease(cache, "a", fail)
    assert names(cache) == []
    assert list((tmp_path / ".leases").iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    usage = shutil.disk_usage(tmp_path)._replace(free=SIZE // 2)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(RunError, match=r"the disk of .* free, .*another data.cache.folder"):
        lease(cache, "a")
    monkeypatch.undo()

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.os, "fsync", fail)
    with pytest.raises(RunError, match=r"a cannot be written: No space left.*free some space"):
        lease(cache, "a")
    assert names(cache) == []


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError,
        match=r"data.cache.folder .* cannot be written and locked .*; choose another folder",
    ):
        ShardCache(tmp_path / "file" / "cache", SIZE)


def test_a_pickled_cache_leases_for_itself(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE)
    lease(cache, "a")
    other = pickle.loads(pickle.dumps(cache))
    lease(other, "a")
    assert len(list((tmp_path / ".leases").iterdir())) == 2
