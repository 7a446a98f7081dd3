"""In folders of many users nothing of others is followed, changed or trusted."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from dml_dist.config.data import CacheConfig
from dml_dist.data.cache import ShardCache
from dml_dist.data.index import INDEX_NAME
from dml_dist.data.remote_shards import open_index
from dml_dist.data.write_shards import import_dataset
from dml_dist.errors import ConfigError, RunError
from dml_dist.files import lock_file, make_own_folder, open_own
from tests.oracles_data import noise_importer
from tests.unit.flaky_server import flaky_server

SECRET = b"keep me"


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    """A file of ours that others point at."""
    path = tmp_path / "precious"
    path.write_bytes(SECRET)
    return path


def link(place: Path, target: Path) -> None:
    place.symlink_to(target)


def second_name(place: Path, target: Path) -> None:
    place.hardlink_to(target)


def pipe(place: Path, target: Path) -> None:
    os.mkfifo(place)


def lease(cache: ShardCache) -> Path:
    path = cache.folder / "data" / "a.tar"
    cache.lease(path, lambda: 4, lambda target: target.write(b"abcd"))
    return path


@pytest.mark.parametrize("plant", [link, second_name, pipe])
@pytest.mark.parametrize("name", [".lock", "data/.a.tar.part", ".leases/other-host-1-2"])
def test_a_planted_file_is_refused_and_its_target_kept(
    tmp_path: Path, precious: Path, plant: Callable[[Path, Path], None], name: str
) -> None:
    folder = tmp_path / "cache"
    (folder / "data").mkdir(parents=True)
    (folder / ".leases").mkdir()
    plant(folder / name, precious)
    with pytest.raises((ConfigError, RunError, OSError), match=r"it is (a link|no file)"):
        lease(ShardCache(folder, 100))
    assert precious.read_bytes() == SECRET


def test_a_link_in_place_of_a_shard_is_copied_over(tmp_path: Path, precious: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 100)
    make_own_folder(cache.folder / "data")
    (cache.folder / "data" / "a.tar").symlink_to(precious)
    assert lease(cache).read_bytes() == b"abcd"
    assert precious.read_bytes() == SECRET


def test_folders_are_made_for_their_owner_alone(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "new" / "cache", 100)
    path = lease(cache)
    for made in (cache.folder, cache.folder / ".leases", path.parent):
        assert stat.S_IMODE(made.stat().st_mode) == 0o700
    cache.folder.chmod(0o777)  # as an earlier version or a wide umask left it
    ShardCache(cache.folder, 100)
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o755


def test_folders_and_files_of_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    ShardCache(tmp_path / "link", 100)  # of our own
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    for name in ("cache", "link"):
        with pytest.raises(ConfigError, match=r"it belongs to the user .*of your own"):
            ShardCache(tmp_path / name, 100)
    with pytest.raises(PermissionError, match="it belongs to the user"):
        open_own(tmp_path / "file")


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a link away")
def test_a_folder_of_a_data_set_that_others_linked_is_refused(tmp_path: Path) -> None:
    import_dataset(noise_importer(), tmp_path / "shards", samples_per_shard=8, processes=1)
    config = CacheConfig(folder=str(tmp_path / "cache"))
    with flaky_server(tmp_path / "shards") as server:
        root = open_index(server.url, config).root
        elsewhere = root.rename(tmp_path / "elsewhere")
        before = (elsewhere / INDEX_NAME).stat().st_mtime_ns
        root.symlink_to(elsewhere)
        os.chown(root, 12345, -1, follow_symlinks=False)
        with pytest.raises(ConfigError, match="it belongs to the user 12345"):
            open_index(server.url, config)
    assert (elsewhere / INDEX_NAME).stat().st_mtime_ns == before


@pytest.mark.parametrize("name", [".lock", ".writer"])
def test_locks_of_runs_follow_no_link(tmp_path: Path, precious: Path, name: str) -> None:
    (tmp_path / name).symlink_to(precious)
    with pytest.raises(PermissionError, match="it is a link"), lock_file(tmp_path / name):
        pass
    assert precious.read_bytes() == SECRET
