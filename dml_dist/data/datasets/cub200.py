"""Importer of Caltech-UCSD Birds-200-2011 (Wah et al., 2011)."""

from __future__ import annotations

import re
from pathlib import Path

from dml_dist.data.datasets.official import (
    Counts,
    ListedImage,
    Listing,
    Official,
    OfficialImporter,
    find_root,
    first_few,
    read_lines,
    require_file,
    split_lines,
    whole_number,
)
from dml_dist.errors import DataError

_TRAIN_CLASSES = range(1, 101)
_TEST_CLASSES = range(101, 201)


class CUB200Importer(OfficialImporter):
    """The first 100 classes train; train_test_split.txt, meant for classification, is not used."""

    official = Official(
        "CUB-200-2011",
        {"train": Counts(100, 5_864), "test": Counts(100, 5_924)},
        archives={"CUB_200_2011.tgz": "97eceeb196236b17998738112f37df78"},
    )

    def listing(self, source: Path) -> Listing:
        """Read images.txt, image_class_labels.txt and classes.txt."""
        root = find_root(source, ["images.txt"], self.official.title)
        files = [
            require_file(root, name)
            for name in ("images.txt", "image_class_labels.txt", "classes.txt")
        ]
        path_of = _table(files[0], "image_id", "path")
        label_of = {
            image_id: whole_number(files[1], number, "class_id", text)
            for image_id, (number, text) in _table(files[1], "image_id", "class_id").items()
        }
        name_of = {label: name for label, (_, name) in _table(files[2], "class_id", "name").items()}
        images: list[ListedImage] = []
        misplaced: list[str] = []
        for image_id, (number, path) in path_of.items():
            label, folder = label_of.get(image_id), path.partition("/")[0]
            if label is None:
                continue
            if label not in _TRAIN_CLASSES and label not in _TEST_CLASSES:
                raise DataError(
                    f"{files[1]}: classes are 1 to {_TEST_CLASSES[-1]}, image {image_id} has "
                    f"{label}; extract the file from the official archive again"
                )
            in_name = re.match(r"\d+", folder)
            if in_name and int(in_name[0]) != label:
                misplaced.append(f"{path} (line {number}) has class {label}")
            split = "train" if label in _TRAIN_CLASSES else "test"
            images.append(ListedImage(path, name_of.get(label, folder), split))
        unnamed = sorted({label_of[i] for i in path_of if i in label_of} - name_of.keys())
        found = {
            f"images of {files[0].name} without a class in {files[1].name}": [
                path for image_id, (_, path) in path_of.items() if image_id not in label_of
            ],
            f"classes in {files[1].name} of images missing from {files[0].name}": [
                f"image {image_id}" for image_id in label_of if image_id not in path_of
            ],
            f"classes without a name in {files[2].name}, named after their folders": [
                str(label) for label in unnamed
            ],
            "images in the folder of another class": misplaced,
        }
        differences = [
            f"{len(items)} {what}: {first_few(items)}" for what, items in found.items() if items
        ]
        return Listing(root / "images", images, files, differences)


def _table(path: Path, *columns: str) -> dict[int, tuple[int, str]]:
    """Return number -> (line, text) of a file of two columns."""
    table: dict[int, tuple[int, str]] = {}
    for number, (key, text) in split_lines(path, read_lines(path), columns):
        at = whole_number(path, number, columns[0], key)
        if at in table:
            raise DataError(
                f"{path}, line {number}: every {columns[0]} must occur once, but {at} is also in "
                f"line {table[at][0]}; extract the file from the official archive again"
            )
        table[at] = (number, text)
    return table
