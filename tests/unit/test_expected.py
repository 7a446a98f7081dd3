"""Counts that a configuration knows of its folder or table."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from dml_dist.config.data import CountsConfig, FolderConfig, TableConfig
from dml_dist.config.load import parse_config
from dml_dist.data.datasets import build_importer
from dml_dist.errors import ConfigError, DataError
from dml_dist.runtime.datasets import describe
from dml_dist.runtime.estimate import estimate_plan

EXPECTED = {
    "train": CountsConfig(classes=2, images=5),
    "test": CountsConfig(classes=2, images=4),
}


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 20)).save(path)


def folder(root: Path) -> FolderConfig:
    for name, count in {"a": 3, "b": 2, "c": 2, "d": 2}.items():
        for number in range(count):
            put(root / name / f"{number}.png")
    return FolderConfig(source=str(root), expected=EXPECTED)


def table(root: Path) -> TableConfig:
    folder(root)
    split = {"a": "train", "b": "train", "c": "test", "d": "test"}
    rows = [
        f"{path.relative_to(root)},{path.parent.name},{split[path.parent.name]}"
        for path in sorted(root.rglob("*.png"))
    ]
    (root / "t.csv").write_text("\n".join(["path,label,split", *rows]))
    return TableConfig(source=str(root / "t.csv"), expected=EXPECTED)


@pytest.mark.parametrize("make", [folder, table])
def test_counts_are_checked_where_there_is_data(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    config = make(tmp_path / "images")
    importer = build_importer(config)
    assert len(importer.samples()) == 9
    assert importer.facts().exact
    assert sorted(importer.facts().class_sizes["train"]) == [2, 3]
    wrong = {"train": CountsConfig(classes=2, images=6), "val": CountsConfig(classes=1, images=1)}
    importer = build_importer(config.model_copy(update={"expected": wrong}))
    for act in (importer.samples, importer.facts):
        with pytest.raises(
            DataError,
            match="train: expected 6 images of 2 classes, found 5 images of 2 classes; "
            "val: expected 1 images of 1 classes, found nothing; "
            "test: expected nothing, found 4 images of 2 classes",
        ):
            act()
    # Another expectation is no other data set.
    assert describe(config) == describe(config.model_copy(update={"expected": None}))


@pytest.mark.parametrize("section", [FolderConfig, TableConfig])
def test_expected_counts_replace_missing_data(section, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    missing = str(tmp_path / "nowhere")
    facts = build_importer(section(source=missing, expected=EXPECTED)).facts()
    assert facts.class_sizes == {"train": (3, 2), "test": (2, 2)}
    assert not facts.exact
    with pytest.raises(DataError):
        build_importer(section(source=missing)).facts()
    with pytest.raises(DataError):
        build_importer(section(source=missing, expected=EXPECTED)).samples()


def test_dry_run_names_the_source_of_its_numbers(tmp_path: Path) -> None:
    plain = {
        "name": "dry",
        "data": {
            "path": str(tmp_path / "shards"),
            "dataset": {
                "name": "folder",
                "source": str(tmp_path / "nowhere"),
                "expected": {
                    "train": {"classes": 4, "images": 19},
                    "test": {"classes": 2, "images": 4},
                },
            },
        },
        "train": {"global_batch_size": 4, "steps": 3},
        "validation": {"name": "none"},
    }
    plan, origin = estimate_plan(parse_config(plain), 1)
    assert plan.class_sizes == (5, 5, 5, 4)
    assert "totals of data.dataset.expected, class sizes estimated" in origin
    plain["data"]["dataset"]["expected"]["test"]["images"] = 1  # type: ignore[index]
    with pytest.raises(ConfigError, match="images must be at least classes 2, got 1"):
        parse_config(plain)
