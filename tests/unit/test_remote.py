"""Tar shards behind a URL: the batches of a local run, despite server faults."""

from __future__ import annotations

import dataclasses
import io
import logging
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from dml_dist.config.data import CacheConfig, GlyphsConfig
from dml_dist.config.load import parse_config
from dml_dist.data.index import INDEX_NAME, Index, write_index
from dml_dist.data.loader import evaluation_loader
from dml_dist.data.plans import ShuffledPlan
from dml_dist.data.reader import ShardReader
from dml_dist.data.remote import RemoteFolder
from dml_dist.data.remote_shards import RemoteShards, open_index
from dml_dist.data.verify import verify
from dml_dist.errors import ConfigError, DataError, RunError
from dml_dist.parallel.comm import Comm
from dml_dist.report.dataset import show_dataset
from dml_dist.runtime import datasets
from dml_dist.runtime.fetch import fetch_before_training, require_cache_room
from dml_dist.topology import Topology
from tests.ranks import run_ranks
from tests.unit.flaky_server import FlakyServer, flaky_server
from tests.unit.test_loader import BALANCED, SHUFFLED, STANDARD, assert_same, load, plan_of
from tests.unit.tiny_shards import make_index

NUM_SHARDS = 8


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Index:
    index = make_index(tmp_path_factory.mktemp("source") / "shards", per_tar_shard=5)
    write_index(index)
    return index


@pytest.fixture
def server(local: Index) -> Iterator[FlakyServer]:
    with flaky_server(local.root) as running:
        yield running


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RemoteFolder, "longest_wait_seconds", 0.02)
    defaults = RemoteFolder.__init__.__defaults__
    assert defaults is not None
    monkeypatch.setattr(RemoteFolder.__init__, "__defaults__", (*defaults[:-1], 0.02))


def cache(folder: Path, **changes: Any) -> CacheConfig:
    return CacheConfig(folder=str(folder), **{"timeout_seconds": 0.5, "retries": 5, **changes})


def sizes(index: Index) -> list[int]:
    return [(index.root / name).stat().st_size for name in index.tar_shards]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_local_run(
    local: Index, server: FlakyServer, tmp_path: Path, workers: int
) -> None:
    for config in (SHUFFLED, BALANCED):
        index = open_index(server.url, cache(tmp_path / config.name))
        for rank in range(2):
            assert_same(
                load(index, config=config, rank=rank, world_size=2, workers=workers),
                load(local, config=config, rank=rank, world_size=2),
            )
        rows = local.rows("test")
        options: dict[str, Any] = {"batch_size": 3, "topology": Topology(), "prefetch": 2}
        assert_same(
            evaluation_loader(index, rows, STANDARD, workers=workers, **options),
            evaluation_loader(local, rows, STANDARD, workers=0, **options),
        )
    assert {server.gets[name] for name in local.tar_shards} == {2}  # Once for each cache.
    assert list((tmp_path / "shuffled" / ".leases").iterdir()) == []


def test_any_fsspec_file_system_is_supported(local: Index, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(local.root), "/some/shards", recursive=True)
    try:
        index = open_index("memory://some/shards/", cache(tmp_path / "cache"))
        assert_same(load(index), load(local))
        assert_same(load(open_index(local.root.as_uri(), cache(tmp_path / "unused"))), load(local))
        assert not (tmp_path / "unused").exists()
        (tmp_path / "cache" / index.root / index.tar_shards[0]).unlink()
        reader = ShardReader(index)
        assert reader.read(3) == ShardReader(local).read(3)
    finally:
        memory.rm("/some", recursive=True)


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_transient_download_faults_are_retried_and_reported(
    local: Index, tmp_path: Path, caplog: pytest.LogCaptureFixture, ranges: bool, workers: int
) -> None:
    with flaky_server(local.root, ranges=ranges) as server:
        # Garbage early, for a whole file: the answer to a refused range is never looked at.
        server.faults = ["status", "garbage", "drop", "short", "slow", "silent", "drop", "slow"]
        index = open_index(server.url, cache(tmp_path))
        with caplog.at_level(logging.WARNING):
            assert_same(load(index, workers=workers), load(local))
        assert server.faults == []
    told = [record.getMessage() for record in caplog.records]
    # "slow" is no fault, and where the server gives parts a short one is no fault either.
    assert len(told) >= 5
    assert all(line.startswith(f"{server.url}/train-00") for line in told)
    assert all("; attempt " in line for line in told)
    assert any("the server answered 503" in line for line in told)
    assert any("does not have the crc32" in line for line in told)
    assert [path.name for path in index.root.iterdir() if path.name.startswith(".")] == []


def test_interrupted_download_resumes_at_its_offset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dml_dist.data.remote.BLOCK_BYTES", 1000)
    data = np.random.default_rng(0).bytes(5500)
    (tmp_path / "a.tar").write_bytes(data)
    for ranges, requests in ((True, 8), (False, None)):
        with flaky_server(tmp_path, ranges=ranges) as server:
            server.faults = ["", "", "status", "drop", "short"]
            folder = RemoteFolder(server.url, timeout_seconds=1.0)
            with open(tmp_path / "copy", "w+b") as target:
                folder.copy("a.tar", target, size=folder.size("a.tar"))
            assert (tmp_path / "copy").read_bytes() == data
            assert requests is None or server.gets["a.tar"] == requests


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("fault", ["status", "drop", "silent"])
def test_a_server_that_never_recovers_ends_the_run_in_time(
    server: FlakyServer, tmp_path: Path, workers: int, fault: str
) -> None:
    index = open_index(server.url, cache(tmp_path, retries=1, timeout_seconds=0.2))
    server.always = fault
    start = time.monotonic()
    with pytest.raises(
        RunError, match=r"train-00\d.tar could not be copied in 2 attempts.*run the com"
    ):
        list(load(index, workers=workers))
    assert time.monotonic() - start < 10
    assert list((tmp_path / ".leases").iterdir()) == []
    server.always = None
    assert len(list(load(index, workers=workers))) == 8


def test_unreachable_server_is_named(tmp_path: Path) -> None:
    with (
        flaky_server(tmp_path) as server,
        pytest.raises(
            DataError, match=rf"{server.url}/{INDEX_NAME} cannot be read: .*answered 404"
        ),
    ):
        open_index(server.url, cache(tmp_path / "cache"))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/shards"
    with pytest.raises(RunError, match=rf"{url}/{INDEX_NAME} could not be copied in 2 attempts"):
        open_index(url, cache(tmp_path / "cache", retries=1))


def test_a_missing_tar_shard_is_named_at_once(server: FlakyServer, tmp_path: Path) -> None:
    made = make_index(tmp_path / "made", per_tar_shard=5)
    write_index(made)
    (made.root / "train-003.tar").unlink()
    server.folder = made.root
    index = open_index(server.url, cache(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"train-003.tar cannot be read: .*answered 404"):
        list(load(index))
    assert server.gets["train-003.tar"] <= 1


def test_replaced_tar_shards_are_not_mixed_up(
    local: Index, server: FlakyServer, tmp_path: Path
) -> None:
    first = open_index(server.url, cache(tmp_path / "cache"))
    list(load(first))
    other = make_index(tmp_path / "other", per_tar_shard=5, seed=1)
    # The folder behind the URL is another one, its index still the old one.
    write_index(dataclasses.replace(local, root=other.root))
    server.folder = other.root
    shutil.rmtree(first.root)
    stale = open_index(server.url, cache(tmp_path / "cache"))
    assert stale.root == first.root
    with pytest.raises(DataError, match=r"(copied twice|needs \d+ bytes)"):
        list(load(stale))
    # With its own index the same URL gives the new images.
    write_index(other)
    second = open_index(server.url, cache(tmp_path / "cache"))
    assert second.root != first.root
    assert_same(load(second), load(other))


def test_a_small_cache_is_never_exceeded(local: Index, server: FlakyServer, tmp_path: Path) -> None:
    config = SHUFFLED.model_copy(update={"window": 1})
    limit = int(3.5 * max(sizes(local)))
    index = open_index(server.url, cache(tmp_path, max_gb=limit / 1e9))
    shards = index.remote
    assert isinstance(shards, RemoteShards)
    used = []
    for expected, batch in zip(load(local, config=config), load(index, config=config), strict=True):
        assert_same([batch], [expected])
        with shards.cache._locked():  # The prefetch of later batches copies and removes files.
            files = [
                path.stat().st_size for path in index.root.iterdir() if path.name != INDEX_NAME
            ]
        used.append(sum(files))
    assert max(used) <= limit
    assert server.gets.total() > NUM_SHARDS + 1  # Some had to go, and came again.


def run_config(plan: str, **data: Any) -> Any:
    batches = {"name": plan, "window": 1} if plan == "shuffled" else dict(BALANCED)
    return parse_config(
        {
            "name": "x",
            "data": {"path": "http://x", "batches": batches, "loader_workers": 0, **data},
            "model": {"backbone": {"name": "conv4"}},
            "train": {"global_batch_size": 8, "steps": 8},
        }
    )


def test_a_cache_too_small_for_the_plan_is_refused_with_the_sizes(
    local: Index, server: FlakyServer, tmp_path: Path
) -> None:
    limit = 3.5 * max(sizes(local)) / 1e9
    index = open_index(server.url, cache(tmp_path, max_gb=limit))
    with pytest.raises(DataError, match=r"batches balanced needs 8 tar shards .*max_gb is .*raise"):
        require_cache_room(index, plan_of(index, BALANCED), run_config("balanced"))
    narrow = plan_of(index, SHUFFLED.model_copy(update={"window": 1}))
    require_cache_room(index, narrow, run_config("shuffled"))
    wide = plan_of(index, SHUFFLED.model_copy(update={"window": 5}))
    with pytest.raises(DataError, match=r"window 5 with 1 batches in flight needs 8 tar shards"):
        require_cache_room(index, wide, run_config("shuffled"))
    require_cache_room(local, plan_of(local, BALANCED), run_config("balanced"))
    assert {server.gets[name] for name in local.tar_shards} == {0}
    # A plan that was not checked ends when it cannot continue.
    with pytest.raises(RunError, match=r"already in use; .* raise data.cache.max_gb"):
        list(load(index, config=BALANCED))


def test_a_remote_set_is_shown_from_a_few_tar_shards(
    local: Index, server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    output = io.StringIO()
    picture = show_dataset(server.url + "?token=secret", Console(file=output, width=120))
    assert picture.name == f"{server.url.rstrip('/').rpartition('/')[2] or 'data'}-show.png"
    with Image.open(picture) as image:
        assert image.width >= 1000
    copied = [name for name in local.tar_shards if server.gets[name]]
    assert 1 <= len(copied) <= 3 * len(set(local.split.tolist())) < NUM_SHARDS
    assert f"{len(local):,} images" in output.getvalue()
    assert "secret" not in output.getvalue()


def fetch_on_rank(topology: Topology, url: str, folder: str) -> list[str]:
    index = open_index(url, cache(Path(folder)))
    events: list[str] = []
    comm = Comm.from_default_group(topology)
    plan = plan_of(index, BALANCED)
    fetch_before_training(
        index, plan, comm, lambda event: events.append(f"{event['done']}/{event['total']}")
    )
    assert all(index.remote.has(shard) for shard in range(NUM_SHARDS))  # type: ignore[union-attr]
    list(load(index, config=BALANCED, rank=topology.rank, world_size=2, workers=1))
    return events


def test_ranks_share_one_download_before_step_1(server: FlakyServer, tmp_path: Path) -> None:
    server.always = "slow"
    events = run_ranks(fetch_on_rank, 2, server.url, str(tmp_path))
    assert {events[rank][-1] for rank in range(2)} == {"8/8"}
    assert {name: server.gets[name] for name in server.gets if name != INDEX_NAME} == {
        f"train-00{number}.tar": 1 for number in range(NUM_SHARDS)
    }


def test_the_next_window_comes_in_the_background(
    local: Index, server: FlakyServer, tmp_path: Path
) -> None:
    index = open_index(server.url, cache(tmp_path))
    config = SHUFFLED.model_copy(update={"window": 2})
    plan = plan_of(local, config)
    assert isinstance(plan, ShuffledPlan)
    batches = iter(load(index, config=config))
    first = next(batches)
    used = set(local.tar_shard[first.rows].tolist())
    deadline = time.monotonic() + 5
    while sum(server.gets[name] for name in local.tar_shards) < len(used) + 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    batches.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["../x.tar", "/etc/x.tar", "a/../../x.tar", ".x.tar"])
def test_names_that_leave_the_cache_are_refused(
    local: Index, server: FlakyServer, tmp_path: Path, name: str
) -> None:
    server.folder = tmp_path / "shards"
    server.folder.mkdir()
    table = pq.read_table(local.root / INDEX_NAME)
    names = pa.array([name] * len(table))
    at = table.column_names.index("tar_shard")
    pq.write_table(table.set_column(at, "tar_shard", names), server.folder / INDEX_NAME)
    with pytest.raises(DataError, match=r"names the tar shard .*not a path below"):
        open_index(server.url, cache(tmp_path / "cache"))


def test_a_damaged_index_is_named_by_its_url(server: FlakyServer, tmp_path: Path) -> None:
    server.folder = tmp_path
    (tmp_path / INDEX_NAME).write_bytes(b"no parquet")
    with pytest.raises(DataError, match=rf"{server.url}/{INDEX_NAME} cannot be used.*parquet"):
        open_index(server.url, cache(tmp_path / "cache"))


def test_protocols_without_their_library_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)  # As if it were not installed.
    with pytest.raises(ConfigError, match=r"s3 needs a library.*pip install s3fs"):
        open_index("s3://bucket/shards", cache(tmp_path))
    with pytest.raises(ConfigError, match=r"is not a folder or a URL that fsspec can open"):
        open_index("nonsense://bucket/shards", cache(tmp_path))


def test_secrets_of_a_url_stay_out_of_messages(server: FlakyServer, tmp_path: Path) -> None:
    index = open_index(f"{server.url}?signature=qwerty", cache(tmp_path))
    assert index.remote is not None
    server.folder = tmp_path
    with pytest.raises(DataError, match=r"train-000.tar\?\*\*\* cannot be read") as caught:
        ShardReader(index).read(0)
    assert "qwerty" not in str(caught.value)
    assert "qwerty" not in ShardReader(index).describe(0)


def test_a_data_set_is_not_imported_behind_a_url() -> None:
    with pytest.raises(ConfigError, match=r"imported into a folder of this machine, got the URL"):
        run_config("balanced", dataset={"name": "glyphs"})


def said(work: Callable[[Console], Any]) -> tuple[Any, str]:
    out = io.StringIO()
    return work(Console(file=out, width=400)), out.getvalue()


def test_verify_reads_every_tar_shard_of_a_url(
    local: Index, server: FlakyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "CacheConfig", lambda: cache(tmp_path / "cache", retries=1))
    # These tar shards hold no labels, of which a local verification complains as well.
    expected = verify(local.root, processes=1)
    server.faults = ["drop"]
    fine, text = said(lambda console: datasets.verify_folder(server.url, console))
    assert not fine
    assert text.count("problem: ") == len(expected.problems)
    assert all(f"problem: {problem}\n" in text for problem in expected.problems)
    assert f"40 samples, 0.1 MiB: {len(expected.problems)} problems: {server.url}" in text
    server.folder = tmp_path / "copy"
    shutil.copytree(local.root, server.folder)
    (server.folder / "train-002.tar").unlink()
    with open(server.folder / "train-004.tar", "ab") as file:
        file.write(bytes(512))
    text = said(lambda console: datasets.verify_folder(server.url, console))[1]
    assert "problem: train-002.tar: " in text
    assert "the server answered 404" in text
    assert "problem: train-004.tar: the server has" in text
    assert f"{len(expected.problems) + 2} problems" in text


def test_nothing_is_written_behind_a_url(server: FlakyServer) -> None:
    with pytest.raises(ConfigError, match=r"data index cannot write .* to the U"):
        said(lambda console: datasets.index_folder(server.url, "train", console))
    with pytest.raises(ConfigError, match=r"data import cannot write to the URL"):
        said(lambda console: datasets.import_to(GlyphsConfig(), Path("s3://bucket/x"), console))
