"""Importer of DeepFashion In-Shop Clothes Retrieval (Liu et al., CVPR 2016)."""

from __future__ import annotations

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
)
from dml_dist.data.datasets.on_disk import find_listed
from dml_dist.errors import DataError

_LISTINGS = ("Eval/list_eval_partition.txt", "list_eval_partition.txt")
_COLUMNS = ("image_name", "item_id", "evaluation_status")
# evaluation_status -> split, role
_PARTS = {"train": ("train", "both"), "query": ("test", "query"), "gallery": ("test", "gallery")}
# Number of images looked up to find the folder that holds img/.
_TRIED = 100


class InShopImporter(OfficialImporter):
    """Classes are items; the test images are split into queries and gallery."""

    official = Official(
        "In-Shop Clothes Retrieval",
        {
            "train": Counts(3_997, 25_882),
            "test query": Counts(3_985, 14_218),
            "test gallery": Counts(3_985, 12_612),
        },
    )

    def listing(self, source: Path) -> Listing:
        """Read list_eval_partition.txt."""
        root = find_root(source, _LISTINGS, self.official.title)
        path = require_file(root, *_LISTINGS)
        differences: list[str] = []
        lines = read_lines(path)
        declared = int(lines.pop(0)[1]) if lines and lines[0][1].isdigit() else None
        if lines and lines[0][1].startswith(_COLUMNS[0]):
            lines.pop(0)
        images: list[ListedImage] = []
        for number, (name, item, status) in split_lines(path, lines, _COLUMNS):
            if status not in _PARTS:
                raise DataError(
                    f"{path}, line {number}: {_COLUMNS[2]} must be one of {', '.join(_PARTS)}, got "
                    f"{status!r}; extract the file from the official archive again"
                )
            split, role = _PARTS[status]
            images.append(ListedImage(name, item, split, role=role))
        if declared is None:
            differences.append(f"{path}: the first line must be the number of images")
        elif declared != len(images):
            differences.append(
                f"{path}: line 1 declares {declared:,} images, but {len(images):,} follow"
            )
        differences += _class_rule(images)
        return Listing(_base(root, images), images, [path], differences)


def _class_rule(images: list[ListedImage]) -> list[str]:
    """Return the items whose splits or roles break the class rule, one line each."""
    items = {
        status: {image.class_name for image in images if (image.split, image.role) == part}
        for status, part in _PARTS.items()
    }
    found = {
        "items are in train and in query or gallery": items["train"]
        & (items["query"] | items["gallery"]),
        "items are in query and not in gallery": items["query"] - items["gallery"],
        "items are in gallery and not in query": items["gallery"] - items["query"],
    }
    return [
        f"{len(names)} {what}: {first_few(sorted(names))}" for what, names in found.items() if names
    ]


def _base(root: Path, images: list[ListedImage]) -> Path:
    """Return the folder that holds img/: the root, or the folder that img.zip was unpacked to."""
    tried = [image.path for image in images[:_TRIED]]
    return max(
        [root, root / "Img", root / "img"],
        key=lambda place: sum(map(bool, find_listed(place, tried))),
    )
