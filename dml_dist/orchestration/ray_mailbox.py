"""Events from ranks under Ray to the driver, through one small actor; signs of life, too."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dml_dist.runtime.progress import Emit, Event

_ALIVE = "alive"
_SECONDS_BETWEEN_SIGNS = 5.0
_SECONDS_BETWEEN_DRAINS = 0.2
_SECONDS_FOR_MAIL = 20.0


class Mailbox:
    """An actor that holds events until the driver fetches them."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._fatal: Event | None = None

    def push(self, event: Event) -> None:
        """Take an event of a rank; the first fatal one stays."""
        if event["kind"] == "fatal":
            self._fatal = self._fatal or event
        else:
            self._events.append(event)

    def drain(self) -> list[Event]:
        """Return the events that were not fetched yet."""
        events, self._events = self._events, []
        return events

    def fatal(self) -> Event | None:
        """Return the event of the rank that gave up, if one did."""
        return self._fatal


def fatal_of(mailbox: Any) -> Event | None:
    """Return the event of the rank that gave up, if one did and the cluster still answers."""
    import ray

    try:
        event: Event | None = ray.get(mailbox.fatal.remote(), timeout=_SECONDS_FOR_MAIL)
    except ray.exceptions.RayError:
        return None
    return event


@contextmanager
def heartbeat(mailbox: Any) -> Iterator[None]:
    """Tell the driver every few seconds that this rank lives, whatever its thread does."""
    stop = threading.Event()

    def work() -> None:
        while True:
            mailbox.push.remote({"kind": _ALIVE})
            if stop.wait(_SECONDS_BETWEEN_SIGNS):
                return

    threading.Thread(target=work, daemon=True).start()
    try:
        yield
    finally:
        stop.set()


class Drain:
    """Hands the mailbox's events on from a thread, and knows when the last one came."""

    def __init__(self, mailbox: Any, emit: Emit) -> None:
        self._mailbox = mailbox
        self._emit = emit
        self._last_sign = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)

    @property
    def silence_seconds(self) -> float:
        """Seconds since a rank last sent something, or since the start."""
        return time.monotonic() - self._last_sign

    def __enter__(self) -> Drain:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        import ray

        stopping = False
        while not stopping:
            stopping = self._stop.wait(_SECONDS_BETWEEN_DRAINS)
            try:
                events = ray.get(self._mailbox.drain.remote(), timeout=_SECONDS_FOR_MAIL)
            except ray.exceptions.GetTimeoutError:
                continue  # A busy machine; what was not fetched is fetched next time.
            except ray.exceptions.RayError:
                return  # The cluster is gone; `fit` reports why.
            if events:
                self._last_sign = time.monotonic()
            for event in events:
                if event["kind"] != _ALIVE:
                    self._emit(event)
