"""Where the time of a training step goes.

A step is divided into spans, which follow each other and do not overlap:

    data        waiting for the loader, and the copy to the device
    forward     the network, with DDP's broadcast of running statistics; with micro-batches without
                a graph
    wait        a barrier before the gather: how much later the slowest rank's forward ended
    gather      all-gather of labels and embeddings
    objective   the loss of the gathered batch, with its all-reduces of statistics
    backward    the backward pass until the network's last gradient is computed, with the
                reduce-scatter of embedding gradients and the part of DDP's reduction that it
                hides; with micro-batches also their second forward passes
    reduction   the rest of DDP's reduction, and the sum of replicated gradients; 0 on one rank
    optimizer   clipping, proximal term, update, revival of proxies

Only the skew of data and forward is in `wait`. Ranks that drift apart later wait inside the next
collective, which counts as the span it is in. The barrier runs only while spans are recorded; one
rank has none. Checks and records between spans are in no span.

On a CPU a span is wall time of the training thread. On a GPU it is time of the stream: an event is
recorded at both ends and read with the next record, so that no step waits for the device. `data` is
then the time in which the stream had nothing to do because the next batch was missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dml_dist.parallel.comm import Comm

SpanName = Literal[
    "data", "forward", "wait", "gather", "objective", "backward", "reduction", "optimizer"
]

_NOTHING: AbstractContextManager[None] = nullcontext()


class Spans:
    """Times of the spans since the last reading; does nothing when it is off."""

    def __init__(
        self, mark: Callable[[], Any] | None, seconds: Callable[[Any, Any], float]
    ) -> None:
        """Take a clock.

        Args:
            mark: Returns a point in time, without waiting for the device; None records nothing.
            seconds: Returns the time between two marks; it may wait for the device.
        """
        self._mark = mark
        self._seconds = seconds
        self._marks: list[tuple[SpanName, Any, Any]] = []
        self._last_gradient: Any = None

    @classmethod
    def off(cls) -> Spans:
        """Return spans that record nothing."""
        return cls(None, _difference)

    @classmethod
    def on(cls, device: torch.device) -> Spans:
        """Return spans on the clock of a device."""
        if device.type == "cuda":
            return cls(_record_event, _seconds_between_events)
        return cls(time.perf_counter, _difference)

    def __call__(self, name: SpanName) -> AbstractContextManager[None]:
        """Return a context whose time counts as this span."""
        return _NOTHING if self._mark is None else self._record(name, self._mark)

    def backward(self) -> AbstractContextManager[None]:
        """Return a context for the backward pass and the reduction of its gradients."""
        return _NOTHING if self._mark is None else self._record_backward(self._mark)

    def watch_gradients(self, model: nn.Module) -> None:
        """Divide backward passes where the last gradient of a network with several ranks is."""
        if (mark := self._mark) is None:
            return

        def computed(_: Tensor) -> None:
            self._last_gradient = mark()

        # DDP's reduction of a gradient begins after this hook.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(computed)

    def wait_for_ranks(self, comm: Comm) -> None:
        """Record how long this rank waits for the others; every rank calls this."""
        if self._mark is None or comm.world_size == 1:
            return
        with self("wait"):
            # On the ranks' device: on a GPU the stream waits, the host does not.
            comm.all_reduce_max(torch.zeros(1, device=comm.device), what="ranks before the gather")

    def read(self, num_steps: int) -> dict[str, float]:
        """Return `seconds_<span>`, means over the steps since the last reading, and reset.

        Empty when spans are off. On a GPU it waits for the device.
        """
        if self._mark is None:
            return {}
        totals = dict.fromkeys((f"seconds_{name}" for name in get_args(SpanName)), 0.0)
        for name, start, end in self._marks:
            totals[f"seconds_{name}"] += self._seconds(start, end) / num_steps
        self._marks.clear()
        return totals

    @contextmanager
    def _record(self, name: SpanName, mark: Callable[[], Any]) -> Iterator[None]:
        start = mark()
        yield
        self._marks.append((name, start, mark()))

    @contextmanager
    def _record_backward(self, mark: Callable[[], Any]) -> Iterator[None]:
        start = mark()
        self._last_gradient = None
        yield
        end = mark()
        last = end if self._last_gradient is None else self._last_gradient
        self._marks += [("backward", start, last), ("reduction", last, end)]


def _difference(start: float, end: float) -> float:
    return end - start


def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between_events(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    end.synchronize()
    return start.elapsed_time(end) / 1000.0
