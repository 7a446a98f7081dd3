"""The first signal during training waits for a checkpoint; any other one ends the work at once."""

from __future__ import annotations

import signal
import threading
from typing import Any

import pytest

from dml_dist.runtime import signals
from dml_dist.runtime.signals import polling, stop_on_signals

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])


@BOTH
def test_the_first_signal_in_training_is_a_request(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(signals.time, "monotonic", lambda: now)
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with stop_on_signals() as stop:
        stop.is_training = True
        signal.raise_signal(number)
        assert stop.reason == signal.Signals(number).name
        now += 0.5  # torchrun passes on what this process has received already.
        signal.raise_signal(number)
        now += 1.0
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        # A third one would end this process.
        assert signal.getsignal(number) == signal.SIG_DFL
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before


@BOTH
def test_outside_of_training_the_first_signal_interrupts(number: int) -> None:
    with stop_on_signals() as stop:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert stop.reason == signal.Signals(number).name


def test_other_threads_get_a_request_without_handlers() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_on_signals() as stop:
            found.append((stop.reason, signal.getsignal(signal.SIGTERM)))

    thread: Any = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, before)]


def test_polling_ends_with_its_block_or_when_it_has_found_something() -> None:
    calls: list[int] = []
    found = threading.Event()

    def third_time() -> bool:
        calls.append(threading.get_ident())
        if len(calls) == 3:
            found.set()
        return len(calls) == 3

    before = threading.active_count()
    with polling(third_time, 0.001):
        assert found.wait(10)
    assert len(calls) == 3
    assert threading.get_ident() not in calls
    assert threading.active_count() == before

    with pytest.raises(ValueError, match="of the block"), polling(lambda: False, 0.001):
        raise ValueError("of the block")
    assert threading.active_count() == before
    with polling(lambda: calls.append(0) is None, 60.0):
        pass  # Not called before the first interval is over, and not waited for.
    assert len(calls) == 3
