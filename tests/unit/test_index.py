from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dml_dist.data.build_index import build_index, class_sorted_warnings
from dml_dist.data.index import INDEX_NAME, Index, read_index, write_index
from dml_dist.data.verify import verify
from dml_dist.data.write_shards import import_dataset
from dml_dist.errors import DataError
from tests.oracles_data import encoded_image, flip_byte, noise_importer, write_tar


def assert_equal(one: Index, other: Index) -> None:
    for field in dataclasses.fields(Index):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            np.testing.assert_array_equal(left, right, err_msg=field.name)
        else:
            assert left == right, field.name


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    import_dataset(noise_importer(), tmp_path, samples_per_shard=8, processes=1)
    return tmp_path


def made(root: Path, *samples: tuple[str, Any, Any], tar: str = "a.tar", kind: str = "png") -> Path:
    """Write a tar shard of (key, .cls text or None, .json value or None)."""
    members = []
    for number, (key, label, facts) in enumerate(samples):
        members.append((f"{key}.{kind}", encoded_image(number, {"jpg": "jpeg"}.get(kind, kind))))
        if label is not None:
            members.append((f"{key}.cls", label if isinstance(label, bytes) else label.encode()))
        if facts is not None:
            members.append((f"{key}.json", json.dumps(facts).encode()))
    write_tar(root / tar, members)
    return root


def test_types_and_round_trip(shards: Path) -> None:
    index = read_index(shards)
    types = {
        "tar_shard": np.int32,
        "offset": np.int64,
        "length": np.int64,
        "crc32": np.uint32,
        "width": np.int32,
        "height": np.int32,
        "label": np.int64,
    }
    for name, kind in types.items():
        assert getattr(index, name).dtype == kind
    for name in ("keys", "extension", "super_class", "split", "role"):
        assert getattr(index, name).dtype == object
        assert isinstance(getattr(index, name)[0], str)
    assert index.class_names == ("c0", "c1", "c2", "c3", "c4")
    write_index(index)
    assert_equal(read_index(shards), index)
    assert pq.read_schema(shards / INDEX_NAME).names == [
        "key", "tar_shard", "offset", "length", "crc32", "extension", "width", "height", "label",
        "class", "super_class", "split", "role",
    ]  # fmt: skip


def test_rows_of_a_split(shards: Path) -> None:
    index = read_index(shards)
    train, test = index.rows("train"), index.rows("test")
    assert train.dtype == np.int64
    assert (np.diff(train) > 0).all()
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(index)))
    assert set(index.label[train].tolist()) == {0, 2, 4}
    with pytest.raises(DataError, match=r"no image .* split 'val'; it has the splits test, train"):
        index.rows("val")


def test_indexing_the_shards_of_an_import_gives_its_index(shards: Path) -> None:
    index = read_index(shards)
    (shards / INDEX_NAME).unlink()
    reports: list[tuple[str, int, int]] = []
    assert_equal(build_index(shards, progress=lambda *at: reports.append(at), processes=1), index)
    assert_equal(read_index(shards), index)
    labels = [("read labels", at, 5) for at in range(1, 6)]
    assert reports == labels + [("decode images", 8 * at, 40) for at in range(1, 6)]


def test_numbers_keep_their_order_and_become_dense(tmp_path: Path) -> None:
    made(tmp_path, ("n/1", "10\n", None), ("n/2", "9", None), tar="x/one.tar", kind="jpg")
    made(tmp_path, ("n/3", None, {"label": 200}), ("n/4", None, 9), tar="x/two.tar")
    index = build_index(tmp_path, "val", processes=1)
    assert index.tar_shards == ("x/one.tar", "x/two.tar")
    assert index.class_names == ("9", "10", "200")
    assert index.label.tolist() == [1, 0, 2, 0]
    assert set(index.split) == {"val"}
    assert index.extension.tolist() == ["jpg", "jpg", "png", "png"]
    assert set(zip(index.width, index.height, strict=True)) == {(9, 7)}


def test_texts_become_class_names(tmp_path: Path) -> None:
    facts = {"class": "cat", "super_class": "pet", "split": "test", "role": "query"}
    made(tmp_path, ("1", "dog", None), ("2", None, facts), ("3", None, {"label": "ape"}))
    index = build_index(tmp_path, processes=1)
    assert index.class_names == ("ape", "cat", "dog")
    assert index.label.tolist() == [2, 1, 0]
    assert index.super_class.tolist() == ["", "pet", ""]
    assert index.split.tolist() == ["train", "test", "train"]
    assert index.role.tolist() == ["both", "query", "both"]


def test_names_beside_numbers_keep_the_order_of_numbers(tmp_path: Path) -> None:
    made(
        tmp_path,
        ("1", "0", {"class": "zebra"}),
        ("2", None, {"label": 1, "class": "ape"}),
        ("3", "0", {"label": 0, "class": "zebra"}),
    )
    index = build_index(tmp_path, processes=1)
    assert index.class_names == ("zebra", "ape")
    assert index.label.tolist() == [0, 1, 0]


def test_webdataset_written_shards_are_indexed(tmp_path: Path) -> None:
    from webdataset.writer import TarWriter

    with TarWriter(str(tmp_path / "w.tar"), encoder=True) as tar:
        for at in range(3):
            tar.write({"__key__": f"k{at}", "cls": at, "jpg": encoded_image(at, "jpeg")})
    assert build_index(tmp_path, processes=1).label.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([("k", None, None)], r"a.tar: key 'k': the sample has no label"),
        ([("k", None, {"caption": "x"})], r"a.tar: key 'k': the sample has no label"),
        ([("k", "", None)], r"a.tar: key 'k': the sample has no label"),
        ([("k", b"\xff", None)], r"a.tar: key 'k': the .cls member must be UTF-8"),
        ([("k", "1", {"label": 2})], r"a.tar: key 'k': .json and .cls must give one label"),
        ([("k", "1", {"role": "probe"})], r"a.tar: key 'k': role must be one of"),
        ([("k", "1", None), ("k", "1", None)], r"a.tar: key 'k': keys must be unique"),
        ([("k", "1", {"class": "a"}), ("l", "2", {"class": "a"})], "class 'a' must have one label"),
        ([("k", "1", {"class": "a"}), ("l", "1", {"class": "b"})], "label 1 must name one class"),
    ],
)
def test_samples_that_cannot_be_indexed(tmp_path: Path, samples: Any, message: str) -> None:
    made(tmp_path, *samples)
    with pytest.raises(DataError, match=message):
        build_index(tmp_path, processes=1)
    assert not (tmp_path / INDEX_NAME).exists()


def test_shards_that_cannot_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no tar shards \(\*.tar\)"):
        build_index(tmp_path)
    with pytest.raises(
        DataError, match="is not a folder; give the folder that holds the tar shards"
    ):
        build_index(tmp_path / "none")
    write_tar(tmp_path / "a.tar", [("k.txt", b"x")])
    with pytest.raises(DataError, match="hold no image"):
        build_index(tmp_path)
    made(tmp_path, ("k", "1", None), ("l", "1", None))
    made(tmp_path, ("k", "1", None), tar="b.tar")
    with pytest.raises(DataError, match=r"b.tar: key 'k': keys must be unique, it is in a.tar"):
        build_index(tmp_path, processes=1)
    write_tar(tmp_path / "b.tar", [("m.png", b"no image"), ("m.cls", b"1")])
    with pytest.raises(DataError, match=r"b.tar: key 'm': the image cannot be decoded"):
        build_index(tmp_path, processes=1)
    write_tar(
        tmp_path / "b.tar", [("m.png", encoded_image(0)), ("m.jpg", encoded_image(0, "jpeg"))]
    )
    with pytest.raises(DataError, match=r"b.tar: key 'm': a sample must have one image"):
        build_index(tmp_path, processes=1)
    (tmp_path / "b.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:1500])
    with pytest.raises(DataError, match=r"b.tar: (key .*)?truncated"):
        build_index(tmp_path, processes=1)


def test_images_with_dots_in_their_keys_are_reported(tmp_path: Path) -> None:
    made(tmp_path, ("whole", "1", None), ("a/k.4", "1", None), ("a/k.5", "2", None))
    with pytest.raises(DataError, match=r"a.tar: 2 images have a dot in their key .*") as caught:
        build_index(tmp_path, processes=1)
    assert "'a/k.4.png', has the key 'a/k' and the extension '4.png'" in str(caught.value)
    assert "rewrite the tar files with '_'" in str(caught.value)
    # Beside an image of its own key such a member is another part of the sample.
    mask = [("k.png", encoded_image(0)), ("k.mask.png", encoded_image(1)), ("k.cls", b"0")]
    write_tar(tmp_path / "a.tar", mask)
    assert build_index(tmp_path, processes=1).keys.tolist() == ["k"]


def test_shards_sorted_by_class_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for at in range(6):
        keys = [(f"{at}-{i}", str(at), None) for i in range(5)]
        made(tmp_path, *keys, tar=f"{at}.tar")
    with caplog.at_level(logging.WARNING):
        index = build_index(tmp_path, processes=1)
    assert "sorted by class: a tar shard holds 1 classes (median), a shuffled one would hold 4" in (
        caplog.text
    )
    mixed = dataclasses.replace(index, label=np.random.default_rng(0).permutation(index.label))
    assert class_sorted_warnings(mixed) == []


def test_missing_and_short_shards(shards: Path) -> None:
    index = read_index(shards)
    last = shards / index.tar_shards[-1]
    data = last.read_bytes()
    last.chmod(0o644)
    last.write_bytes(data[:2000])
    with pytest.raises(DataError, match=r"train-000002.tar has 2000 bytes, but .* needs \d+"):
        read_index(shards)
    last.unlink()
    with pytest.raises(DataError, match=r"train-000002.tar is listed in .* but does not exist"):
        read_index(shards)
    assert len(read_index(shards, check_shards=False)) == 40


def test_missing_index_error_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"create it with `dml-dist data index {tmp_path}`"):
        read_index(tmp_path)


def changed(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(table.column_names.index(name), name, [values])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop_columns(["crc32", "role"]), "the columns role, crc32 are missing"),
        (lambda t: t.slice(0, 0), "it has no rows"),
        (lambda t: changed(t, "label", pa.array([5] * len(t))), r"0..0 without gaps"),
        (lambda t: changed(t, "label", pa.array(range(len(t)))), "one class name has two labels"),
        (
            lambda t: changed(t, "class", pa.array(["x", *t["class"].to_pylist()[1:]])),
            "has two class names",
        ),
        (lambda t: changed(t, "key", pa.array(["k"] * len(t))), "keys must be unique"),
        (lambda t: changed(t, "role", pa.array(["probe"] * len(t))), "got 'probe'"),
        (lambda t: changed(t, "width", pa.array([0] * len(t))), "width must be at least 1"),
        (lambda t: changed(t, "offset", pa.array(["a"] * len(t))), "does not hold whole numbers"),
        (lambda t: changed(t, "split", pa.array([None] * len(t), pa.string())), "40 empty values"),
    ],
)
def test_inconsistent_index(shards: Path, change: Any, message: str) -> None:
    pq.write_table(change(pq.read_table(shards / INDEX_NAME)), shards / INDEX_NAME)
    with pytest.raises(DataError, match=message) as caught:
        read_index(shards)
    assert f"dml-dist data index {shards}" in str(caught.value)


def test_damaged_index(shards: Path) -> None:
    (shards / INDEX_NAME).write_bytes((shards / INDEX_NAME).read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_index(shards)
    flip_byte(shards / INDEX_NAME, 0)
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_index(shards)


def test_index_written_by_others_in_any_order_and_plain_types(shards: Path) -> None:
    index = read_index(shards)
    table = pq.read_table(shards / INDEX_NAME)
    plain = pa.table({name: table[name].to_pylist() for name in table.column_names})
    order = np.random.default_rng(0).permutation(len(table))
    folder = shards / "a=b"  # looks like a partition and is none
    folder.mkdir()
    pq.write_table(plain.take(order), folder / INDEX_NAME, row_group_size=7)
    shuffled = read_index(folder, check_shards=False)
    assert shuffled.tar_shards == index.tar_shards
    assert shuffled.class_names == index.class_names
    for name in ("keys", "tar_shard", "offset", "crc32", "label", "split", "role"):
        np.testing.assert_array_equal(getattr(shuffled, name), getattr(index, name)[order])


@pytest.mark.parametrize(
    "name",
    [
        "../x.tar",
        "/etc/passwd",
        "a/../../x.tar",
        "a//x.tar",
        ".x.tar",
        ".a/x.tar",
        "",
        ".",
        "a\0.tar",
    ],
)
def test_names_of_files_elsewhere_are_refused(shards: Path, name: str) -> None:
    index = read_index(shards)
    write_index(dataclasses.replace(index, tar_shards=(name, *index.tar_shards[1:])))
    for check_shards in (True, False):
        with pytest.raises(DataError, match="which is not a path below the folder") as caught:
            read_index(shards, check_shards=check_shards)
        assert repr(name) in str(caught.value)
    with pytest.raises(DataError, match="which is not a path below the folder"):
        verify(shards, processes=1)


def test_linked_tar_shards_are_read(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("disk") / "moved.tar"
    first = shards / read_index(shards).tar_shards[0]
    first.rename(elsewhere)
    first.symlink_to(elsewhere)
    assert not verify(shards, processes=1).problems
