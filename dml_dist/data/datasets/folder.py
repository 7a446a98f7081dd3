"""Importer of a folder of class folders, or of train/ and test/ folders that hold them."""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dml_dist.config.data import FolderConfig, SplitConfig
from dml_dist.data.datasets.expected import check_expected, expected_facts
from dml_dist.data.datasets.on_disk import file_kind, hidden_images, visible
from dml_dist.data.labels import class_texts
from dml_dist.data.sample import (
    IMAGE_EXTENSIONS,
    DatasetFacts,
    FileSource,
    Sample,
    facts_of,
    make_keys,
)
from dml_dist.data.split import assign_splits
from dml_dist.errors import DataError

SPLIT_FOLDERS = ("train", "test", "val")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FolderImporter:
    """Images of a folder; the class of an image is the name of its parent folder."""

    config: FolderConfig

    def samples(self) -> list[Sample]:
        """List all images, sorted by path.

        Raises:
            DataError: If the source does not exist, has no images or an empty class folder, or
                the split does not fit.
        """
        return self._samples

    def facts(self) -> DatasetFacts:
        """Count the images of each class; without the source, return the expected counts."""
        return expected_facts(self.config) or facts_of(self._samples)

    @cached_property
    def _samples(self) -> list[Sample]:
        samples = self._listed()
        check_expected(self.config.expected, samples, self.config.source)
        return samples

    def _listed(self) -> list[Sample]:
        root = Path(os.path.abspath(self.config.source))
        if not root.is_dir():
            raise DataError(
                f"source must be a folder with images, {self.config.source} "
                f"{'is a file' if root.exists() else 'does not exist'}"
            )
        folders, files = visible(root)
        if not folders:
            raise DataError(
                f"{root} must hold one folder for each class, but it holds no folder "
                f"({len(files)} files); use a table for images without class folders"
            )
        if set(folders) <= set(SPLIT_FOLDERS) and all(visible(root / f)[0] for f in folders):
            return self._of_split_folders(root, folders)
        found, skipped = _images(root, "", folders)
        _report_skipped(root, skipped + Counter(file_kind(name) for name in files))
        found = _with_class_texts(root, found)
        paths = [path for path, _ in found]
        splits = assign_splits(paths, [name for _, name in found], self.config.split)
        return _make_samples(root, found, splits)

    def _of_split_folders(self, root: Path, folders: list[str]) -> list[Sample]:
        if self.config.split != SplitConfig():
            _log.warning(
                "%s: the split setting is not used, because %s/ exist", root, "/, ".join(folders)
            )
        if "val" in folders:
            _log.warning(
                "%s: val/ is imported as the split 'val', which is not used unless "
                "data.train_split or data.test_split names it; validation uses classes of the "
                "training split",
                root,
            )
        found: list[tuple[str, str]] = []
        splits: list[str] = []
        all_skipped: Counter[str] = Counter()
        for split in folders:
            class_folders, files = visible(root / split)
            images, skipped = _images(root, f"{split}/", class_folders)
            all_skipped += skipped + Counter(file_kind(name) for name in files)
            found += images
            splits += [split] * len(images)
        _report_skipped(root, all_skipped)
        found = _with_class_texts(root, found)
        split_count = Counter(
            name for name, _ in {(name, s) for (_, name), s in zip(found, splits, strict=True)}
        )
        shared = sorted(name for name, count in split_count.items() if count > 1)
        if shared:
            _log.warning(
                "%s: %d of %d classes are in more than one of %s/ (%s); they are not unseen",
                root, len(shared), len(split_count), "/, ".join(folders), ", ".join(shared[:5]),
            )  # fmt: skip
        return _make_samples(root, found, splits)


def _with_class_texts(root: Path, found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Apply the label rule to the names of class folders."""
    names = class_texts([name for _, name in found], str(root), "class folder")
    return [(path, name) for (path, _), name in zip(found, names, strict=True)]


def _make_samples(root: Path, found: list[tuple[str, str]], splits: list[str]) -> list[Sample]:
    keys = make_keys([path for path, _ in found])
    return [
        Sample(key, class_name, split, FileSource(os.path.join(root, path), path))
        for key, (path, class_name), split in zip(keys, found, splits, strict=True)
    ]


def _images(
    root: Path, prefix: str, folders: list[str]
) -> tuple[list[tuple[str, str]], Counter[str]]:
    """Return (path relative to root, class name) of all images, and the kinds of other files."""
    found: list[tuple[str, str]] = []
    skipped: Counter[str] = Counter()
    for folder in folders:
        where = root / prefix / folder
        inner, names = visible(where)
        images = [name for name in names if file_kind(name)[1:] in IMAGE_EXTENSIONS]
        if inner:
            raise DataError(
                f"{where} is a class folder and must hold images only, but it holds the folder "
                f"{inner[0]}; give {where} as the source if its folders are the classes"
            )
        if not images:
            raise DataError(
                f"{where} must hold at least one image "
                f"({', '.join(sorted(IMAGE_EXTENSIONS))}) because it is a class folder, but it "
                f"holds {len(names)} other files; remove the folder or add its images"
            )
        skipped.update(
            file_kind(name) for name in names if file_kind(name)[1:] not in IMAGE_EXTENSIONS
        )
        found += [(f"{prefix}{folder}/{name}", folder) for name in images]
    return found, skipped


def _report_skipped(root: Path, skipped: Counter[str]) -> None:
    if hidden := hidden_images(root):
        _log.warning(
            "%s: %d images in hidden folders or files are left out: %s",
            root, len(hidden), ", ".join(hidden[:3]) + (", ..." if len(hidden) > 3 else ""),
        )  # fmt: skip
    if skipped:
        kinds = ", ".join(f"{kind or 'none'} ({count})" for kind, count in sorted(skipped.items()))
        _log.warning("%s: files without an image extension are left out: %s", root, kinds)
