"""SIGTERM and SIGINT: training ends with a checkpoint, everything else ends at once.

Requests to stop that come from elsewhere are polled for from a thread.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# torchrun and cluster managers may pass on a signal that this process has received already.
_SECONDS_OF_ONE_SIGNAL = 1.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this process was asked to stop, and whether training will see it.

    Attributes:
        reason: Why to stop, or None.
        is_training: Whether the training loop runs, which asks for the reason between steps.
        only_training: Whether only training is to stop: once it has ended, the run may finish.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.is_training = False
        self.only_training = False
        self._first = 0.0

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            KeyboardInterrupt: Outside of training, and at a second signal.
        """
        if self.reason is None:
            self.reason, self._first = signal.Signals(number).name, time.monotonic()
            if self.is_training:
                return
        elif time.monotonic() - self._first < _SECONDS_OF_ONE_SIGNAL:
            return
        self.is_training = False  # It is interrupted.
        for one in _SIGNALS:  # A third one ends the process, whatever it does.
            signal.signal(one, signal.SIG_DFL)
        raise KeyboardInterrupt


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Give a request that is made by the signals of this process, if this is its main thread."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        signal.signal(number, request.on_signal)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def polling(look: Callable[[], bool], seconds: float) -> Iterator[None]:
    """Call a function again and again from a thread while the block runs.

    Args:
        look: Returns whether to stop calling it.
        seconds: Time between two calls, and before the first one.
    """
    done = threading.Event()

    def work() -> None:
        while not done.wait(seconds):
            if look():
                return

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
