"""The commit of the sources is found, and never that of an enclosing repository."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dml_dist.runs import provenance
from dml_dist.runs.provenance import GitState, git_revision


def git(folder: Path, *arguments: str) -> str:
    # A repository of its own: neither the user's settings nor the variables of a running hook.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    return subprocess.run(
        ["git", *identity, *arguments],
        cwd=folder,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def test_git_revision_follows_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_revision(tmp_path) == GitState(None, None)
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("x = 1\n")
    git(tmp_path, "init", "-q")
    assert git_revision(package) == GitState(None, None)  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "One")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert git_revision(package) == GitState(revision, dirty=False)
    (tmp_path / "notes.txt").write_text("outside of the package\n")
    assert git_revision(package) == GitState(revision, dirty=False)
    (package / "b.py").write_text("")
    assert git_revision(package) == GitState(revision, dirty=True)
    (package / "b.py").unlink()
    (package / "a.py").write_text("x = 2\n")
    assert git_revision(package) == GitState(revision, dirty=True)
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert git_revision(package) == GitState(revision, dirty=True)
    # Installed into a virtual environment that lies, ignored, inside someone else's repository.
    installed = tmp_path / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "a.py").write_text("")
    assert git_revision(installed) == GitState(None, None)
    monkeypatch.setenv("PATH", "")
    assert git_revision(package) == GitState(None, None)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "_PACKAGES", ("no-such-package", "torch"))
    assert sorted(provenance.installed_versions()) == ["python", "torch"]
