"""Errors of S3, as raised by s3fs: retried only if they may be transient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dml_dist.config.data import CacheConfig
from dml_dist.data.index import INDEX_NAME
from dml_dist.data.remote_shards import open_index
from dml_dist.errors import DataError, DmlDistError, RunError


class ClientError(Exception):
    """As botocore words the answer of S3, which s3fs raises another error from."""

    def __init__(self, status: int) -> None:
        super().__init__("An error occurred")
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


class Store(MemoryFileSystem):
    """A store that answers every request with one error."""

    protocol = "store"
    error: Exception
    cause: Exception
    requests: int

    def info(self, path: str, **options: Any) -> Any:
        """Raise the error."""
        type(self).requests += 1
        raise self.error from self.cause


@pytest.fixture
def store() -> type[Store]:
    Store.requests = 0
    fsspec.register_implementation("store", Store, clobber=True)
    return Store


@pytest.mark.parametrize(
    ("error", "cause", "requests", "raised", "words"),
    [
        (FileNotFoundError("bucket"), ClientError(404), 1, DataError, "answered 404"),
        (PermissionError("denied"), ClientError(403), 1, DataError, "set credentials"),
        (OSError("slow down"), ClientError(503), 3, RunError, "answered 503"),
        (OSError("too many requests"), ClientError(429), 3, RunError, "answered 429"),
    ],
)
def test_an_answer_is_tried_again_only_where_it_may_pass(
    store: type[Store],
    tmp_path: Path,
    error: Exception,
    cause: Exception,
    requests: int,
    raised: type[DmlDistError],
    words: str,
) -> None:
    store.error, store.cause = error, cause
    with pytest.raises(raised, match=rf"store://shards/{INDEX_NAME} .*{words}"):
        open_index("store://shards", CacheConfig(folder=str(tmp_path), retries=2))
    assert store.requests == requests
