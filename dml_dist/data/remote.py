"""Copies files from a folder behind a URL, with retries that are logged.

Everything goes through fsspec, which takes its settings (endpoints, anonymous access, credentials)
from its own configuration files and from environment variables such as FSSPEC_S3_ANON.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_random_exponential,
)

from dml_dist.errors import ConfigError, DataError, DmlDistError, RunError
from dml_dist.urls import join_url, protocol_of, shown_url

BLOCK_BYTES = 8 * 2**20
"""Bytes of one request; after a fault the copy resumes at the first missing block."""

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs"}
_WEB = ("http", "https")
# HTTP status codes that a retry may not meet again: timeout, too early, too many requests.
_TRANSIENT_STATUS = {408, 425, 429}
_log = logging.getLogger(__name__)
T = TypeVar("T")


class IncompleteCopyError(Exception):
    """A copy is shorter than announced or has a wrong checksum; a retry may succeed."""


@dataclass(frozen=True)
class RemoteFolder:
    """The folder behind a URL.

    Attributes:
        url: Any fsspec URL but file://.
        retries: How often one file is retried after a transient fault, >= 0.
        timeout_seconds: How long a web server may be silent. Other protocols have their own limits.
        longest_wait_seconds: The longest pause before a retry; pauses double, with jitter.
    """

    url: str
    retries: int = 6
    timeout_seconds: float = 60.0
    longest_wait_seconds: float = 30.0

    def shown(self, name: str = "") -> str:
        """Return the URL of the folder or of a file in it for messages, without secrets."""
        return str(shown_url(join_url(self.url, name) if name else self.url))

    def size(self, name: str) -> int | None:
        """Return the size of a file in bytes, None where the server does not tell.

        Raises:
            DataError: If there is no such file, or no right to read it.
            RunError: If the server did not answer in all attempts.
        """

        def ask() -> int | None:
            filesystem, path = self._open(name)
            size = filesystem.info(path)["size"]
            return None if size is None else int(size)

        return self._with_retries(name, ask)

    def copy(
        self,
        name: str,
        target: BinaryIO,
        *,
        size: int | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy a file into an open file that can be truncated.

        Args:
            name: Name of the file relative to the folder.
            target: Where the bytes go, from its beginning on.
            size: The file's size in bytes, if known.
            check: Called after the last byte; an IncompleteCopyError means that the file must be
                copied again.

        Raises:
            DataError: If there is no such file, no right to read it, or `check` raises it.
            RunError: If all attempts failed, or `target` cannot be written.
        """
        copied = _Copy(target, size)

        def attempt() -> None:
            filesystem, path = self._open(name)
            try:
                copied.resume(filesystem, path, _is_web(self.url))
                if size is not None and copied.done != size:
                    raise IncompleteCopyError(f"{copied.done} of {size} bytes were received")
                check()
            except IncompleteCopyError:
                copied.done = 0
                raise

        self._with_retries(name, attempt)

    def _open(self, name: str) -> tuple[Any, str]:
        """Return fsspec's file system, created again in a forked process, and the file's path."""
        import fsspec

        options: dict[str, Any] = {}
        if _is_web(self.url):
            import aiohttp

            limit = aiohttp.ClientTimeout(
                total=None, sock_connect=self.timeout_seconds, sock_read=self.timeout_seconds
            )
            options["client_kwargs"] = {"timeout": limit}
        try:
            filesystem, path = fsspec.core.url_to_fs(join_url(self.url, name), **options)
        except ImportError as error:
            protocol = protocol_of(self.url)
            package = _PACKAGES.get(protocol)
            advice = f"pip install {package}" if package else str(error)
            raise ConfigError(
                f"{self.shown()}: the protocol {protocol} needs a library that is not installed: "
                f"{advice}"
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"{self.shown()} is not a folder or a URL that fsspec can open (http, https, s3, "
                f"gs, memory, file, ...): {shown_url(str(error))}"
            ) from error
        # fsspec caches listings and sizes, and the files may have changed since.
        filesystem.invalidate_cache()
        return filesystem, path

    def _with_retries(self, name: str, work: Callable[[], T]) -> T:
        """Call `work` on a file, retry transient faults, and turn the last one into our error."""

        def announce(state: RetryCallState) -> None:
            assert state.outcome is not None
            assert state.next_action is not None
            _log.warning(
                "%s: %s; attempt %d of %d in %.1f s",
                self.shown(name),
                _error_text(state.outcome.exception()),
                state.attempt_number + 1,
                self.retries + 1,
                state.next_action.sleep,
            )

        retrying = Retrying(
            stop=stop_after_attempt(self.retries + 1),
            wait=wait_random_exponential(multiplier=0.5, max=self.longest_wait_seconds),
            retry=retry_if_exception(_is_transient),
            before_sleep=announce,
            reraise=True,
        )
        try:
            return retrying(work)
        except DmlDistError:
            raise
        except Exception as error:
            where, what = self.shown(name), _error_text(error)
            if isinstance(error, PermissionError) or _status(error) in (401, 403):
                raise DataError(
                    f"access to {where} was denied: {what}; set credentials for fsspec "
                    "(environment variables or its configuration file), or use another data.path"
                ) from error
            if not _is_transient(error):
                raise DataError(
                    f"{where} cannot be read: {what}; correct data.path, or upload the file"
                ) from error
            raise RunError(
                f"{where} could not be copied in {self.retries + 1} attempts; the last error: "
                f"{what}. Check the server, then run the command again; copied tar shards are kept "
                "(data.cache.retries and data.cache.timeout_seconds set how long to try)"
            ) from error


class _Copy:
    """The progress of one file's copy; a later attempt resumes there."""

    def __init__(self, target: BinaryIO, size: int | None) -> None:
        self.target = target
        self.size = size
        self.done = 0
        self.in_blocks = True

    def resume(self, filesystem: Any, path: str, is_web: bool) -> None:
        options: dict[str, Any] = {"cache_type": "none"}
        if not self.in_blocks or (is_web and self.size is None):
            options = {"block_size": 0}  # One stream from the beginning.
            self.done = 0
        elif is_web:
            options = {"cache_type": "none", "block_size": BLOCK_BYTES, "size": self.size}
        with filesystem.open(path, "rb", **options) as source:
            if self.done:
                source.seek(self.done)
            while block := self._read(source):
                self._write(block)

    def _read(self, source: Any) -> bytes:
        wanted = BLOCK_BYTES
        if self.size is not None:
            wanted = min(wanted, self.size - self.done)
        if wanted <= 0:
            return b""
        try:
            return bytes(source.read(wanted))
        except ValueError as error:
            if not self.done or not self.in_blocks:
                raise
            self.in_blocks = False
            raise IncompleteCopyError("the server does not support range requests") from error

    def _write(self, block: bytes) -> None:
        try:
            self.target.seek(self.done)
            self.target.write(block)
            self.target.flush()
        except OSError as error:
            raise RunError(
                f"{self.target.name} cannot be written: {error.strerror or error}; choose "
                "a data.cache.folder with space for data.cache.max_gb, or lower that limit"
            ) from error
        self.done += len(block)


def _is_web(url: str) -> bool:
    return protocol_of(url) in _WEB


def _status(error: BaseException | None) -> int | None:
    """Return the status of a web server's answer, None where the error has none.

    Of aiohttp's errors and botocore's, also where fsspec raised another one from them.
    """
    status = getattr(error, "status", None)
    answer = getattr(error, "response", None)
    if status is None and isinstance(answer, dict):
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if status is None and error is not None and error.__cause__ is not None:
        return _status(error.__cause__)
    return status if isinstance(status, int) else None


def _is_transient(error: BaseException) -> bool:
    """Return whether the same request may succeed later."""
    if isinstance(error, DmlDistError) or not isinstance(error, Exception):
        return False
    status = _status(error)
    if status is not None:
        return status >= 500 or status in _TRANSIENT_STATUS
    if isinstance(error, FileNotFoundError):
        # fsspec says so of every request for a file's size that failed, whatever the reason.
        return error.__cause__ is not None and _is_transient(error.__cause__)
    if isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError):
        return False
    # Every library behind fsspec has errors of its own for a lost connection.
    return not isinstance(error, TypeError | AttributeError | LookupError | NotImplementedError)


def _error_text(error: BaseException | None) -> str:
    """Return the text of an error without the URLs that some libraries put into theirs."""
    status = _status(error)
    if status is not None:
        return f"the server answered {status}"
    if isinstance(error, FileNotFoundError):
        if error.__cause__ is not None:
            return _error_text(error.__cause__)
        return "there is no such file"
    if isinstance(error, IncompleteCopyError):
        return str(error)
    if isinstance(error, TimeoutError):
        return "the server was silent for too long"
    text = "" if error is None else shown_url(str(error).partition("\n")[0])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
