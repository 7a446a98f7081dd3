"""The code of a run: versions of packages, and the git commit of the sources."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

_PACKAGES = (
    "dml-dist",
    "torch",
    "torchvision",
    "ray",
    "faiss-gpu",
    "faiss-cpu",
    "webdataset",
    "pyarrow",
    "numpy",
    "pydantic",
    "zuko",
)


@dataclass(frozen=True)
class GitState:
    """The source checkout that the package was imported from.

    Attributes:
        revision: Full hash of the commit; None when the package is not in a checkout.
        dirty: Whether the package's files differ from that commit; None without a revision.
    """

    revision: str | None = None
    dirty: bool | None = None


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # It is optional, or another package provides the same module.
    return versions


def git_revision(folder: Path) -> GitState:
    """Return the git commit that the sources in a folder are checked out from.

    There is none without git, or if the folder's files are not tracked (such as a wheel installed
    into a virtual environment inside another repository).
    """
    # Inside a hook, git's variables point to another repository; status must not lock.
    environment = {key: text for key, text in os.environ.items() if not key.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments],
                env=environment,
                capture_output=True,
                text=True,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = git("rev-parse", "--verify", "HEAD")
    if revision is None or not git("ls-files", "--", "*.py"):
        return GitState()
    status = git("status", "--porcelain", "--", ".")
    return GitState(revision, dirty=None if status is None else bool(status))
