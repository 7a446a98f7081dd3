"""All use of torch.distributed's collectives: named methods that return new tensors, but for one.

`Comm.single()` is one process without a process group. It runs through the same methods, so that
callers have one code path for any number of ranks.

Every rank calls the same collectives in the same order. `what` names a collective in errors: when
a rank dies, lags behind or calls something else, the others raise a RunError within the process
group's timeout that says which collective waited. (NCCL instead ends the process through its
watchdog after the same timeout.)

`traffic` counts the bytes that this rank sends, by kind of collective and name, as
`parallel/traffic.py` defines them.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dml_dist.errors import DmlDistError, PeerLostError, RunError
from dml_dist.parallel.traffic import Kind, Traffic, sent_bytes
from dml_dist.topology import Topology

# torch 2.14 gave both collectives these names, and warns where the older ones are called.
_all_gather_single: Callable[..., Any] = (
    dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
)
_reduce_scatter_single: Callable[..., Any] = (
    dist.reduce_scatter_single
    if hasattr(dist, "reduce_scatter_single")
    else dist.reduce_scatter_tensor
)


class Comm:
    """Collectives among the ranks of one run.

    Attributes:
        topology: This rank's place.
        group: The process group, or None in one process.
        timeout_seconds: How long a collective waits for the others.
        num_collectives: Number of collectives so far.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        topology: Topology | None = None,
        *,
        timeout_seconds: float = 600.0,
    ) -> None:
        """Wrap a process group whose ranks are those of `topology`; None is one process."""
        self.topology = topology or Topology()
        expected = 1 if group is None else dist.get_world_size(group)
        if self.topology.world_size != expected:
            raise ValueError(
                f"The topology has world_size {self.topology.world_size}, but the process group "
                f"has {expected} ranks. Pass the topology that the group was made with."
            )
        self.group = group
        self.timeout_seconds = timeout_seconds
        self.num_collectives = 0
        self._sent: Counter[tuple[Kind, str]] = Counter()

    @classmethod
    def single(cls, device: str = "cpu") -> Comm:
        """Return the Comm of one process."""
        return cls(None, Topology(device=device))

    @classmethod
    def planned(cls, world_size: int) -> Comm:
        """Return the Comm of rank 0 of ranks that do not run yet, on the meta device.

        For what follows from shapes alone: an objective built on it takes no memory for its
        parameters and computes its traffic. Its collectives raise AssertionError.
        """
        comm = cls.single("meta")
        comm.topology = Topology(world_size=world_size, device="meta")
        return comm

    @classmethod
    def from_default_group(
        cls,
        device: str = "cpu",
        *,
        local_rank: int = 0,
        timeout_seconds: float = 600.0,
    ) -> Comm:
        """Return the Comm of the default process group, or of one process when there is none.

        Args:
            device: This rank's device, "cpu" or "cuda:N".
            local_rank: This rank's index on its machine.
            timeout_seconds: The timeout the group was made with; it is only named in errors.
        """
        if not dist.is_initialized():
            return cls.single(device)
        topology = Topology(dist.get_rank(), dist.get_world_size(), local_rank, device)
        return cls(dist.group.WORLD, topology, timeout_seconds=timeout_seconds)

    @property
    def rank(self) -> int:
        """This rank, 0 .. world_size - 1."""
        return self.topology.rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.topology.world_size

    @property
    def device(self) -> torch.device:
        """This rank's device."""
        return torch.device(self.topology.device)

    @property
    def traffic(self) -> Traffic:
        """What this rank sent so far; subtract an earlier value for a part of it."""
        return Traffic(dict(self._sent))

    # ------------------------------------------------------------ tensors

    def all_gather_rows(
        self, x: Tensor, sizes: Sequence[int], *, what: str = "all-gather"
    ) -> Tensor:
        """Return the rows of all ranks in rank order, (sum(sizes), ...).

        Args:
            x: This rank's rows, (sizes[rank], ...).
            sizes: Number of rows of each rank, the same on every rank; they may be unequal.
            what: Name of the collective in errors.
        """
        self._check_rows(x, sizes[self.rank], sizes, what)
        if self._is_alone():
            return x.clone()
        if x.dtype == torch.bool:
            return self.all_gather_rows(x.to(torch.uint8), sizes, what=what).to(torch.bool)
        padded = _pad_rows(x, max(sizes))
        out = padded.new_empty((self.world_size * max(sizes), *x.shape[1:]))
        with self.guard(what):
            _all_gather_single(out, padded, group=self.group)
        self._count("all_gather", what, padded)
        return _unpad_rows(out, sizes)

    def reduce_scatter_rows(
        self, x: Tensor, sizes: Sequence[int], *, what: str = "reduce-scatter"
    ) -> Tensor:
        """Return this rank's rows of the sum over ranks, (sizes[rank], ...).

        Args:
            x: Rows of all ranks, (sum(sizes), ...).
            sizes: Number of rows of each rank, the same on every rank; they may be unequal.
            what: Name of the collective in errors.
        """
        self._check_rows(x, sum(sizes), sizes, what)
        if self._is_alone():
            return x.clone()
        padded = torch.cat([_pad_rows(part, max(sizes)) for part in x.split(list(sizes))])
        out = padded.new_empty((max(sizes), *x.shape[1:]))
        with self.guard(what):
            _reduce_scatter_single(out, padded, group=self.group)
        self._count("reduce_scatter", what, padded)
        return out[: sizes[self.rank]]

    def all_reduce_sum(self, x: Tensor, *, what: str = "sum") -> Tensor:
        """Return the sum over ranks; `x` has the same shape on every rank."""
        return self._all_reduce(x, dist.ReduceOp.SUM, what)

    def add_over_ranks_(self, x: Tensor, *, what: str = "sum") -> None:
        """Replace a contiguous tensor by its sum over ranks; takes no memory for a copy."""
        self._all_reduce_(x, dist.ReduceOp.SUM, what)

    def all_reduce_max(self, x: Tensor, *, what: str = "maximum") -> Tensor:
        """Return the maximum over ranks; `x` has the same shape on every rank."""
        return self._all_reduce(x, dist.ReduceOp.MAX, what)

    def broadcast(self, x: Tensor, source: int, *, what: str = "broadcast") -> Tensor:
        """Return rank `source`'s tensor.

        Args:
            x: The tensor on the source; elsewhere a tensor of the same shape and dtype.
            source: The rank that sends.
            what: Name of the collective in errors.
        """
        out = x.clone(memory_format=torch.contiguous_format)
        if self._is_alone():
            return out
        with self.guard(what):
            dist.broadcast(out, group_src=source, group=self.group)
        self._count("broadcast", what, x if source == self.rank else None)
        return out

    def barrier(self, *, what: str = "barrier") -> None:
        """Wait until every rank is here."""
        self.all_reduce_max(torch.zeros(1, dtype=torch.int64), what=what)

    # ------------------------------------------------------------ objects

    def gather_objects(self, value: Any, *, what: str = "gather objects") -> list[Any]:
        """Return the picklable values of all ranks, in rank order, on every rank."""
        data = _to_bytes(value)
        length = torch.tensor([len(data)], dtype=torch.int64)
        lengths = self.all_gather_rows(length, [1] * self.world_size, what=what).tolist()
        gathered = self.all_gather_rows(data, lengths, what=what)
        return [_from_bytes(part) for part in gathered.split(lengths)]

    def broadcast_object(
        self, value: Any, source: int = 0, *, what: str = "broadcast object"
    ) -> Any:
        """Return rank `source`'s picklable value; the other ranks' values are ignored."""
        data = _to_bytes(value if self.rank == source else None)
        length = torch.tensor([len(data)], dtype=torch.int64)
        length = self.broadcast(length, source, what=what)
        if self.rank != source:
            data = torch.empty(int(length), dtype=torch.uint8)
        return _from_bytes(self.broadcast(data, source, what=what))

    def agree(self, error: Exception | None, *, what: str = "agree") -> None:
        """Raise on every rank when any rank has an error; called by every rank.

        Errors of dml_dist keep their class and text, with the rank in front; others become a
        RunError. The lowest rank's error is raised when there are several.

        Args:
            error: This rank's error, or None.
            what: Name of the collective in errors.
        """
        failed = torch.tensor([0 if error is None else 1], dtype=torch.int64)
        if not int(self.all_reduce_max(failed, what=what)):
            return
        if self.group is None and error is not None:
            raise error
        described = None if error is None else _describe(error)
        errors = self.gather_objects(described, what=what)
        ranks = [rank for rank, entry in enumerate(errors) if entry is not None]
        kind, text = errors[ranks[0]]
        if len(ranks) == self.world_size and all(entry == errors[0] for entry in errors):
            raise kind(text) from error
        raise kind(f"rank {ranks[0]} of {self.world_size}: {text}") from error

    # ------------------------------------------------------------ errors

    @contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Turn a failure of the process group inside the block into a PeerLostError that names it.

        Also for collectives that are started elsewhere, as DDP's in a backward pass.
        """
        start = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            if not _is_transport_error(error):
                raise
            raise PeerLostError(
                f"rank {self.rank} of {self.world_size}: the collective {what!r} (number "
                f"{self.num_collectives}) failed after {time.monotonic() - start:.1f} s, with a "
                f"timeout of {self.timeout_seconds:g} s. Another rank ended, is late or called "
                f"another collective: check its output. [{error}]"
            ) from error

    def _all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType, what: str) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        self._all_reduce_(out, op, what)
        return out

    def _all_reduce_(self, x: Tensor, op: dist.ReduceOp.RedOpType, what: str) -> None:
        if self._is_alone():
            return
        with self.guard(what):
            dist.all_reduce(x, op=op, group=self.group)
        self._count("all_reduce", what, x)

    def _check_rows(self, x: Tensor, rows: int, sizes: Sequence[int], what: str) -> None:
        if len(sizes) != self.world_size or x.ndim == 0 or x.shape[0] != rows:
            raise ValueError(
                f"{what}: rank {self.rank} passed a tensor of shape {tuple(x.shape)} and sizes "
                f"{list(sizes)}, which must be {rows} rows and {self.world_size} sizes."
            )

    def _is_alone(self) -> bool:
        assert self.group is not None or self.world_size == 1, "planned ranks do not communicate"
        return self.group is None

    def _count(self, kind: Kind, what: str, x: Tensor | None) -> None:
        """Count a collective; None where this rank sends nothing."""
        self.num_collectives += 1
        if x is not None:
            num_bytes = x.numel() * x.element_size()
            self._sent[kind, what] += sent_bytes(kind, num_bytes, self.world_size)


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    """Return x, (n, ...), with zero rows up to `rows`."""
    if x.shape[0] == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros((rows - x.shape[0], *x.shape[1:]))])


def _unpad_rows(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the first sizes[r] of every max(sizes) rows of x."""
    if min(sizes) == max(sizes):
        return x
    return torch.cat([part[:size] for part, size in zip(x.split(max(sizes)), sizes, strict=True)])


def _to_bytes(value: Any) -> Tensor:
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def _from_bytes(data: Tensor) -> Any:
    # Both ends are ranks of the same run: they share code, and the group is closed to others.
    return pickle.loads(data.numpy().tobytes())


def _describe(error: Exception) -> tuple[type[DmlDistError], str]:
    """Return the class to raise on all ranks, and the text."""
    if isinstance(error, DmlDistError):
        return type(error), str(error)
    return RunError, f"{type(error).__name__}: {error}"


def _is_transport_error(error: RuntimeError) -> bool:
    """Whether torch.distributed raised this; gloo's own errors have no class of their own."""
    if isinstance(error, RunError):
        return False
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")
    )
