"""URLs: how they are recognized and joined, and where they are not allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dml_dist.errors import ConfigError
from dml_dist.runs.folder import RunFolder
from dml_dist.urls import is_url, join_url, local_path, redact_url


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("s3://bucket/a", True),
        ("s3:/bucket/a", True),  # As a path object writes it.
        ("HTTP://host/a", True),
        ("memory://a", True),
        ("file:///a", True),
        ("a/b", False),
        ("/a/b", False),
        ("~/a", False),
        ("c:/a", False),
        ("a=b", False),
        ("a/s3://b", False),
    ],
)
def test_a_url_names_a_protocol(location: str, expected: bool) -> None:
    assert is_url(location) is expected
    assert is_url(Path(location)) is expected


def test_a_path_and_a_file_url_are_local() -> None:
    assert local_path("a/b") == Path("a/b")
    assert local_path("~") == Path.home()
    assert local_path("file:///a/b%20c") == Path("/a/b c")
    assert local_path("s3://bucket/a") is None


def test_names_are_appended_before_a_query() -> None:
    assert join_url("s3://bucket/a/", "b/c#1.tar") == "s3://bucket/a/b/c#1.tar"
    assert join_url("https://host/a/", "b/c #1.tar") == "https://host/a/b/c%20%231.tar"
    signed = join_url("https://me:word@host:1/a?key=1", "b.tar")
    assert signed == "https://me:word@host:1/a/b.tar?key=1"
    assert redact_url(signed) == "https://host:1/a/b.tar"
    assert redact_url("s3://bucket/a") == "s3://bucket/a"


@pytest.mark.parametrize("url", ["s3://bucket/runs/a", "gs://bucket/a", "https://host/a"])
def test_a_run_folder_behind_a_url_is_rejected(url: str) -> None:
    for path in (url, Path(url)):
        with pytest.raises(ConfigError, match="POSIX file system shared by the nodes, got the URL"):
            RunFolder(path)  # type: ignore[arg-type]
