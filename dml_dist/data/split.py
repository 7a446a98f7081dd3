"""Assignment of images to the training and test splits, by a rule or a file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dml_dist.config.data import SplitConfig
from dml_dist.data.labels import optional_texts
from dml_dist.data.sample import class_order
from dml_dist.data.table_file import read_table, refuse
from dml_dist.errors import DataError
from dml_dist.random_streams import Stream, generator_of


def assign_splits(
    paths: Sequence[str], class_names: Sequence[str], config: SplitConfig
) -> list[str]:
    """Return the split of every image: "train" or "test" by the rule, or as listed in the file.

    Args:
        paths: Path of each image relative to the source, `/` between folders, in sorted order.
        class_names: Class of each image.
        config: The rule, or the file to use instead.

    Raises:
        DataError: If there are too few classes, or the file does not match the images.
    """
    if config.file is not None:
        return _by_file(paths, class_names, Path(config.file))
    names = class_order(class_names)
    rank = {name: label for label, name in enumerate(names)}
    labels = np.array([rank[name] for name in class_names], dtype=np.int64)
    generator = generator_of(Stream.SPLIT, config.seed)
    seeded = config.order == "seeded"
    if config.by == "class":
        if len(names) < 2:
            raise DataError(
                f"a split by class needs at least 2 classes, got {len(names)} ({names[0]!r}); "
                "give the folder that holds the class folders, or split by image"
            )
        order = generator.permutation(len(names)) if seeded else np.arange(len(names))
        trains_class = np.zeros(len(names), dtype=bool)
        trains_class[order[: num_train(len(names), config.train)]] = True
        trains = trains_class[labels]
    else:
        draws = generator.random(len(labels)) if seeded else np.arange(len(labels))
        trains = _first_of_each(labels, draws, config.train)
    return np.where(trains, "train", "test").tolist()


def num_train(total: int, share: float) -> int:
    """Return how many of `total` >= 2 items train: the rounded share, leaving both parts some."""
    return min(max(math.floor(share * total + 0.5), 1), total - 1)


def _first_of_each(labels: np.ndarray, draws: np.ndarray, share: float) -> np.ndarray:
    """Return for each image whether it is among the first of its class by `draws`, (N,) bool.

    A class with a single image trains.
    """
    order = np.lexsort((draws, labels))
    sizes = np.bincount(labels)
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    position = np.empty(len(labels), dtype=np.int64)
    position[order] = np.arange(len(labels)) - np.repeat(starts, sizes)
    quota = np.array([num_train(size, share) if size > 1 else 1 for size in sizes.tolist()])
    return position < quota[labels]


def _by_file(paths: Sequence[str], class_names: Sequence[str], file: Path) -> list[str]:
    table = read_table(file)
    column = next((name for name in ("path", "class") if name in table.column_names), None)
    if column is None or "split" not in table.column_names:
        raise DataError(
            f"{file}: a split file needs the columns `path,split` or `class,split`, "
            f"got {', '.join(table.column_names)}"
        )
    given, splits = table[column].to_pylist(), table["split"].to_pylist()
    if column == "class":
        given = optional_texts(given)  # the same rule as for class folders
    split_of: dict[str, str] = {}
    for row, (name, split) in enumerate(zip(given, splits, strict=True), start=1):
        if not name or not split:
            raise DataError(f"{file}: row {row} must have a {column} and a split, but one is empty")
        if split_of.setdefault(name, split) != split:
            raise DataError(
                f"{file}: {column} {name!r} is in two splits, the second time in row {row}"
            )
    wanted = paths if column == "path" else class_names
    refuse(
        f"{file}: every {column} of the source must have a split, these have none",
        sorted(set(wanted) - split_of.keys()),
    )
    refuse(
        f"{file}: every {column} must be in the source, these are not",
        sorted(split_of.keys() - set(wanted)),
    )
    return [split_of[name] for name in wanted]
