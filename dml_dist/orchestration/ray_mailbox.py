"""Events and heartbeats from ranks under Ray to the driver, through one small actor.

The other way go requests to stop, as the answers to heartbeats.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dml_dist.runtime.progress import Emit, Event
from dml_dist.runtime.signals import StopRequest

_HEARTBEAT = "heartbeat"
_SECONDS_BETWEEN_HEARTBEATS = 1.0
_SECONDS_BETWEEN_DRAINS = 0.2
_SECONDS_FOR_AN_ANSWER = 20.0


class Mailbox:
    """An actor that holds events until the driver fetches them."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._fatal: Event | None = None
        self._stop_reason: str | None = None

    def push(self, event: Event) -> None:
        """Take an event of a rank; the first fatal one is kept."""
        if event["kind"] == "fatal":
            self._fatal = self._fatal or event
        else:
            self._events.append(event)

    def drain(self) -> list[Event]:
        """Return the events since the last call."""
        events, self._events = self._events, []
        return events

    def heartbeat(self, rank: int, is_training: bool, node: str) -> str | None:
        """Take a heartbeat of a rank on a node and return why to stop, or None."""
        self.push({"kind": _HEARTBEAT, "rank": rank, "is_training": is_training, "node": node})
        return self._stop_reason

    def stop_reason(self) -> str | None:
        """Return why to stop, or None."""
        return self._stop_reason

    def request_stop(self, reason: str) -> None:
        """Ask all ranks to stop."""
        self._stop_reason = reason

    def fatal(self) -> Event | None:
        """Return the event of the rank that gave up, if one did."""
        return self._fatal


def fatal_of(mailbox: Any) -> Event | None:
    """Return the event of the rank that gave up, if one did and the cluster still answers."""
    import ray

    try:
        event: Event | None = ray.get(mailbox.fatal.remote(), timeout=_SECONDS_FOR_AN_ANSWER)
    except ray.exceptions.RayError:
        return None
    return event


@contextmanager
def heartbeat(mailbox: Any, rank: int, node: str, stop: StopRequest) -> Iterator[None]:
    """Send heartbeats from a thread, and take requests to stop from their answers."""
    import ray

    done = threading.Event()

    def work() -> None:
        while True:
            answer = mailbox.heartbeat.remote(rank, stop.is_training, node)
            # A late answer is a busy machine, a lost mailbox a driver that ends this rank soon.
            with suppress(ray.exceptions.RayError):
                stop.reason = ray.get(answer, timeout=_SECONDS_FOR_AN_ANSWER) or stop.reason
            if done.wait(_SECONDS_BETWEEN_HEARTBEATS):
                return

    threading.Thread(target=work, daemon=True).start()
    try:
        yield
    finally:
        done.set()


class Drain:
    """Passes the mailbox's events on from a thread, and knows when the last one came.

    Attributes:
        nodes: Rank -> id of the node of its last heartbeat.
    """

    def __init__(self, mailbox: Any, emit: Emit, stop: StopRequest) -> None:
        self._mailbox = mailbox
        self._emit = emit
        self._stop = stop
        self.nodes: dict[int, str] = {}
        self._last_event = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    @property
    def silence_seconds(self) -> float:
        """Seconds since a rank last sent something, or since the start."""
        return time.monotonic() - self._last_event

    def __enter__(self) -> Drain:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        import ray

        stopping = False
        while not stopping:
            stopping = self._done.wait(_SECONDS_BETWEEN_DRAINS)
            try:
                events = ray.get(self._mailbox.drain.remote(), timeout=_SECONDS_FOR_AN_ANSWER)
            except ray.exceptions.GetTimeoutError:
                continue  # A busy machine; what was not fetched is fetched next time.
            except ray.exceptions.RayError:
                return  # The cluster is gone; `fit` reports why.
            if events:
                self._last_event = time.monotonic()
            for event in events:
                if event["kind"] != _HEARTBEAT:
                    self._emit(event)
                    continue
                self.nodes = {**self.nodes, event["rank"]: event["node"]}
                if event["rank"] == 0:
                    self._stop.is_training = event["is_training"]
