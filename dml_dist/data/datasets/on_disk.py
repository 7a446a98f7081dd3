"""Lists of the images in a folder, and lookup of listed files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dml_dist.data.sample import IMAGE_EXTENSIONS


def visible(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of the folders and files that are not hidden."""
    folders: list[str] = []
    files: list[str] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            # macOS adds ._* files to archives.
            if not entry.name.startswith(".") and entry.name != "__MACOSX":
                (folders if entry.is_dir() else files).append(entry.name)
    return sorted(folders), sorted(files)


def hidden_images(root: Path) -> list[str]:
    """Return the images below a folder that `visible` leaves out, but for the ._* of macOS."""
    found = []
    for folder, folders, names in os.walk(root):
        inside = os.path.relpath(folder, root)
        hidden = any(part.startswith(".") for part in inside.split(os.sep) if part != ".")
        found += [
            os.path.normpath(os.path.join(inside, name))
            for name in names
            if is_image_name(name)
            and not name.startswith("._")
            and (hidden or name.startswith("."))
        ]
        folders[:] = [name for name in folders if name != "__MACOSX"]
    return sorted(found)


def file_kind(name: str) -> str:
    """Return the extension of a file name, lower case, with its dot."""
    return os.path.splitext(name)[1].lower()


def is_image_name(name: str) -> bool:
    """Tell whether a file name has the extension of an image."""
    return file_kind(name)[1:] in IMAGE_EXTENSIONS


def find_listed(base: Path, listed: Sequence[str]) -> list[str | None]:
    """Return the file of each listed path, None for a missing one.

    If a folder or file of the exact name does not exist, one that differs only in letter case is
    used (a listing may say .JPG where the file is .jpg).

    Args:
        base: The folder that the paths are relative to.
        listed: Paths with `/` between folders.
    """
    folders: dict[str, str | None] = {"": str(base)}
    names: dict[str, dict[str, str]] = {}

    def inside(folder: str | None, name: str) -> str | None:
        if folder is None:
            return None
        if folder not in names:
            names[folder] = _names(folder)
        known = names[folder]
        found = known.get(name) or known.get(_folded(name))
        return None if found is None else os.path.join(folder, found)

    def folder_of(path: str) -> str | None:
        if path not in folders:
            parent, _, name = path.rpartition("/")
            folders[path] = inside(folder_of(parent), name)
        return folders[path]

    found = []
    for path in listed:
        folder, _, name = path.rpartition("/")
        found.append(inside(folder_of(folder), name))
    return found


def num_other_images(files: Sequence[str]) -> int:
    """Return the number of other images in the folders of these files."""
    known = set(files)
    return sum(
        is_image_name(name) and os.path.join(folder, name) not in known
        for folder in sorted({os.path.dirname(file) for file in files})
        for name in visible(Path(folder))[1]
    )


def _names(folder: str) -> dict[str, str]:
    """Return the names in a folder, keyed by name and by `_folded` name."""
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    return {_folded(name): name for name in reversed(names)} | {name: name for name in names}


def _folded(name: str) -> str:
    return "/" + name.lower()  # No file name begins with a slash.
