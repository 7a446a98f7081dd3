"""Addresses of data that is not on this machine: what is one, and how it is put together."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

# One slash is enough: a path object of `s3://bucket` reads `s3:/bucket`. One letter is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_WEB = ("http", "https")


def is_url(location: str | Path) -> bool:
    """Tell whether a location names a protocol, as `https://host/folder` does; a path does not."""
    return _URL.match(str(location)) is not None


def local_path(location: str) -> Path | None:
    """Return the folder on this machine that a path or a file:// URL names, None for other URLs."""
    if not is_url(location):
        return Path(location).expanduser()
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme.lower() == "file" else None


def protocol_of(url: str) -> str:
    """Return the protocol of a URL in small letters, as `https`."""
    return url.partition(":")[0].lower()


def join_url(url: str, name: str) -> str:
    """Return the URL of a file below a folder's; a query, as of signed URLs, stays at the end."""
    if protocol_of(url) not in _WEB:
        return f"{url.rstrip('/')}/{name}"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def shown_url(url: str) -> str:
    """Return a URL for messages: without a user's name, password or the query of a signed URL."""
    parts = urlsplit(url)
    if protocol_of(url) not in _WEB:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
