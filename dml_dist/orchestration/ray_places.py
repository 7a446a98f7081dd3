"""Room for ranks in a Ray cluster: how many fit now, and whether there is room for more.

A place is a placement group with the resources of one rank. Ray makes it as soon as there is room,
so its scheduler alone decides, and a place that waits asks an autoscaler for a node.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from typing import Any

from dml_dist.errors import RunError
from dml_dist.runtime.progress import Emit, note
from dml_dist.runtime.signals import StopRequest

_SECONDS_BETWEEN_LOOKS = 0.1
# Nodes often come or go together: the number of ranks is decided when it has not changed for this.
_SECONDS_TO_SETTLE = 1.0
_SECONDS_BEFORE_A_NOTE = 5.0
_SECONDS_TO_WAIT = 900.0
_SECONDS_FOR_AN_ANSWER = 2.0
# Ray takes a node for dead after five checks without an answer, one every 3 s or slower.
_SECONDS_TO_NOTICE_A_DEAD_NODE = 75.0


class Places:
    """Places for a run's ranks, none of which is held while Ray Train places the ranks."""

    def __init__(self, resources: Mapping[str, float], fewest: int, most: int) -> None:
        """Take a rank's resources, and how many ranks the run needs and can use."""
        self._resources = dict(resources)
        self._fewest = fewest
        self._most = most
        self._places: list[Any] = []

    def take(self, emit: Emit, stop: StopRequest, hint: str) -> int:
        """Wait until there is room for enough ranks; return for how many.

        Args:
            emit: Receives a note when it takes long.
            stop: Ends the wait.
            hint: What a user does when there is no room.

        Raises:
            RunError: If there is no room for a long time.
            KeyboardInterrupt: If the run is to stop.
        """
        self.give_back()
        self._ask_for(self._most)
        start = changed = time.monotonic()
        found, told = 0, False
        while True:
            now = time.monotonic()
            if (number := self._num_made()) != found:
                found, changed = number, now
            settled = found >= self._fewest and now - changed >= _SECONDS_TO_SETTLE
            if found == self._most or settled:
                break
            if stop.reason is not None:
                raise KeyboardInterrupt
            if now - start > _SECONDS_TO_WAIT:
                raise RunError(
                    f"the cluster has had room for {found} of {self._fewest} ranks for "
                    f"{_SECONDS_TO_WAIT:g} s; add nodes or end other work, then {hint}"
                )
            if now - start > _SECONDS_BEFORE_A_NOTE and not told and found < self._fewest:
                told = True
                emit(note(f"waiting for room for {self._fewest} ranks; there is room for {found}"))
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        self.give_back()
        return found

    def num_more(self, num_ranks: int) -> int:
        """Return how many ranks there is room for beside those that run; holds their places."""
        if num_ranks < self._most and not self._places:
            self._ask_for(self._most - num_ranks)
        return self._num_made()

    def give_back(self) -> None:
        """Give all places back to the cluster."""
        from ray.util import remove_placement_group

        for place in self._places:
            remove_placement_group(place)
        self._places = []

    def _ask_for(self, number: int) -> None:
        from ray.util import placement_group

        self._places = [placement_group([self._resources]) for _ in range(number)]

    def _num_made(self) -> int:
        from ray.util import placement_group_table

        states = placement_group_table() if self._places else {}
        return sum(states[place.id.hex()]["state"] == "CREATED" for place in self._places)


def lost_nodes(used: Mapping[int, str]) -> list[str]:
    """Return the names of the nodes that are lost, of those that ranks used.

    If one does not answer it waits until Ray takes the node for dead: until then Ray would place
    ranks on it.

    Args:
        used: Rank -> id of its node.
    """
    import ray

    deadline = time.monotonic() + _SECONDS_TO_NOTICE_A_DEAD_NODE
    while True:
        nodes = [node for node in ray.nodes() if node["NodeID"] in used.values()]
        silent = [node for node in nodes if node["Alive"] and not _answers(node)]
        if not silent or time.monotonic() > deadline:
            break
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return sorted(
        f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        for node in nodes
        if not node["Alive"]
    )


def _answers(node: Mapping[str, Any]) -> bool:
    address = (node["NodeManagerAddress"], node["NodeManagerPort"])
    try:
        socket.create_connection(address, timeout=_SECONDS_FOR_AN_ANSWER).close()
    except OSError:
        return False
    return True
