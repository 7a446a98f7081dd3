"""The summary of an import or of indexing: skipped and duplicate images, EXIF orientations.

`import.json` holds the numbers; `skipped.csv` and `duplicates.csv` list every case and exist only
where there is one. They are written before the index, so a finished import has them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dml_dist.data.duplicates import Copies
from dml_dist.data.fingerprint import BITS, NEAR_BITS
from dml_dist.data.index import Index
from dml_dist.files import read_json, write_json_atomic, write_text_atomic
from dml_dist.terminal import csv_text

SUMMARY_NAME = "import.json"
SKIPPED_NAME = "skipped.csv"
DUPLICATES_NAME = "duplicates.csv"
_SHOWN = 3


@dataclass(frozen=True)
class SkippedImage:
    """A broken image that an import, or indexing, left out."""

    key: str
    split: str
    class_name: str

    reason: str
    """Names the file and says what is wrong with the image."""


@dataclass(frozen=True)
class CopyCount:
    """How many images of a split are in another one too; in their own: more than once."""

    split: str
    other_split: str

    num_images: int
    """Images of `split`."""

    exact: int
    """Images whose very bytes are in `other_split`."""

    near: int
    """Others that look like an image there: at most NEAR_BITS of 128 bits differ."""

    first: tuple[str, ...]
    """Descriptions of the first of them."""


@dataclass(frozen=True)
class ImportSummary:
    """The numbers of an import."""

    num_skipped: int
    first_skipped: tuple[str, ...]

    lost_classes: tuple[str, ...]
    """Classes of which every image was skipped."""

    copies: tuple[CopyCount, ...]
    """Splits and pairs of splits with copies."""

    num_turned: int = 0
    """Images with an EXIF orientation other than upright."""

    def lines(self, root: Path) -> list[str]:
        """Return the lines to show after an import, none if there is nothing to report."""
        lines = []
        if self.num_skipped:
            lines.append(
                f"skipped {self.num_skipped:,} broken images, all in {root / SKIPPED_NAME}, first:"
            )
            lines += [f"  {reason}" for reason in self.first_skipped]
        if self.lost_classes:
            named = ", ".join(self.lost_classes[:_SHOWN])
            lines.append(
                f"{len(self.lost_classes):,} classes have only broken images and are left out: "
                f"{named}{', ...' if len(self.lost_classes) > _SHOWN else ''}"
            )
        if self.num_turned:
            lines.append(
                f"{self.num_turned:,} images have an EXIF orientation; `data.exif: apply` (the "
                "default) turns them upright, `ignore` reads them as stored"
            )
        for count in self.copies:
            where = (
                "more than once in it"
                if count.split == count.other_split
                else f"also in {count.other_split}"
            )
            near = (
                f", {count.near:,} by appearance ({NEAR_BITS} of {BITS} bits)" if count.near else ""
            )
            lines.append(
                f"duplicates: of {count.num_images:,} images in {count.split} {where}: "
                f"{count.exact:,} by bytes{near}; all in {root / DUPLICATES_NAME}, first:"
            )
            lines += [f"  {text}" for text in count.first]
        return lines


def write_summary(
    index: Index,
    skipped: Sequence[SkippedImage],
    lost_classes: Sequence[str],
    copies: Sequence[Copies],
    num_turned: int,
) -> None:
    """Write the summary and its lists, before the index is written."""
    skips = [(item.key, item.split, item.class_name, item.reason) for item in skipped]
    _write_csv(index.root / SKIPPED_NAME, ("key", "split", "class", "reason"), skips)
    found = [item for item in copies if len(item.rows)]
    _write_csv(
        index.root / DUPLICATES_NAME,
        ("kind", "bits", *_image_columns(""), *_image_columns("other_")),
        [row for item in found for row in _copy_rows(index, item)],
    )
    summary = ImportSummary(
        num_skipped=len(skipped),
        first_skipped=tuple(item.reason for item in skipped[:_SHOWN]),
        lost_classes=tuple(lost_classes),
        copies=tuple(_count(index, item) for item in found),
        num_turned=num_turned,
    )
    write_json_atomic(index.root / SUMMARY_NAME, dataclasses.asdict(summary))


def read_summary(root: Path) -> ImportSummary | None:
    """Return the summary of a finished import, None if the shards were made without one.

    Raises:
        DataError: If the file is damaged.
    """
    try:
        values = read_json(root / SUMMARY_NAME)
    except FileNotFoundError:
        return None
    return ImportSummary(
        num_skipped=values["num_skipped"],
        first_skipped=tuple(values["first_skipped"]),
        lost_classes=tuple(values["lost_classes"]),
        copies=tuple(
            CopyCount(**{**item, "first": tuple(item["first"])}) for item in values["copies"]
        ),
        num_turned=values.get("num_turned", 0),  # older imports did not count them
    )


def _count(index: Index, copies: Copies) -> CopyCount:
    order = sorted(range(len(copies.rows)), key=lambda at: (copies.bits[at], copies.rows[at]))
    shown = []
    for at in order[:_SHOWN]:
        row, other = int(copies.rows[at]), int(copies.other_rows[at])
        same = "the same class" if index.label[row] == index.label[other] else "another class"
        what = "is" if copies.bits[at] < 0 else "looks like"
        shown.append(f"{index.keys[row]} {what} {index.keys[other]} of {same}")
    return CopyCount(
        copies.split,
        copies.other_split,
        copies.num_images,
        copies.num_exact,
        copies.num_near,
        tuple(shown),
    )


def _image_columns(prefix: str) -> tuple[str, ...]:
    return tuple(prefix + name for name in ("split", "role", "class", "key"))


def _copy_rows(index: Index, copies: Copies) -> Iterable[tuple[object, ...]]:
    def image(row: int) -> tuple[str, ...]:
        class_name = index.class_names[index.label[row]]
        return index.split[row], index.role[row], class_name, index.keys[row]

    for row, other, bits in zip(
        copies.rows.tolist(), copies.other_rows.tolist(), copies.bits.tolist(), strict=True
    ):
        kind = "exact" if bits < 0 else "near"
        yield kind, max(bits, 0), *image(row), *image(other)


def _write_csv(path: Path, names: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table, or no file if it has no rows."""
    if not rows:
        path.unlink(missing_ok=True)
        return
    write_text_atomic(path, csv_text(names, rows))
