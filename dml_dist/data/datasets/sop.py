"""Importer of Stanford Online Products (Song et al., CVPR 2016): photos of products."""

from __future__ import annotations

from pathlib import Path

from dml_dist.data.datasets.official import (
    Counts,
    ListedImage,
    Listing,
    Official,
    OfficialImporter,
    find_file,
    find_root,
    first_few,
    read_lines,
    split_lines,
    whole_number,
)

# Listing, split, and the class ids of that split.
_PARTS = (
    ("Ebay_train.txt", "train", range(1, 11_319)),
    ("Ebay_test.txt", "test", range(11_319, 22_635)),
)
_NUM_SUPER_CLASSES = 12
_COLUMNS = ("image_id", "class_id", "super_class_id", "path")


class SOPImporter(OfficialImporter):
    """Classes are products, super-classes their categories; the listings define the split."""

    official = Official(
        "Stanford Online Products",
        {"train": Counts(11_318, 59_551), "test": Counts(11_316, 60_502)},
        archives={"Stanford_Online_Products.zip": "7f73d41a2f44250d4779881525aea32e"},
    )

    def listing(self, source: Path) -> Listing:
        """Read both listings."""
        root = find_root(source, [name for name, *_ in _PARTS], self.official.title)
        images: list[ListedImage] = []
        files: list[Path] = []
        differences: list[str] = []
        super_class_of: dict[int, str] = {}
        for name, split, expected in _PARTS:
            path = find_file(root, name)
            if path is None:
                differences.append(f"{root / name} does not exist")
                continue
            files.append(path)
            invalid: list[str] = []
            for number, fields in split_lines(path, _without_header(path), _COLUMNS):
                class_id, super_class_id = (
                    whole_number(path, number, column, text)
                    for column, text in zip(_COLUMNS[1:3], fields[1:3], strict=True)
                )
                image_path = fields[3]
                super_class = image_path.partition("/")[0].removesuffix("_final")
                if class_id not in expected:
                    invalid.append(f"{class_id} in line {number}")
                if super_class_of.setdefault(super_class_id, super_class) != super_class:
                    differences.append(
                        f"{path}, line {number}: super-class {super_class_id} is "
                        f"{super_class_of[super_class_id]} elsewhere and {super_class} here"
                    )
                images.append(ListedImage(image_path, str(class_id), split, super_class))
            if invalid:
                differences.append(
                    f"{path}: classes of {split} are {expected[0]} to {expected[-1]}, "
                    f"{len(invalid)} lines have others: {first_few(invalid)}"
                )
        found = len({image.super_class for image in images})
        if found != _NUM_SUPER_CLASSES:
            differences.append(f"super-classes: {_NUM_SUPER_CLASSES} published, {found} found")
        return Listing(root, images, files, differences)


def _without_header(path: Path) -> list[tuple[int, str]]:
    lines = read_lines(path)
    return lines[1:] if lines and lines[0][1].startswith(_COLUMNS[0]) else lines
