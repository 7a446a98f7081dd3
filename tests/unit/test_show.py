"""`data show`: counts against loops over the index, warnings of what is wrong, and the picture."""

from __future__ import annotations

import io
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dml_dist.data.build_index import build_index
from dml_dist.data.index import Index, read_index
from dml_dist.data.plans import ShuffledPlan
from dml_dist.data.statistics import SplitFacts, contact_sheet, split_facts, split_names
from dml_dist.errors import ConfigError
from dml_dist.report.dataset import show_dataset


def made_index(
    labels: list[int], shards: list[int], splits: list[str] | None = None, **columns: list[object]
) -> Index:
    """Return an index of images that do not exist."""
    count = len(labels)
    values = {name: np.array(column, dtype=object) for name, column in columns.items()}
    return Index(
        root=Path("nowhere"),
        tar_shards=tuple(f"{shard}.tar" for shard in range(max(shards) + 1)),
        keys=np.array([str(row) for row in range(count)], dtype=object),
        tar_shard=np.array(shards, dtype=np.int32),
        offset=np.zeros(count, np.int64),
        length=np.ones(count, np.int64),
        crc32=np.zeros(count, np.uint32),
        extension=np.array(["png"] * count, dtype=object),
        width=np.full(count, 8, np.int32),
        height=np.full(count, 8, np.int32),
        label=np.array(labels, dtype=np.int64),
        class_names=tuple(f"class {label}" for label in range(max(labels) + 1)),
        super_class=values.get("super_class", np.array([""] * count, dtype=object)),
        split=np.array(splits or ["train"] * count, dtype=object),
        role=values.get("role", np.array(["both"] * count, dtype=object)),
    )


def facts_of(sizes: list[int]) -> SplitFacts:
    labels = [label for label, size in enumerate(sizes) for _ in range(size)]
    return split_facts(made_index(labels, [0] * len(labels)), "train")


# ---------------------------------------------------------------- counts


def test_counts_are_those_of_the_split() -> None:
    index = made_index(
        [0, 0, 1, 2, 2, 2, 3],
        [0] * 7,
        ["train", "train", "test", "train", "train", "train", "test"],
        super_class=["a", "a", "b", "", "b", "b", "b"],
        role=["both", "both", "query", "both", "both", "both", "gallery"],
    )
    assert split_names(index) == ["train", "test"]
    train, test = (split_facts(index, name) for name in ("train", "test"))
    assert (train.num_images, train.num_classes, train.num_super_classes) == (5, 2, 2)
    assert (test.num_images, test.num_classes, test.num_super_classes) == (2, 2, 1)
    assert train.roles == {"both": 5}
    assert test.roles == {"query": 1, "gallery": 1}
    assert train.class_sizes.tolist() == [3, 2]


@pytest.mark.parametrize("sizes", [[5, 5, 5], [1, 2, 3, 40], [1, 1, 1, 1, 100], [7]])
def test_imbalance_is_named_by_known_measures(sizes: list[int]) -> None:
    facts = facts_of(sizes)
    # Gini as half of the mean absolute difference of all pairs over the mean.
    differences = [abs(one - two) for one in sizes for two in sizes]
    assert facts.gini == pytest.approx(np.mean(differences) / (2 * np.mean(sizes)), abs=1e-12)
    assert facts.imbalance == pytest.approx(max(sizes) / np.median(sizes))
    assert facts.lone_share == pytest.approx(sum(size < 2 for size in sizes) / len(sizes))
    text = " ".join(facts.warnings)
    assert ("imbalanced" in text) == (max(sizes) >= 5 * np.median(sizes))
    assert ("single image" in text) == (min(sizes) == 1)


def test_classes_of_windows_are_those_that_an_epoch_reads_together() -> None:
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 30, 240)
    shards = generator.integers(0, 12, 240)
    index = made_index([*range(30), *labels.tolist()], [*[0] * 30, *shards.tolist()])
    facts = split_facts(index, "train", window=3, seed=5)
    # The order of an epoch: rows of a window follow each other.
    plan = ShuffledPlan(np.arange(270), index.tar_shard, 5, 1, 3, True)
    order = np.concatenate(plan.epoch(0))
    windows: list[set[int]] = []
    seen: list[set[int]] = []
    for row in order:
        shard = int(index.tar_shard[row])
        if not windows or shard not in seen[-1]:
            if not windows or len(seen[-1]) == 3:
                windows.append(set())
                seen.append(set())
            seen[-1].add(shard)
        windows[-1].add(int(index.label[row]))
    assert sorted(map(len, windows)) == sorted(facts.window_classes.tolist())


@pytest.mark.parametrize(("mixed", "warned"), [(True, False), (False, True)])
def test_class_sorted_shards_are_warned_of(mixed: bool, warned: bool) -> None:
    labels = np.repeat(np.arange(40), 20)
    if mixed:
        labels = np.random.default_rng(1).permutation(labels)
    index = made_index(labels.tolist(), np.repeat(np.arange(20), 40).tolist())
    facts = split_facts(index, "train", window=2)
    assert facts.is_class_sorted == warned
    assert any("sorted by class" in text for text in facts.warnings) == warned
    expected = 40 * (1 - (1 - 80 / 800) ** 20)
    assert facts.mixed_classes == pytest.approx(expected)
    # In a window that spans all tar shards there is nothing to warn of.
    assert not split_facts(index, "train", window=20).is_class_sorted


# ---------------------------------------------------------------- the picture and the terminal


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two splits with images of several sizes, a class with markup in its name."""
    import tarfile

    folder = tmp_path_factory.mktemp("images") / "small set"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, first in (("train", 0), ("test", 3)):
        with tarfile.open(folder / f"{split}.tar", "w") as tar:
            for number in range(24):
                label = first + number % 3
                pixels = np.full((20 + number, 30, 3), 40 * label, np.uint8)
                pixels[0] = generator.integers(0, 256, (30, 3))
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                name = f"[red]$x_{label}$"
                meta = f'{{"label": {label}, "class": "{name}", "split": "{split}"}}'.encode()
                for extension, data in (("png", file.getvalue()), ("json", meta)):
                    info = tarfile.TarInfo(f"{split}-{number:02d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    build_index(folder, processes=1)
    return folder


def test_the_contact_sheet_shows_images_of_its_classes(shards: Path) -> None:
    index = read_index(shards)
    sheet = contact_sheet(index, "test", num_classes=2, num_images=5, side=32, seed=3)
    assert sheet.class_sizes == (8, 8)
    assert [row.shape for row in sheet.tiles] == [(5, 32, 32, 3)] * 2
    levels: dict[str, set[int]] = defaultdict(set)
    for name, row in zip(sheet.class_names, sheet.tiles, strict=True):
        levels[name] |= {int(tile[16, 16, 0]) for tile in row}
    assert levels == {name: {40 * int(re.findall(r"\d", name)[0])} for name in sheet.class_names}
    again = contact_sheet(index, "test", num_classes=2, num_images=5, side=32, seed=3)
    assert again.class_names == sheet.class_names
    np.testing.assert_array_equal(again.tiles[0], sheet.tiles[0])
    # Shrunk into a square: the image is 30 wide and higher or lower than that, paper beside it.
    assert {tuple(tile[0, 0]) for tile in sheet.tiles[0]} != {(246, 246, 246)}


def test_the_command_prints_and_draws_and_overwrites_nothing(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = io.StringIO()
    console = Console(file=output, width=120)
    first = show_dataset(shards, console)
    text = output.getvalue()
    for part in (
        "48 images of 6 classes", "train", "test", "24", "pixels: width 30 to 30",
        "height 20 to 43", "48 png", "small set-show.png",
    ):  # fmt: skip
        assert part in text, part
    assert first == tmp_path / "small set-show.png"
    with Image.open(first) as image:
        assert image.width >= 1000
        # The grey of both splits' classes is in it.
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 22) or []}
    assert {(40 * label,) * 3 for label in range(6)} <= colors
    data = first.read_bytes()
    second = show_dataset(shards, console)
    assert second == tmp_path / "small set-show-2.png"
    assert second.read_bytes() == data
    for wrong, message in (
        (first, "exists"),
        (tmp_path / "x.jpg", r"\.png"),
        (tmp_path / "none" / "x.png", "in an existing folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            show_dataset(shards, console, out=wrong)
    assert first.read_bytes() == data
    assert len(list(tmp_path.iterdir())) == 2
