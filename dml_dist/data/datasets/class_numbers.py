"""Official class numbers for images in folders named after their classes."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dml_dist.data.datasets.official import first_few
from dml_dist.data.datasets.on_disk import visible
from dml_dist.errors import DataError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassNumbers:
    """The number of each class folder, and where it was read."""

    number_of: dict[str, int]
    """Folder name -> number from 1."""

    files: list[Path]
    """The files that the numbers were read from; empty if they follow from the folder names."""

    differences: list[str]
    """Contradictions between the files and the folders, one line each."""


def class_numbers(source: Path, root: Path, images: Sequence[tuple[str, str, str]]) -> ClassNumbers:
    """Number class folders by annotation tables, a list of names, or the folder names.

    They are tried in this order: `anno_train.csv` and `anno_test.csv` (file name first, class
    last), `names.csv` (one name per line), leading numbers of all folder names, and the sorted
    order of the folder names.

    Args:
        source: The folder that the user gave.
        root: The folder in it that holds the images.
        images: Split folder ("" if none), class folder and file name of each image.
    """
    folders = sorted({folder for _, folder, _ in images})
    differences: list[str] = []
    tables = {path.name.lower(): path for place in (source, root) for path in _csv_files(place)}
    annotations = {
        split: path
        for split in sorted({split for split, _, _ in images})
        if (path := tables.get(f"anno_{split.lower()}.csv" if split else "anno.csv"))
    }
    if annotations:
        found = _by_annotations(annotations, images)
        if len(found.number_of) == len(folders):
            return found
        missing = [folder for folder in folders if folder not in found.number_of]
        differences.append(
            f"{', '.join(map(str, found.files))}: no image of these folders is in them, so they "
            f"are not used: {first_few(missing)}"
        )
    if (path := tables.get("names.csv")) is not None:
        numbers, files = _by_names(path, folders), [path]
    else:
        numbers, files = _by_folder_names(root, folders), []
    return ClassNumbers(numbers, files, differences)


def _csv_files(folder: Path) -> list[Path]:
    return [folder / name for name in visible(folder)[1] if name.lower().endswith(".csv")]


def _by_annotations(
    annotations: dict[str, Path], images: Sequence[tuple[str, str, str]]
) -> ClassNumbers:
    votes: dict[str, Counter[int]] = {}
    for split, path in annotations.items():
        number_of_file = _read_annotations(path)
        for folder, name in ((folder, name) for s, folder, name in images if s == split):
            if name in number_of_file:
                votes.setdefault(folder, Counter())[number_of_file[name]] += 1
    number_of = {folder: count.most_common(1)[0][0] for folder, count in votes.items()}
    mixed = [folder for folder, count in votes.items() if len(count) > 1]
    shared = [n for n, times in Counter(number_of.values()).items() if times > 1]
    files = list(annotations.values())
    where = ", ".join(str(path) for path in files)
    differences = [
        f"{where}: images of one folder have several classes: {first_few(mixed)}"
    ] * bool(mixed)
    if shared:
        differences.append(
            f"{where}: several folders have one class: {first_few([str(n) for n in shared])}"
        )
    return ClassNumbers(number_of, files, differences)


def _read_annotations(path: Path) -> dict[str, int]:
    rows = _rows(path)
    if rows and not rows[0][-1].strip().isdigit():  # a header
        rows = rows[1:]
    found: dict[str, int] = {}
    for at, row in enumerate(rows, start=1):
        if not row[-1].strip().isdigit():
            raise DataError(
                f"{path}, row {at}: the last column must be the number of a class, got "
                f"{row[-1][:80]!r}; download the file again from the source of the images"
            )
        found[row[0].strip()] = int(row[-1])
    return found


def _by_names(path: Path, folders: Sequence[str]) -> dict[str, int]:
    # A name may hold a comma; a folder cannot hold the slash of "Ram C/V".
    names = [_plain(",".join(row)) for row in _rows(path)]
    number_of = {name: at for at, name in reversed(list(enumerate(names, start=1)))}
    unknown = [folder for folder in folders if _plain(folder) not in number_of]
    if unknown:
        raise DataError(
            f"{path}: every class folder must be named in it, these are not: {first_few(unknown)}; "
            "download the file again from the source of the images, or remove it"
        )
    return {folder: number_of[_plain(folder)] for folder in folders}


def _by_folder_names(root: Path, folders: Sequence[str]) -> dict[str, int]:
    matches = {folder: re.match(r"\d+", folder) for folder in folders}
    leading = {folder: int(match[0]) for folder, match in matches.items() if match}
    if len(leading) == len(folders) == len(set(leading.values())) and min(leading.values()) >= 1:
        return leading
    _log.warning(
        "%s: no table gives the numbers of the classes, so they follow the sorted folder names; "
        "add anno_train.csv and anno_test.csv, or names.csv, for the official numbers",
        root,
    )
    return {folder: at for at, folder in enumerate(folders, start=1)}


def _rows(path: Path) -> list[list[str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return [row for row in csv.reader(file) if any(field.strip() for field in row)]


def _plain(name: str) -> str:
    return re.sub(r"[^\w]+", " ", name).strip().casefold()
