"""URLs: how they are recognized and joined, and where they are not allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from dml_dist.errors import ConfigError
from dml_dist.runs.folder import RunFolder
from dml_dist.urls import has_secret, is_url, join_url, local_path, shown_url


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


@pytest.mark.parametrize("url", ["s3://bucket/runs/a", "gs://bucket/a", "https://host/a"])
def test_a_run_folder_behind_a_url_is_rejected(url: str) -> None:
    for path in (url, Path(url)):
        with pytest.raises(ConfigError, match="POSIX file system shared by the nodes, got the URL"):
            RunFolder(path)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:word@host:1/a/b.tar?key=1", "https://***@host:1/a/b.tar?***"),
        ("https://token@host/a", "https://***@host/a"),
        ("https://host/a?sig=x%2By&se=2", "https://host/a?***"),
        ("https://host/a?token", "https://host/a?***"),
        ("https://host/a#access_token=x", "https://host/a#***"),
        ("https:/me:word@host/a", "https:/***@host/a"),  # as a path object writes it
        ("HTTPS://me:word@host/a", "HTTPS://***@host/a"),
        ("ftp://me:w@rd@host/a", "ftp://***@host/a"),
        ("https://me:w/r?d#1@host/a", "https://***@host/a"),
        ("https://me:wo'r\"d@host/a", "https://***@host/a"),
        ("s3://id:key@bucket/a", "s3://***@bucket/a"),
        ("s3://bucket/a?version=1", "s3://bucket/a?***"),
        ("simplecache::https://me:word@host/a", "simplecache::https://***@host/a"),
        ("postgresql+psycopg://me:word@host/a", "postgresql+psycopg://***@host/a"),
        ("GET https://me:w@h/a?x=1: denied", "GET https://***@h/a?***: denied"),
        ("(see https://h/a?x=1), then", "(see https://h/a?***), then"),
        ("--set 'data.path=https://me:w@h/a' --x", "--set 'data.path=https://***@h/a' --x"),
        ('path: "https://me:w@h/a?b=1"\nnext: 1', 'path: "https://***@h/a?***"\nnext: 1'),
        # Nothing to hide:
        ("https://host:8080/a/b.tar", "https://host:8080/a/b.tar"),
        ("s3://bucket/a b?.tar#1", "s3://bucket/a b?.tar#1"),
        ("http://[::1]:80/a", "http://[::1]:80/a"),
        ("me@host: /data/a?b=1", "me@host: /data/a?b=1"),
        ("my.losses:MyLoss", "my.losses:MyLoss"),
    ],
)
def test_secrets_are_not_shown(text: str, expected: str) -> None:
    assert shown_url(text) == expected
    assert shown_url(expected) == expected
    assert has_secret(text) is (text != expected)
    assert shown_url({"a": [text, 1], "b": (text,)}) == {"a": [expected, 1], "b": (expected,)}
