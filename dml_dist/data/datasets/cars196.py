"""Importer of Stanford Cars (Krause et al., 2013), in its three layouts.

`cars_annos.mat` with `car_ims/`; the later devkit with `cars_train/` and `cars_test/`; folders by
class. The official train/test split of all three is for classification, with every class in both
splits. It is not used: the first 98 classes are the training classes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dml_dist.data.datasets.class_numbers import class_numbers
from dml_dist.data.datasets.official import (
    Counts,
    ListedImage,
    Listing,
    Official,
    OfficialImporter,
    find_file,
    first_few,
    require_file,
)
from dml_dist.data.datasets.on_disk import is_image_name, visible
from dml_dist.errors import DataError

NUM_CLASSES = 196
_NUM_TRAIN_CLASSES = 98
_ANNOTATIONS = "cars_annos.mat"
_DEVKIT_FOLDERS = ("cars_train", "cars_test")


class Cars196Importer(OfficialImporter):
    """A class is a make, model and year, named by its official number and its name."""

    official = Official(
        "Cars196",
        {"train": Counts(98, 8_054), "test": Counts(98, 8_131)},
        archives={"car_ims.tgz": "d5c8f0aa497503f355e17dc7886c3f14"},
        metadata={_ANNOTATIONS: "b407c6086d669747186bd1d764ff9dbc"},
    )

    def listing(self, source: Path) -> Listing:
        """Read the source in whichever layout it has."""
        for root in _nested(source):
            folders = {name.lower() for name in visible(root)[0]}
            if find_file(root, _ANNOTATIONS) is not None:
                return _of_annotations(root)
            if folders & set(_DEVKIT_FOLDERS):
                return _of_devkit(root)
            if (splits := _class_folders(root)) is not None:
                return _of_class_folders(source, root, splits)
        raise DataError(
            f"source must be the folder of Cars196 with {_ANNOTATIONS} and car_ims/, with "
            "cars_train/, cars_test/ and the devkit's .mat files, or with one folder for each "
            f"class (also below train/ and test/); {source} is none of these"
        )


def _nested(source: Path) -> list[Path]:
    """Return the source and, because archives nest folders, each folder alone in its parent."""
    found = [source]
    while len(inner := visible(found[-1])[0]) == 1:
        found.append(found[-1] / inner[0])
    return found


def _listed(path: str, number: int, name: str | None) -> ListedImage:
    split = "train" if number <= _NUM_TRAIN_CLASSES else "test"
    return ListedImage(path, f"{number:03d}.{name}" if name else f"{number:03d}", split)


def _of_annotations(root: Path) -> Listing:
    path = require_file(root, _ANNOTATIONS)
    content = _load(path)
    paths, numbers = _columns(path, content, "relative_im_path", "class")
    names = _names(path, content)
    images = [_listed(p, n, names.get(n)) for p, n in zip(paths, numbers, strict=True)]
    return Listing(root, images, [path])


def _of_devkit(root: Path) -> Listing:
    places = ("devkit", "car_devkit/devkit", "car_devkit", ".")
    images: list[ListedImage] = []
    files: list[Path] = []
    differences: list[str] = []
    meta = find_file(root, *_in(places, "cars_meta.mat"))
    names = {} if meta is None else _names(meta, _load(meta))
    for folder, name in zip(
        _DEVKIT_FOLDERS, ("cars_train_annos.mat", "cars_test_annos_withlabels.mat"), strict=True
    ):
        path = find_file(root, *_in(places, name))
        if path is None:
            differences.append(
                f"{name} does not exist in {root} or its devkit/"
                + (
                    "; cars_test_annos.mat exists but has no classes"
                    if "withlabels" in name and find_file(root, *_in(places, "cars_test_annos.mat"))
                    else ""
                )
            )
            continue
        files.append(path)
        paths, numbers = _columns(path, _load(path), "fname", "class")
        # Some archives hold each folder in a folder of its name.
        prefix = f"{folder}/{folder}" if find_file(root, f"{folder}/{folder}") else folder
        images += [
            _listed(f"{prefix}/{p}", n, names.get(n)) for p, n in zip(paths, numbers, strict=True)
        ]
    return Listing(root, images, files, differences)


def _in(places: Sequence[str], name: str) -> list[str]:
    return [name if place == "." else f"{place}/{name}" for place in places]


def _class_folders(root: Path) -> list[str] | None:
    """Return the folders that hold class folders, "" for the root; None if there are no images."""

    def holds_classes(folder: Path) -> bool:
        return any(
            any(is_image_name(name) for name in visible(folder / inner)[1])
            for inner in visible(folder)[0]
        )

    folders = visible(root)[0]
    splits = [name for name in folders if name.lower() in ("train", "test", "val")]
    if splits and all(holds_classes(root / name) for name in splits):
        return splits
    return [""] if holds_classes(root) else None


def _of_class_folders(source: Path, root: Path, splits: Sequence[str]) -> Listing:
    """List images by folder; class numbers come from files next to them, or from folder names."""
    found: list[tuple[str, str, str]] = []  # split folder, class folder, file
    for split in splits:
        for folder in visible(root / split)[0]:
            names = visible(root / split / folder)[1]
            found += [(split, folder, name) for name in names if is_image_name(name)]
    numbering = class_numbers(source, root, found)
    images = [
        _listed("/".join(part for part in parts if part), *_numbered(parts[1], numbering.number_of))
        for parts in found
    ]
    return Listing(root, images, numbering.files, numbering.differences)


def _numbered(folder: str, number_of: dict[str, int]) -> tuple[int, str | None]:
    """Return the number of a class folder and its name without that number."""
    match = re.fullmatch(r"(\d+)(?:[. _-]+(.+))?", folder)
    if match is not None and int(match[1]) == number_of[folder]:
        return number_of[folder], match[2]
    return number_of[folder], folder


def _load(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(path, squeeze_me=True)
    # A damaged file can raise any exception inside the reader.
    except Exception as error:
        raise DataError(
            f"{path} cannot be read as a MATLAB file ({error}); extract it from the official "
            "archive again"
        ) from error
    return content


def _columns(
    path: Path, content: dict[str, Any], name_field: str, class_field: str
) -> tuple[list[str], list[int]]:
    """Return the file name and the class of every annotation."""
    annotations = np.atleast_1d(content.get("annotations", np.empty(0)))
    fields = annotations.dtype.names or ()
    if name_field not in fields or class_field not in fields:
        raise DataError(
            f"{path} must have annotations with {name_field} and {class_field}, but has "
            f"{', '.join(fields) or 'none'}; extract the file from the official archive again"
        )
    numbers = [int(value) for value in annotations[class_field].tolist()]
    invalid = sorted({str(number) for number in numbers if not 1 <= number <= NUM_CLASSES})
    if invalid:
        raise DataError(
            f"{path}: classes are 1 to {NUM_CLASSES}, got {first_few(invalid)}; extract the file "
            "from the official archive again"
        )
    return [str(value) for value in annotations[name_field].tolist()], numbers


def _names(path: Path, content: dict[str, Any]) -> dict[int, str]:
    """Return the name of each class number; repeated names, which would merge classes, raise."""
    names = [str(name).strip() for name in np.atleast_1d(content.get("class_names", [])).tolist()]
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise DataError(
            f"{path}: class names must be unique, but these are repeated: {first_few(twice)}"
        )
    return dict(enumerate(names, start=1))
