"""Positioned reads: the right bytes, and damage that names its place."""

from __future__ import annotations

import dataclasses
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dml_dist.data.index import Index
from dml_dist.data.reader import ShardReader
from dml_dist.errors import DataError
from tests.unit.tiny_shards import make_index


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return make_index(tmp_path / "shards")


def members(index: Index) -> list[bytes]:
    """Return the bytes of all images as tarfile reads them."""
    images = []
    for name in index.tar_shards:
        with tarfile.open(index.root / name) as archive:
            images += [archive.extractfile(member).read() for member in archive]  # type: ignore[union-attr]
    return images


def test_every_row_reads_what_tarfile_reads(index: Index) -> None:
    reader = ShardReader(index, max_open_files=2)
    expected = members(index)
    for row in np.random.default_rng(0).permutation(2 * len(index)) % len(index):
        assert reader.read(row) == expected[row]


def open_files(folder: Path) -> int:
    """Number of files below a folder that this process has open; other threads open other files."""
    links = (os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith(str(folder)) for link in links if os.path.islink(link))


def test_few_files_stay_open_and_none_after_the_reader(index: Index) -> None:
    reader = ShardReader(index, max_open_files=2)
    assert open_files(index.root) == 0
    for row in (0, 10, 20, 30, 0):
        reader.read(row)
    assert open_files(index.root) == 2
    reader.close()
    assert open_files(index.root) == 0
    reader.read(0)
    assert open_files(index.root) == 1
    del reader
    assert open_files(index.root) == 0


def test_a_used_reader_is_pickled_without_its_files(index: Index) -> None:
    reader = ShardReader(index)
    data = reader.read(3)
    assert pickle.loads(pickle.dumps(reader)).read(3) == data


def test_a_flipped_byte_names_file_key_and_both_checksums(index: Index) -> None:
    path = index.root / index.tar_shards[1]
    with open(path, "r+b") as file:
        file.seek(int(index.offset[13]) + 5)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    reader = ShardReader(index)
    reader.read(12)
    with pytest.raises(DataError) as caught:
        reader.read(13)
    message = str(caught.value)
    assert f"sample 'image-13' of {path}" in message
    assert f"expected crc32 {index.crc32[13]:08x}" in message
    assert "found " in message
    assert "dml-dist data verify" in message


def test_a_truncated_tar_shard_is_named(index: Index) -> None:
    path = index.root / index.tar_shards[2]
    os.truncate(path, int(index.offset[29]) + 10)
    reader = ShardReader(index)
    reader.read(28)
    with pytest.raises(DataError, match=rf"image-29.*{path}.*{index.length[29]} bytes.*found 10"):
        reader.read(29)


def test_a_missing_tar_shard_is_named(index: Index) -> None:
    path = index.root / index.tar_shards[0]
    path.unlink()
    with pytest.raises(DataError, match=rf"image-0.*{path}.*No such file.*all 4 tar shards"):
        ShardReader(index).read(0)


def test_a_folder_in_place_of_a_tar_shard_is_named(index: Index) -> None:
    path = index.root / index.tar_shards[0]
    path.unlink()
    path.mkdir()
    with pytest.raises(DataError, match=rf"{path} cannot be read: Is a directory"):
        ShardReader(index).read(0)


def test_an_index_of_other_shards_is_noticed(index: Index) -> None:
    wrong = dataclasses.replace(index, offset=index.offset + 512)
    with pytest.raises(DataError, match="damaged"):
        ShardReader(wrong).read(0)
