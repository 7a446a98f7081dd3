"""URLs of remote data: recognize, join and redact them."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from dml_dist.errors import ConfigError

# One slash is enough: `Path("s3://bucket")` becomes `s3:/bucket`. One letter is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_WEB = ("http", "https")


def is_url(location: str | Path) -> bool:
    """Return whether a location is a URL, such as `https://host/folder`, and not a path."""
    return _URL.match(str(location)) is not None


def local_path(location: str) -> Path | None:
    """Return the local folder of a path or a file:// URL, None for other URLs."""
    if not is_url(location):
        return Path(location).expanduser()
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme.lower() == "file" else None


def output_path(location: str | Path) -> Path:
    """Return the path of a new file or folder that a command writes.

    Raises:
        ConfigError: If it is empty, which would mean the current folder, or a URL, which would
            become a local folder such as `s3:`.
    """
    if not str(location).strip():
        raise ConfigError(
            "The path of an output is empty. Give the name of a file or folder, or . for the "
            "current folder."
        )
    if is_url(location):
        raise ConfigError(
            f"Outputs are written to a file system, not to the URL {redact_url(str(location))}. "
            "Give a local path and upload the result, or mount the store."
        )
    return Path(location)


def protocol_of(url: str) -> str:
    """Return the protocol of a URL in lower case, such as `https`."""
    return url.partition(":")[0].lower()


def join_url(url: str, name: str) -> str:
    """Append a file name to a folder's URL; the query of a signed URL stays at the end."""
    if protocol_of(url) not in _WEB:
        return f"{url.rstrip('/')}/{name}"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{quote(name)}"))


def redact_url(url: str) -> str:
    """Return a URL for messages, without user name, password and the query of a signed URL."""
    parts = urlsplit(url)
    if protocol_of(url) not in _WEB:
        return url
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
