"""Division of the training split into training and validation classes."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import assert_never

import numpy as np

from dml_dist.config.data import DataConfig
from dml_dist.config.schema import (
    ClassesValidationConfig,
    FoldsValidationConfig,
    FractionValidationConfig,
    NoValidationConfig,
    ValidationConfig,
)
from dml_dist.data.index import Index
from dml_dist.data.labels import class_text
from dml_dist.errors import ConfigError, DataError
from dml_dist.partition import part_bounds
from dml_dist.random_streams import Stream, generator_of

MIN_CLASSES = 2
"""Minimum number of classes to train or validate on: with one class every neighbor is a hit."""


@dataclass(frozen=True, eq=False)
class ClassSplit:
    """Rows and classes of training and of validation.

    Attributes:
        train_rows: (n,) int64 rising index rows.
        validation_rows: (m,) int64 rising index rows, empty without validation.
        train_classes: (C,) int64 rising index labels; the class id is the position.
        validation_classes: (V,) int64 rising index labels.
    """

    train_rows: np.ndarray
    validation_rows: np.ndarray
    train_classes: np.ndarray
    validation_classes: np.ndarray

    def class_ids(self, labels: np.ndarray) -> np.ndarray:
        """Return the class ids 0 .. C - 1 of index labels of training classes, int64.

        Raises:
            ValueError: If a label is not one of a training class.
        """
        ids = np.searchsorted(self.train_classes, labels)
        known = self.train_classes[np.minimum(ids, len(self.train_classes) - 1)] == labels
        if not known.all():
            raise ValueError(
                f"label {np.asarray(labels)[~known][0]} is not one of the "
                f"{len(self.train_classes)} training classes"
            )
        return ids.astype(np.int64, copy=False)


def split_classes(
    index: Index, data: DataConfig, validation: ValidationConfig, seed: int
) -> ClassSplit:
    """Divide the classes of the training split into training and validation classes.

    Rows of other splits are never touched. The division depends on the classes, the section
    `validation` and the seed only.

    Args:
        index: The data set.
        data: Names the training split.
        validation: What is held out.
        seed: The run's seed.

    Raises:
        ConfigError: If a class is not known, or too few classes are left on either side.
        DataError: If the training split does not exist or a class has no image.
    """
    _check_no_empty_class(index)
    rows = index.rows(data.train_split)
    labels = index.label[rows]
    classes = np.unique(labels)
    held_out = _held_out(index, data, validation, classes, seed)
    if len(classes) - len(held_out) < MIN_CLASSES:
        raise ConfigError(
            f"training needs at least {MIN_CLASSES} classes, but the split {data.train_split!r} of "
            f"{index.root} has {len(classes)} and validation ({validation.name}) holds out "
            f"{len(held_out)}; hold out fewer, or set validation.name to none"
        )
    validates = np.isin(labels, held_out)
    return ClassSplit(
        train_rows=rows[~validates],
        validation_rows=rows[validates],
        train_classes=np.setdiff1d(classes, held_out),
        validation_classes=held_out,
    )


def _held_out(
    index: Index, data: DataConfig, validation: ValidationConfig, classes: np.ndarray, seed: int
) -> np.ndarray:
    """Return the index labels of the validation classes, rising."""
    shuffled = generator_of(Stream.VALIDATION_CLASSES, seed).permutation(classes)
    match validation:
        case NoValidationConfig():
            return shuffled[:0]
        case FractionValidationConfig():
            return np.sort(shuffled[: max(MIN_CLASSES, round(validation.fraction * len(classes)))])
        case FoldsValidationConfig():
            if len(classes) < MIN_CLASSES * validation.num_folds:
                raise ConfigError(
                    f"validation.num_folds {validation.num_folds} needs {MIN_CLASSES} classes for "
                    f"each fold, {MIN_CLASSES * validation.num_folds} in all, but the split "
                    f"{data.train_split!r} of {index.root} has {len(classes)}; use fewer folds"
                )
            low, high = part_bounds(len(classes), validation.num_folds, validation.fold)
            return np.sort(shuffled[low:high])
        case ClassesValidationConfig():
            return _named(index, data, validation.classes, classes)
        case _:
            assert_never(validation)


def _named(
    index: Index, data: DataConfig, names: tuple[str, ...], classes: np.ndarray
) -> np.ndarray:
    label_of = {index.class_names[label]: label for label in classes.tolist()}
    # Written as the index writes classes; an older index may have other spellings.
    names = tuple(name if name in label_of else class_text(name, "class") for name in names)
    for name in names:
        if name not in label_of:
            near = get_close_matches(name, label_of, n=1, cutoff=0.0)[0]
            reason = (
                f"belongs to another split than {data.train_split!r}"
                if name in index.class_names
                else "is not a class"
            )
            raise ConfigError(
                f"validation.classes must name training classes, but {name!r} {reason} of "
                f"{index.root}; the nearest of its {len(label_of)} training classes is {near!r}"
            )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(
            f"validation.classes must name each class once, but names {twice!r} twice"
        )
    return np.sort(np.array([label_of[name] for name in names], dtype=np.int64))


def _check_no_empty_class(index: Index) -> None:
    counts = np.bincount(index.label, minlength=len(index.class_names))
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        raise DataError(
            f"every class of {index.root} needs an image, but {len(empty)} of its "
            f"{len(index.class_names)} classes have none, the first is "
            f"{index.class_names[empty[0]]!r}; index the folder again with `dml-dist data index`"
        )
