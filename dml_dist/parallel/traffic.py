"""Bytes that a rank sends: counted by `Comm`, and computed in advance by `Objective.traffic`.

Both use `sent_bytes`, which takes every collective as a ring, the least that is possible for large
tensors. With W ranks and n bytes of input on this rank (rows padded to those of the largest rank):

    all_gather (W - 1) n      all_reduce 2 (W - 1) n / W      reduce_scatter (W - 1) n / W
    broadcast  (W - 1) n on the source, 0 elsewhere

What DDP sends is not seen by `Comm`; the run plan computes it by the same rule.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, assert_never

Kind = Literal["all_gather", "all_reduce", "reduce_scatter", "broadcast"]


def sent_bytes(kind: Kind, num_bytes: int, world_size: int) -> int:
    """Return the bytes that this rank sends in one collective (a broadcast: as its source).

    Args:
        kind: The collective.
        num_bytes: n, bytes of this rank's input, with padding.
        world_size: W.
    """
    others = world_size - 1
    match kind:
        case "all_gather" | "broadcast":
            return others * num_bytes
        case "all_reduce":
            return 2 * others * num_bytes // world_size
        case "reduce_scatter":
            return others * num_bytes // world_size
        case _:
            assert_never(kind)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends; traffic adds up.

    Attributes:
        sent: Bytes by kind of collective and its name.
    """

    sent: Mapping[tuple[Kind, str], int] = field(default_factory=dict)

    @classmethod
    def of(cls, kind: Kind, what: str, num_bytes: int, world_size: int) -> Traffic:
        """Return the traffic of one collective; one rank sends nothing.

        Args:
            kind: The collective.
            what: Its name.
            num_bytes: Bytes of this rank's input, with padding.
            world_size: W.
        """
        if world_size == 1:
            return cls()
        return cls({(kind, what): sent_bytes(kind, num_bytes, world_size)})

    @property
    def total(self) -> int:
        """Bytes of all collectives."""
        return sum(self.sent.values())

    def by_kind(self) -> dict[Kind, int]:
        """Return the bytes of each kind of collective."""
        kinds: Counter[Kind] = Counter()
        for (kind, _), num_bytes in self.sent.items():
            kinds[kind] += num_bytes
        return dict(kinds)

    def __add__(self, other: Traffic) -> Traffic:
        total = Counter(self.sent)
        total.update(other.sent)
        return Traffic(dict(total))

    def __sub__(self, earlier: Traffic) -> Traffic:
        """Return what was sent since an earlier count."""
        return Traffic(dict(Counter(self.sent) - Counter(earlier.sent)))
