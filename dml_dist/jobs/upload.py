"""The package that a Ray job starts with: code and configuration below a folder, as a zip file."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dml_dist.errors import ConfigError

MAX_BYTES = 100 * 2**20
"""Ray's head takes no larger package over HTTP."""

# What a folder holds that is an environment, a run, a folder of runs, or a data set.
_MARKS = ("pyvenv.cfg", "conda-meta", "run.json", ".jobs", "index.parquet")
_NAMED_FILES = 5
_EPOCH = (1980, 1, 1, 0, 0, 0)


def files_to_upload(folder: Path) -> list[Path]:
    """Return the files that git tracks or does not ignore, relative to the folder and sorted.

    Untracked environments, runs and data sets are left out even where no .gitignore names them.
    The folder need not be a repository.

    Raises:
        ConfigError: If git is not installed, or fails.
    """
    try:
        tracked = set(_git(folder, "--cached"))
        others = _git(folder, "--others", "--exclude-standard")
    except subprocess.CalledProcessError:  # Not in a repository.
        with tempfile.TemporaryDirectory() as empty:
            subprocess.run(["git", "init", "--quiet", "--bare", empty], check=True)
            repository = ("--git-dir", empty, "--work-tree", ".")
            tracked = set()
            others = _git(
                folder, "--others", "--exclude-per-directory=.gitignore", options=repository
            )
    marked: dict[Path, bool] = {}
    chosen = tracked | {path for path in others if not _is_marked(folder, path.parent, marked)}
    # A tracked file may have been deleted; a submodule is a folder.
    return sorted(path for path in chosen if (folder / path).is_file())


def pack(folder: Path, files: Sequence[Path]) -> bytes:
    """Return a zip file of some files; equal contents give equal bytes.

    Raises:
        ConfigError: If they have more than MAX_BYTES.
    """
    sizes = {path: (folder / path).stat().st_size for path in files}
    total = sum(sizes.values())
    if total > MAX_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:_NAMED_FILES]
        named = ", ".join(f"{path} ({sizes[path] / 2**20:,.1f} MiB)" for path in largest)
        raise ConfigError(
            f"the files below {folder} that git does not ignore have {total / 2**20:,.0f} MiB, and "
            f"Ray takes {MAX_BYTES / 2**20:.0f} MiB; the largest are {named}. Name them in "
            ".gitignore, or install the package on the cluster and give --set upload=false"
        )
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(path.as_posix(), _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = ((folder / path).stat().st_mode & 0xFFFF) << 16
            archive.writestr(entry, (folder / path).read_bytes())
    return buffer.getvalue()


def package_name(package: bytes) -> str:
    """Return the name of a package in the cluster, which depends on its bytes alone."""
    return f"_ray_pkg_{hashlib.sha256(package).hexdigest()[:32]}.zip"


def _is_marked(folder: Path, inside: Path, known: dict[Path, bool]) -> bool:
    """Whether a folder, or one above it up to `folder`, is none of code and configuration."""
    if inside not in known:
        here = inside != Path() and any((folder / inside / mark).exists() for mark in _MARKS)
        known[inside] = here or (inside != Path() and _is_marked(folder, inside.parent, known))
    return known[inside]


def _git(folder: Path, *options_of_ls_files: str, options: Sequence[str] = ()) -> list[Path]:
    try:
        listed = subprocess.run(
            ["git", *options, "ls-files", "-z", *options_of_ls_files],
            cwd=folder,
            capture_output=True,
            check=True,
        )
    except FileNotFoundError:
        raise ConfigError(
            "the files of a job are those that git does not ignore, but git is not installed: "
            "install it, or install the package on the cluster and give --set upload=false"
        ) from None
    return [Path(os.fsdecode(name)) for name in listed.stdout.split(b"\0") if name]
