"""Copies: against loops over all pairs, and for pictures that were stored again."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dml_dist.config.data import FolderConfig
from dml_dist.data import duplicates
from dml_dist.data.datasets.folder import FolderImporter
from dml_dist.data.duplicates import Copies, find_copies, nearest
from dml_dist.data.fingerprint import NEAR_BITS, NEAR_SHARE, fingerprint
from dml_dist.data.import_summary import read_summary
from dml_dist.data.write_shards import import_dataset
from tests.oracles_data import write_images


def random_fingerprints(generator: np.random.Generator, count: int) -> np.ndarray:
    """Fingerprints of which many are near others: a few originals with up to 6 flipped bits."""
    originals = generator.integers(0, 2**64, (5, 2), dtype=np.uint64)
    originals[0] &= np.uint64(0xFFFF)  # few set bits, as of plain pictures
    chosen = originals[generator.integers(0, 5, count)]
    for row in chosen:
        for _ in range(generator.integers(0, 7)):
            row[generator.integers(2)] ^= np.uint64(1) << np.uint64(generator.integers(64))
    return chosen


def distance(one: np.ndarray, other: np.ndarray) -> int:
    return sum((int(a) ^ int(b)).bit_count() for a, b in zip(one, other, strict=True))


def is_near(one: np.ndarray, other: np.ndarray) -> bool:
    plainer = min(sum(int(word).bit_count() for word in words) for words in (one, other))
    return distance(one, other) <= min(NEAR_BITS, plainer // NEAR_SHARE)


@pytest.mark.parametrize(("num_queries", "num_others"), [(0, 5), (7, 0), (200, 150)])
def test_nearest_is_that_of_all_pairs(
    num_queries: int, num_others: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicates, "_OTHERS", 16)  # so that near ones are in several blocks
    monkeypatch.setattr(duplicates, "_QUERIES", 3)
    generator = np.random.default_rng(num_others)
    queries = random_fingerprints(generator, num_queries)
    others = random_fingerprints(generator, num_others)
    found, bits = nearest(queries, others)
    expected = []
    for query in queries:
        near = [(distance(query, other), row) for row, other in enumerate(others)]
        near = [pair for pair in near if is_near(query, others[pair[1]])]
        expected.append(min(near, default=(NEAR_BITS + 1, -1)))
    # Whole lists, so that no queries must give no answers.
    assert list(zip(bits.tolist(), found.tolist(), strict=True)) == expected
    assert (found.dtype, bits.dtype) == (np.int64, np.int64)


def test_the_nearest_wins_over_blocks_and_the_lower_row_over_equals(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(duplicates, "_OTHERS", 1)
    low = 2**32 - 1  # with 32 set bits; blocks come in the order of their number
    words = [low | 2**40, low, low | 2**41, low ^ 1]
    others = np.array([[word, 0] for word in words], dtype=np.uint64)
    for query, expected in ((low, (1, 0)), (low | 2**40 | 2**41, (0, 1)), (low ^ 3, (3, 1))):
        found, bits = nearest(np.array([[query, 0]], dtype=np.uint64), others)
        assert (found[0], bits[0]) == expected


def test_copies_are_those_of_loops() -> None:
    generator = np.random.default_rng(3)
    split = np.array(["test", "train", "val"], dtype=object)[generator.integers(0, 3, 90)]
    prints = random_fingerprints(generator, 90)
    digests = np.array([f"d{value}" for value in generator.integers(0, 60, 90)])
    has = generator.random(90) < 0.8
    found = {(c.split, c.other_split): c for c in find_copies(split, digests, prints, has)}
    pairs = [("train", "train"), ("test", "test"), ("val", "val")]
    pairs += [("test", "train"), ("val", "train"), ("val", "test")]
    assert set(found) == set(pairs)
    for pair in pairs:
        expected = expected_copies(pair, split, digests, prints, has)
        copies = found[pair]
        assert copies.num_images == (split == pair[0]).sum()
        columns = (copies.rows, copies.other_rows, copies.bits)
        assert list(zip(*(column.tolist() for column in columns), strict=True)) == expected
        assert copies.num_exact == sum(bits < 0 for *_, bits in expected)
        assert copies.num_near == len(expected) - copies.num_exact
    assert sum(copies.num_near for copies in found.values()) > 20


def expected_copies(
    pair: tuple[str, str],
    split: np.ndarray,
    digests: np.ndarray,
    prints: np.ndarray,
    has: np.ndarray,
) -> list[tuple[int, int, int]]:
    expected: list[tuple[int, int, int]] = []
    for row in np.flatnonzero(split == pair[0]).tolist():
        others = np.flatnonzero(split == pair[1]).tolist()
        if pair[0] == pair[1]:
            others = [other for other in others if other < row]
        same = [other for other in others if digests[other] == digests[row]]
        near = [
            (distance(prints[row], prints[other]), other)
            for other in others
            if pair[0] != pair[1]
            and has[row]
            and has[other]
            and is_near(prints[row], prints[other])
        ]
        if same:
            expected.append((row, same[0], -1))
        elif near:
            expected.append((row, min(near)[1], min(near)[0]))
    return expected


def test_many_fingerprints_take_little_time() -> None:
    """All alike is the worst case: nothing can be left out."""
    same = np.full((3000, 2), 2**64 - 1, dtype=np.uint64)
    found, bits = nearest(same, same)
    assert found.tolist() == [0] * 3000
    assert not bits.any()


def photograph(seed: int, size: int = 160) -> Image.Image:
    """A smooth picture with structure, as photographs have it."""
    noise = np.random.default_rng(seed).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def stored(image: Image.Image, file_format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def test_fingerprints_are_robust_to_common_edits() -> None:
    def bits(text: str | None) -> int:
        assert text is not None
        return int(text, 16)

    originals = [bits(fingerprint(photograph(seed))) for seed in range(20)]
    for seed, original in enumerate(originals):
        image = photograph(seed)
        with Image.open(io.BytesIO(stored(image, "JPEG", quality=75))) as again:
            copies = [again.convert("RGB"), image.resize((97, 97)), image.convert("L")]
        for copy in copies:
            assert (bits(fingerprint(copy)) ^ original).bit_count() <= NEAR_BITS
        for other in originals[:seed]:
            assert (other ^ original).bit_count() > 3 * NEAR_BITS
    assert fingerprint(Image.new("RGB", (50, 40), (200, 10, 10))) is None
    assert fingerprint(Image.new("L", (1, 1))) is None


def test_an_import_lists_copies(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_images(raw, [f"{i}/{j}.png" for i in "abcd" for j in range(3)])
    (raw / "a/3.png").write_bytes(stored(photograph(1), "PNG"))
    (raw / "c/3.jpg").write_bytes(stored(photograph(1).resize((80, 80)), "JPEG", quality=80))
    (raw / "d/3.png").write_bytes((raw / "b/0.png").read_bytes())
    (raw / "d/4.png").write_bytes((raw / "c/1.png").read_bytes())
    (raw / "b/9.png").write_bytes(stored(Image.new("RGB", (20, 20)), "PNG"))
    (raw / "c/9.png").write_bytes(stored(Image.new("RGB", (30, 30)), "PNG"))  # all one colour
    importer = FolderImporter(FolderConfig(source=str(raw)))
    import_dataset(importer, out, samples_per_shard=4, processes=1)
    summary = read_summary(out)
    assert summary is not None
    counts = {(c.split, c.other_split): (c.num_images, c.exact, c.near) for c in summary.copies}
    assert counts == {("test", "train"): (10, 1, 1), ("test", "test"): (10, 1, 0)}
    with open(out / "duplicates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["kind"], *sorted((row["key"], row["other_key"]))) for row in rows}
    assert found == {
        ("near", "a/3", "c/3"),
        ("exact", "b/0", "d/3"),
        ("exact", "c/1", "d/4"),
    }
    (row,) = (row for row in rows if row["kind"] == "near")
    assert (row["split"], row["class"], row["other_split"], row["other_class"]) == (
        "test",
        "c",
        "train",
        "a",
    )
    text = "\n".join(summary.lines(out))
    assert "of 10 images in test also in train: 1 by bytes, 1 by appearance (4 of 128 bits)" in text
    assert "d/3 is b/0 of another class" in text
    assert "c/3 looks like a/3 of another class" in text
    assert f"all in {out / 'duplicates.csv'}" in text


def test_no_copies_give_no_message(tmp_path: Path) -> None:
    write_images(tmp_path / "raw", [f"{i}/{j}.png" for i in "ab" for j in range(3)])
    importer = FolderImporter(FolderConfig(source=str(tmp_path / "raw")))
    import_dataset(importer, tmp_path / "out", processes=1)
    summary = read_summary(tmp_path / "out")
    assert summary is not None
    assert summary.lines(tmp_path / "out") == []
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"index.parquet", "import.json", "test-000000.tar", "train-000000.tar"}


@pytest.mark.slow
def test_sop_sized_search_is_fast() -> None:
    """Two splits of its size with structured fingerprints, within a minute on one core."""
    import time

    generator = np.random.default_rng(0)
    prints = generator.integers(0, 2**64, (120_053, 2), dtype=np.uint64)
    split = np.where(np.arange(len(prints)) < 59_551, "train", "test")
    prints[59_551:59_651] = prints[:100]
    start = time.monotonic()
    copies = find_copies(split, np.arange(len(prints)), prints, np.ones(len(prints), dtype=bool))
    assert time.monotonic() - start < 60
    (across,) = (item for item in copies if item.split != item.other_split)
    assert isinstance(across, Copies)
    assert across.num_near == 100
