from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dml_dist.data.build_index import build_index
from dml_dist.data.index import INDEX_NAME, Index, read_index, write_index
from dml_dist.data.verify import VerifyReport, verify
from dml_dist.data.write_shards import import_dataset
from dml_dist.errors import DataError
from tests.oracles_data import encoded_image, flip_byte, noise_importer, write_tar


@pytest.fixture
def index(tmp_path: Path) -> Index:
    return import_dataset(noise_importer(), tmp_path, samples_per_shard=8, processes=1)


def check(root: Path) -> VerifyReport:
    return verify(root, processes=1)


def only_problem(root: Path, pattern: str) -> None:
    problems = check(root).problems
    assert len(problems) == 1, problems
    assert re.search(pattern, problems[0]), problems


def test_whole_shards(index: Index) -> None:
    reports: list[tuple[int, int]] = []
    report = verify(index.root, lambda *at: reports.append(at), processes=2)
    assert report == VerifyReport([], 40, int(index.length.sum()), [])
    assert reports[-1] == (40, 40)
    assert len(reports) == 5


@pytest.mark.parametrize("row", [0, 13, 39])
def test_flipped_byte_names_file_and_key(index: Index, row: int) -> None:
    name = index.tar_shards[index.tar_shard[row]]
    flip_byte(index.root / name, int(index.offset[row] + index.length[row] // 2))
    expected = f"{int(index.crc32[row]):#010x}"
    only_problem(index.root, f"^{name}: key '{index.keys[row]}': damaged.*expected {expected}$")


def test_flipped_byte_in_a_label_or_header_is_found(index: Index) -> None:
    name = index.tar_shards[0]
    data = (index.root / name).read_bytes()
    at = data.index(b'"class": "c') + len(b'"class": "c')
    flip_byte(index.root / name, at)
    assert any(line.startswith(f"{name}: key ") for line in check(index.root).problems)
    flip_byte(index.root / name, at)
    assert check(index.root).problems == []
    # The header of the fifth image; images behind it are found by their offsets.
    flip_byte(index.root / name, int(index.offset[4]) - 512)
    only_problem(index.root, f"^{name}: truncated or damaged at byte {index.offset[4] - 512}")


@pytest.mark.parametrize("cut", [0.02, 0.3, 0.5])
def test_truncated_tar_is_named_once(index: Index, cut: float) -> None:
    name = index.tar_shards[1]
    path = index.root / name
    data = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(data[: int(cut * len(data))])
    rows = np.flatnonzero(index.tar_shard == 1)
    lost = rows[index.offset[rows] + index.length[rows] > int(cut * len(data))]
    assert len(lost)
    only_problem(
        index.root, f"^{name}: truncated: .*{len(lost)} images are lost.*{index.keys[lost[0]]}"
    )


def test_missing_and_strange_tar_shards(index: Index) -> None:
    first, last = index.tar_shards[0], index.tar_shards[-1]
    (index.root / last).rename(index.root / "zzz.tar")
    problems = check(index.root).problems
    assert problems == [
        f"{last}: the file is missing, with 8 images",
        f"zzz.tar: {INDEX_NAME} does not name this file",
    ]
    (index.root / "zzz.tar").rename(index.root / last)
    (index.root / first).chmod(0o644)
    (index.root / first).write_bytes(b"no tar file" * 5000)
    problems = check(index.root).problems
    assert problems[0].startswith(f"{first}: truncated or damaged")
    assert len(problems) == 9  # and each of its images


def test_index_of_other_shards(index: Index, tmp_path: Path) -> None:
    other = import_dataset(
        noise_importer(), tmp_path / "other", seed=1, samples_per_shard=8, processes=1
    )
    for name in index.tar_shards:
        (other.root / name).replace(index.root / name)
    (other.root / INDEX_NAME).unlink()
    problems = check(index.root).problems
    assert len(problems) > 30
    assert all(re.match(r"(test|train)-00000\d.tar: key 'n/00\d\d': ", line) for line in problems)


def test_rows_that_differ_from_the_shards(index: Index) -> None:
    def with_row(name: str, row: int, value: object) -> None:
        column = getattr(index, name).copy()
        column[row] = value
        write_index(dataclasses.replace(index, **{name: column}))

    key, tar = index.keys[3], index.tar_shards[0]
    with_row("offset", 3, index.offset[3] + 1)
    problems = check(index.root).problems
    assert len(problems) == 2
    assert re.search(f"{tar}: key '{key}': no image begins at byte", problems[0])
    assert re.search(f"{tar}: .* lacks 1 images, the first is key '{key}'", problems[1])
    with_row("length", 3, index.length[3] - 1)
    only_problem(index.root, f"^{tar}: key '{key}': .* says {index.length[3] - 1} bytes")
    with_row("label", 3, (index.label[3] + 1) % 5)
    only_problem(index.root, f"^{tar}: key '{key}': .* says class")
    with_row("split", 3, "val")
    only_problem(index.root, f"^{tar}: key '{key}': .* says split 'val', the tar file 'test'")
    with_row("keys", 3, "n/none")
    only_problem(index.root, f"^{tar}: key 'n/none': byte .* holds key '{key}'")
    table = pq.read_table(index.root / INDEX_NAME)
    pq.write_table(table.slice(1), index.root / INDEX_NAME)
    assert any("lacks 1 images" in line for line in check(index.root).problems)


def test_an_index_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match="create it with `dml-dist data index"):
        verify(tmp_path)


def test_shards_from_elsewhere(tmp_path: Path) -> None:
    members = []
    for at in range(6):
        members += [(f"k{at}.png", encoded_image(at)), (f"k{at}.cls", str(10 * (at % 2)).encode())]
    write_tar(tmp_path / "a.tar", members)
    build_index(tmp_path, processes=1)
    assert check(tmp_path).problems == []
    assert read_index(tmp_path).class_names == ("0", "10")


def test_a_name_in_an_older_spelling_is_no_problem(tmp_path: Path) -> None:
    facts = b'{"class": "cat ", "super_class": "", "split": "train"}'
    write_tar(tmp_path / "a.tar", [("a.png", encoded_image(0)), ("a.json", facts)])
    index = build_index(tmp_path, processes=1)
    for name, problems in (("cat ", 0), ("cat", 0), ("cats", 1)):
        write_index(dataclasses.replace(index, class_names=(name,)))
        assert len(check(tmp_path).problems) == problems
