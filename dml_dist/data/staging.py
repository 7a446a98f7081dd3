"""Tar shards of a URL ahead of the batches that are made of them.

Everything happens in the rank's own process: loader workers, which are forked, find what they read
in the cache. A request for a batch is handed to a loader worker when its tar shards are leased, and
they are released when the batch has arrived.
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

# Where few tar shards are all there is, nothing else would end the look ahead.
_REQUESTS_AHEAD = 2000
_SECONDS_TO_END = 2.0
_log = logging.getLogger(__name__)


class StagedRequests:
    """Requests in their order, each handed out when its tar shards are in the cache.

    Where one does not come, the requests end early and `error` says why: an exception in the
    middle of a DataLoader's start would leave its pool half made.

    Args:
        index: The index of a remote folder.
        requests: What is loaded; walked through twice, by two threads.
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
        self._under_way: deque[list[int]] = deque()
        self._moved = threading.Condition()
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
            self._under_way.append(tar_shards)
            with self._moved:
                self._uses.update(tar_shards)
                self._position += 1
                self._moved.notify()
            if self.ahead and self._thread is None:
                # Not before: the loader workers are forked by now.
                self._thread = threading.Thread(target=self._look_ahead, daemon=True)
                self._thread.start()
            yield request

    def received(self) -> None:
        """Note that the oldest batch under way has arrived."""
        for tar_shard in self._under_way.popleft():
            with self._moved:
                self._uses[tar_shard] -= 1
                unused = not self._uses[tar_shard]
                if unused:
                    del self._uses[tar_shard]
            if unused:
                self.remote.release(tar_shard)

    def close(self) -> None:
        """Release everything; a copy that is coming in the background ends with its tar shard."""
        with self._moved:
            self._closed = True
            self._moved.notify()
        while self._under_way:
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

    def _look_ahead(self) -> None:
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
                    # The rank itself meets it when it needs the tar shard, and ends with it.
                    _log.warning("ahead of its use: %s", error)
                    return

    def _wait(self, number: int, tar_shard: int, last_use: dict[int, int]) -> bool:
        """Wait until a tar shard may be copied; False when there is nothing more to do."""
        with self._moved:
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
                self._moved.wait()
        return False
