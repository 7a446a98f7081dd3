"""Prefetching of remote tar shards for a data loader.

Everything happens in the rank's own process: the forked loader workers find their tar shards in the
cache. A request for a batch is handed to a loader worker when its tar shards are leased; they are
released when the batch has arrived.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sized

import numpy as np

from dml_dist.data.batches import BatchRequest
from dml_dist.data.index import Index, RemoteTarShards
from dml_dist.errors import DmlDistError

# With few tar shards nothing else would limit the prefetching.
_REQUESTS_AHEAD = 2000
_SECONDS_TO_END = 2.0
_log = logging.getLogger(__name__)


class StagedRequests:
    """Requests in their order, each handed out when its tar shards are in the cache.

    If one cannot be copied, the requests end early and `error` says why: an exception while a
    DataLoader starts would leave its pool half created.

    Args:
        index: The index of a remote folder.
        requests: What is loaded; iterated twice, by two threads.
        ahead: Tar shards that are copied in the background beyond those that are leased, as far as
            the cache has room.
        keep: Tar shards that stay in the cache until `close`.
    """

    def __init__(
        self,
        index: Index,
        requests: Iterable[BatchRequest],
        *,
        ahead: int,
        keep: np.ndarray | None = None,
    ) -> None:
        assert index.remote is not None
        assert isinstance(requests, Sized)
        self.index = index
        self.remote: RemoteTarShards = index.remote
        self.requests = requests
        self.ahead = ahead
        self.error: DmlDistError | None = None
        self._length = len(requests)
        self._keep = [] if keep is None else keep.tolist()
        self._kept = False
        self._uses: Counter[int] = Counter()
        self._in_flight: deque[list[int]] = deque()
        self._changed = threading.Condition()
        self._position = 0
        self._closed = False
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[BatchRequest]:
        """Yield the requests, fewer of them after an error."""
        if not self._lease(self._keep):
            return
        self._kept = True
        for request in self.requests:
            tar_shards = self._tar_shards(request)
            if not self._lease([shard for shard in tar_shards if not self._uses[shard]]):
                return
            self._in_flight.append(tar_shards)
            with self._changed:
                self._uses.update(tar_shards)
                self._position += 1
                self._changed.notify()
            if self.ahead and self._thread is None:
                # Not earlier: a process must not have this thread when loader workers are forked.
                self._thread = threading.Thread(target=self._prefetch, daemon=True)
                self._thread.start()
            yield request

    def received(self) -> None:
        """Release what the oldest batch in flight used: it has arrived."""
        for tar_shard in self._in_flight.popleft():
            with self._changed:
                self._uses[tar_shard] -= 1
                unused = not self._uses[tar_shard]
                if unused:
                    del self._uses[tar_shard]
            if unused:
                self.remote.release(tar_shard)

    def close(self) -> None:
        """Release everything; a copy in the background ends with its tar shard."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        while self._in_flight:
            self.received()
        if self._kept:
            self._kept = False
            for tar_shard in self._keep:
                self.remote.release(tar_shard)
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_END)

    def _lease(self, tar_shards: list[int]) -> bool:
        try:
            self.remote.lease_all(tar_shards)
        except DmlDistError as error:
            self.error = error
            return False
        return True

    def _tar_shards(self, request: BatchRequest) -> list[int]:
        if self._keep:
            return []
        found: list[int] = np.unique(self.index.tar_shard[request.rows]).tolist()
        return found

    def _prefetch(self) -> None:
        """Copy what the next requests need, until `ahead` tar shards are beyond the leased ones."""
        last_use: dict[int, int] = {}
        for number, request in enumerate(self.requests):
            for tar_shard in self._tar_shards(request):
                if not self._wait(number, tar_shard, last_use):
                    return
                known = tar_shard in last_use
                last_use[tar_shard] = number
                if known or number < self._position or self.remote.has(tar_shard):
                    continue
                try:
                    self.remote.lease(tar_shard)
                    self.remote.release(tar_shard)
                except DmlDistError as error:
                    # The rank raises the error itself when it needs the tar shard.
                    _log.warning("prefetching stopped: %s", error)
                    return

    def _wait(self, number: int, tar_shard: int, last_use: dict[int, int]) -> bool:
        """Wait until a tar shard may be copied; False when there is nothing more to do."""
        with self._changed:
            while not self._closed:
                if number < self._position:
                    return True
                for shard in [s for s, last in last_use.items() if last < self._position]:
                    del last_use[shard]
                leased = set(self._uses)
                beyond = ({*last_use, tar_shard}) - leased
                size = int(self.remote.needed[[*beyond, *leased]].sum())
                has_room = len(beyond) <= self.ahead and size <= self.remote.cache.max_bytes
                if has_room and number - self._position <= _REQUESTS_AHEAD:
                    return True
                self._changed.wait()
        return False
