"""URLs of remote data: recognize and join them, and hide the secrets in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from dml_dist.errors import ConfigError

# One slash is enough: `Path("s3://bucket")` becomes `s3:/bucket`. One letter is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_WEB = ("http", "https")
# Passwords may hold quotes and brackets; where a path or query ends is less clear.
_URL_IN_TEXT = re.compile(
    r"(?<![A-Za-z0-9+.-])(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)(?P<slashes>:/{1,2})"
    # The second form is a password that holds one of /?#, which should have been quoted.
    r"(?P<user>[^/\s?#]*@|[^/\s@:]*:(?!\d*(?:[^\w]|$))\S*@)?(?P<rest>[^\s'\"<>]*?)(?=[.,;:)\]}]*(?:[\s'\"<>]|$))"
)


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
            f"Outputs are written to a file system, not to the URL {shown_url(str(location))}. "
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


def shown_url(text: Any) -> Any:
    """Return a URL, or any text with URLs, without their secrets; mappings and lists item by item.

    User name and password become `***`, and so does the query, which in a signed URL is a password
    too; other protocols than the web's have names with a question mark, so theirs must have a `=`.
    All that is shown, logged or exported goes through here; only config.yaml keeps the whole URL.
    """
    if isinstance(text, str):
        return _URL_IN_TEXT.sub(_masked, text)
    if isinstance(text, Mapping):
        return {key: shown_url(value) for key, value in text.items()}
    if isinstance(text, list | tuple):
        return type(text)(shown_url(value) for value in text)
    return text


def has_secret(text: str) -> bool:
    """Tell whether a text holds a URL with a password or a token."""
    return bool(shown_url(text) != text)


def _masked(url: re.Match[str]) -> str:
    scheme, user, rest = url["scheme"], url["user"], url["rest"]
    path, mark, query = rest.partition("?")
    if not mark or (scheme.lower() not in _WEB and "=" not in query):
        path, mark, _ = rest.partition("#") if scheme.lower() in _WEB else (rest, "", "")
    hidden = f"{path}{mark}***" if mark else rest
    return f"{scheme}{url['slashes']}{'***@' if user else ''}{hidden}"
