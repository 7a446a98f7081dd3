"""Validation classes: by class, seeded, dense class ids, refusals with numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dml_dist.config.data import DataConfig
from dml_dist.config.schema import (
    ClassesValidationConfig,
    FoldsValidationConfig,
    FractionValidationConfig,
    NoValidationConfig,
    ValidationConfig,
)
from dml_dist.data.classes import ClassSplit, split_classes
from dml_dist.data.index import Index
from dml_dist.errors import ConfigError, DataError

DATA = DataConfig(path="shards")


def index_of(num_classes: int = 20, test_classes: int = 5, images: int = 3) -> Index:
    """An index without files; the test classes are spread evenly over the labels, from 0 on."""
    total = num_classes + test_classes
    label = np.random.default_rng(0).permutation(np.repeat(np.arange(total), images))
    tests = np.isin(np.arange(total), np.linspace(0, total - 1, test_classes).astype(int))
    column: dict[str, Any] = {
        field.name: np.zeros(len(label))
        for field in dataclasses.fields(Index)
        if field.name not in ("root", "tar_shards", "class_names")
    }
    column["label"] = label
    column["split"] = np.where(tests[label], "test", "train").astype(object)
    column["keys"] = label.astype(str).astype(object)
    names = tuple(f"bird {number}" for number in range(total))
    return Index(root=Path("shards"), tar_shards=("a.tar",), class_names=names, **column)


CASES: list[tuple[ValidationConfig, int]] = [
    (NoValidationConfig(), 0),
    (FractionValidationConfig(fraction=0.25), 5),
    (FractionValidationConfig(fraction=0.01), 2),
    (FoldsValidationConfig(num_folds=3, fold=1), 7),
    (ClassesValidationConfig(classes=("bird 3", "bird 1")), 2),
]


def check(index: Index, split: ClassSplit) -> None:
    """Assert that the split divides the training split's rows by class."""
    train = index.rows("train")
    assert sorted([*split.train_rows, *split.validation_rows]) == train.tolist()
    for rows, classes in (
        (split.train_rows, split.train_classes),
        (split.validation_rows, split.validation_classes),
    ):
        assert (np.diff(rows) > 0).all()
        assert np.unique(index.label[rows]).tolist() == classes.tolist()
    assert not set(split.train_classes) & set(split.validation_classes)
    ids = split.class_ids(index.label[split.train_rows])
    assert ids.dtype == np.int64
    assert np.unique(ids).tolist() == list(range(len(split.train_classes)))
    assert (split.train_classes[ids] == index.label[split.train_rows]).all()


@pytest.mark.parametrize(("validation", "held_out"), CASES)
def test_classes_are_divided_and_counted(validation: ValidationConfig, held_out: int) -> None:
    index = index_of()
    split = split_classes(index, DATA, validation, seed=0)
    check(index, split)
    assert len(split.validation_classes) == held_out


def test_folds_are_disjoint_and_cover() -> None:
    index = index_of()
    parts = [
        split_classes(
            index, DATA, FoldsValidationConfig(num_folds=4, fold=fold), seed=3
        ).validation_classes
        for fold in range(4)
    ]
    together = np.concatenate(parts)
    assert sorted(together.tolist()) == np.unique(index.label[index.rows("train")]).tolist()


def test_the_division_follows_the_seed_and_not_the_order_of_rows() -> None:
    index, validation = index_of(), FractionValidationConfig(fraction=0.3)
    first = split_classes(index, DATA, validation, seed=0).validation_classes
    order = np.random.default_rng(1).permutation(len(index))
    moved = dataclasses.replace(index, label=index.label[order], split=index.split[order])
    assert np.array_equal(first, split_classes(moved, DATA, validation, seed=0).validation_classes)
    assert not np.array_equal(
        first, split_classes(index, DATA, validation, seed=1).validation_classes
    )


@pytest.mark.parametrize(
    ("validation", "num_classes", "words"),
    [
        (FractionValidationConfig(fraction=0.9), 4, ["at least 2", "has 4", "holds out 4"]),
        (FractionValidationConfig(fraction=0.1), 3, ["at least 2", "has 3", "holds out 2"]),
        (FoldsValidationConfig(num_folds=4), 7, ["num_folds 4", "8 in all", "has 7"]),
        (
            ClassesValidationConfig(classes=("bird 1", "bird 33")),
            20,
            ["'bird 33' is not a class", "nearest of its 20 training classes is 'bird "],
        ),
        (
            ClassesValidationConfig(classes=("bird 1", "bird 0")),
            20,
            ["'bird 0' belongs to another split than 'train'"],
        ),
        (ClassesValidationConfig(classes=("bird 1", "bird 1")), 20, ["'bird 1' twice"]),
    ],
)
def test_impossible_divisions_are_refused_with_the_numbers(
    validation: ValidationConfig, num_classes: int, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        split_classes(index_of(num_classes), DATA, validation, seed=0)
    for word in words:
        assert word in str(caught.value)


def test_a_class_without_images_is_refused() -> None:
    index = index_of()
    empty = dataclasses.replace(index, class_names=(*index.class_names, "dodo"))
    with pytest.raises(DataError, match=r"1 of its 26 classes.*'dodo'"):
        split_classes(empty, DATA, NoValidationConfig(), seed=0)


def test_a_split_that_does_not_exist_is_refused() -> None:
    data = DataConfig(path="shards", train_split="trian")
    with pytest.raises(DataError, match=r"'trian'.*test, train"):
        split_classes(index_of(), data, NoValidationConfig(), seed=0)


def test_labels_of_other_classes_have_no_id() -> None:
    split = split_classes(index_of(), DATA, FractionValidationConfig(fraction=0.25), seed=0)
    for label in (int(split.validation_classes[0]), 1000, -1):
        with pytest.raises(ValueError, match=str(label)):
            split.class_ids(np.array([label]))
