"""Columns of an index from scanned images: dense labels, unique keys, classes per tar shard."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dml_dist.data.sample import class_order
from dml_dist.data.shard_scan import ScannedImage
from dml_dist.data.stored_images import StoredImage
from dml_dist.errors import DataError


def repeated_keys(images: list[tuple[int, ScannedImage]], names: list[str]) -> list[str]:
    """Return a line for each image whose key an earlier one has; images are (tar shard, image)."""
    first: dict[str, int] = {}
    problems: list[str] = []
    for at, image in images:
        if image.key in first:
            problems.append(
                f"{names[at]}: key {image.key!r}: keys must be unique, "
                f"it is in {names[first[image.key]]} already"
            )
        first.setdefault(image.key, at)
    return problems


def columns(
    images: list[tuple[int, ScannedImage]],
    stored: list[StoredImage],
    names: list[str],
    root: Path,
) -> tuple[tuple[str, ...], dict[str, np.ndarray], tuple[str, ...]]:
    """Return the tar shards that hold images, the columns by name, and the class names.

    Args:
        images: (tar shard, image), at least one.
        stored: What decoding each of them found.
        names: File names of the tar shards.
        root: Their folder, for messages.

    Raises:
        DataError: If labels and class names do not match one to one.
    """
    labels, class_names = _dense_labels([image for _, image in images], root)

    def texts(name: str) -> np.ndarray:
        return np.array([getattr(image, name) for _, image in images], dtype=object)

    def numbers(name: str, kind: type[np.generic]) -> np.ndarray:
        return np.array([getattr(image, name) for _, image in images], dtype=kind)

    used = sorted({at for at, _ in images})
    position = {at: new for new, at in enumerate(used)}
    found = {
        "keys": texts("key"),
        "tar_shard": np.array([position[at] for at, _ in images], dtype=np.int32),
        "offset": numbers("offset", np.int64),
        "length": numbers("length", np.int64),
        "crc32": np.array([image.crc32 for image in stored], dtype=np.uint32),
        "extension": texts("extension"),
        "width": np.array([image.width for image in stored], dtype=np.int32),
        "height": np.array([image.height for image in stored], dtype=np.int32),
        "label": labels,
        "super_class": texts("super_class"),
        "role": texts("role"),
    }
    return tuple(names[at] for at in used), found, class_names


def classes_per_shard(tar_shard: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return how many classes a typical tar shard holds, and how many it would hold if mixed.

    Args:
        tar_shard: Tar shard of each image of a split, (n,).
        labels: Label of each image, (n,).
    """
    shards, sizes = np.unique(tar_shard, return_counts=True)
    pairs = np.unique(np.stack([tar_shard, labels]), axis=1)
    classes = np.bincount(pairs[0])[shards]
    per_class = np.bincount(labels)
    # A class is missed by a random draw of this share of the split with (1 - share)^size.
    share = float(np.median(sizes)) / len(labels)
    mixed = float(np.sum(1 - (1 - share) ** per_class[per_class > 0]))
    return float(np.median(classes)), mixed


def _dense_labels(images: list[ScannedImage], root: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return the labels 0..C-1, (N,) int64, and the class name of each."""
    number_of: dict[str, int | None] = {}
    for image in images:
        if number_of.setdefault(image.class_text, image.number) != image.number:
            raise DataError(
                f"{root}: class {image.class_text!r} must have one label, it has "
                f"{number_of[image.class_text]} and, at key {image.key!r}, {image.number}"
            )
    known = [number for number in number_of.values() if number is not None]
    if len(set(known)) != len(known):
        twice = next(number for number in known if known.count(number) > 1)
        both = [name for name, number in number_of.items() if number == twice]
        raise DataError(f"{root}: label {twice} must name one class, it names {', '.join(both)}")
    if len(known) == len(number_of):
        order = sorted(number_of, key=lambda name: number_of[name] or 0)
    else:
        order = class_order(number_of)
    label_of = {name: label for label, name in enumerate(order)}
    labels = np.array([label_of[image.class_text] for image in images], dtype=np.int64)
    return labels, tuple(order)
