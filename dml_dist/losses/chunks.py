"""Logits of a batch and a proxy shard, one chunk of proxies at a time, and their gradients.

The losses reduce each chunk to statistics, and the backward pass recomputes its logits, so that
only one chunk is in memory. Proxies are normalized per chunk: no normalized copy of the table is
made.

With n = p / |p| and r = 1 / |p| of a proxy p, queries x_i, logits l_i = x_i . n, and
a_i = dloss/dl_i, the gradients are

    dloss/dx_i = sum over proxies of a_i r p
    dloss/dp   = r (g - n (n . g)),  g = sum_i a_i x_i

Shape legend: G queries, D embedding size, L proxies of the shard, c proxies of a chunk,
K proxies a class.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dml_dist.losses.forms import ProxyShard
from dml_dist.losses.numerics import MIN_NORM

_CPU_CHUNK_BYTES = 16 * 2**20
"""Bytes of logits of a CPU chunk: larger is not faster; smaller synchronizes threads more often."""


def chunk_rows(queries_GD: Tensor, memory_mb: float) -> int:
    """Return the proxies per chunk, so that (rows + 1, G) and (rows, D) fit into `memory_mb`."""
    row_bytes = max(1, *queries_GD.shape) * queries_GD.element_size()
    # Half for the logits (rows, G), half for the temporaries (rows, D) of `add_gradients`; a row is
    # counted at the wider of the two.
    budget = memory_mb * 2**20 / 2
    if queries_GD.device.type == "cpu":
        budget = min(budget, _CPU_CHUNK_BYTES)
    # One row less: the buffer has an extra row (`ChunkedLogits`).
    return max(1, int(budget / row_bytes) - 1)


def own_rows(labels_G: Tensor, shard: ProxyShard) -> Tensor:
    """Return the shard's rows of each label's class, (K, G); outside 0 .. L - 1 elsewhere."""
    per_class = shard.proxies_per_class
    offsets_K = torch.arange(per_class, device=labels_G.device)
    return (labels_G - shard.low_class) * per_class + offsets_K[:, None]


def in_chunk(rows: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Return which rows a chunk holds, and their index in it: one past its end for other rows."""
    held = (rows >= low) & (rows < high)
    return held, torch.where(held, rows - low, high - low)


class ChunkedLogits:
    """The logits of queries and normalized proxies, in a buffer of one chunk.

    The buffer has one row more than a chunk. Rows of other chunks have that index (`in_chunk`), so
    that gather and scatter need no mask and no synchronization with the device.

    Attributes:
        rows_per_chunk: Proxies of a chunk, at most L, at least 1.
        buffer: (rows_per_chunk + 1, G).
        norm_L1: Norms of the proxies, at least MIN_NORM; filled by `measure`.
    """

    def __init__(
        self,
        queries_GD: Tensor,
        proxies_LD: Tensor,
        rows_per_chunk: int,
        norm_L1: Tensor | None = None,
    ) -> None:
        self.queries_GD, self.proxies_LD = queries_GD, proxies_LD
        self.rows_per_chunk = max(1, min(rows_per_chunk, len(proxies_LD)))
        self.buffer = queries_GD.new_zeros((self.rows_per_chunk + 1, len(queries_GD)))
        self.norm_L1 = proxies_LD.new_empty((len(proxies_LD), 1)) if norm_L1 is None else norm_L1

    def chunks(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield (low, high, the buffer's first high - low + 1 rows) of every chunk."""
        for low in range(0, len(self.proxies_LD), self.rows_per_chunk):
            high = min(len(self.proxies_LD), low + self.rows_per_chunk)
            yield low, high, self.buffer[: high - low + 1]

    def measure(self, low: int, high: int) -> None:
        """Compute the norms of a chunk's proxies."""
        norm_c1 = self.norm_L1[low:high]
        torch.linalg.vector_norm(self.proxies_LD[low:high], dim=1, keepdim=True, out=norm_c1)
        norm_c1.clamp_min_(MIN_NORM)

    def fill(self, low: int, high: int, out_cG: Tensor) -> None:
        """Write the logits of a chunk whose norms are known."""
        torch.mm(self.proxies_LD[low:high], self.queries_GD.T, out=out_cG)
        # Divide the product, not the proxies: no normalized copy of the chunk.
        out_cG.div_(self.norm_L1[low:high])

    def add_gradients(
        self, low: int, high: int, grads_cG: Tensor, grad_queries_GD: Tensor, grad_proxies: Tensor
    ) -> None:
        """Backpropagate a chunk's logit gradients to queries (added) and proxies (written).

        Args:
            low: First row of the chunk.
            high: One past its last.
            grads_cG: dloss/dlogits; overwritten.
            grad_queries_GD: The queries' gradient so far.
            grad_proxies: The shard's gradient, (L, D).
        """
        chunk, norm_c1 = self.proxies_LD[low:high], self.norm_L1[low:high]
        grad_chunk = grad_proxies[low:high]
        # a_i r: both products below need it.
        grads_cG.div_(norm_c1)
        grad_queries_GD.addmm_(grads_cG.T, chunk)
        torch.mm(grads_cG, self.queries_GD, out=grad_chunk)
        # Subtract r n (n . g), the component along p. A proxy shorter than MIN_NORM is divided by
        # that constant instead of its norm, so this term vanishes.
        along_c1 = (chunk * grad_chunk).sum(dim=1, keepdim=True)
        along_c1.div_(norm_c1.square()).masked_fill_(norm_c1 <= MIN_NORM, 0.0)
        grad_chunk.addcmul_(along_c1, chunk, value=-1)


class OwnLogits:
    """The logits of each query's own rows, collected over chunks; the largest is its positive.

    Shards hold whole classes, so a shard has all K own rows of a query or none.
    """

    def __init__(self, own_KG: Tensor, like: Tensor) -> None:
        self.own_KG = own_KG
        self.logits_KG = like.new_full(own_KG.shape, -torch.inf)

    def collect(self, low: int, high: int, logits: Tensor) -> Tensor:
        """Store the own logits in a chunk, and return the chunk indices of own rows, (K, G)."""
        held_KG, index_KG = in_chunk(self.own_KG, low, high)
        self.logits_KG = torch.where(held_KG, logits.gather(0, index_KG), self.logits_KG)
        return index_KG

    def positive(self, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the positive logit (0 if not held), its row (1, G), and which are missing (G,)."""
        positive_G, best_G = self.logits_KG.max(dim=0)
        # The first of K rows decides for all: a shard has all K or none. 0 is neutral in the sum
        # over shards.
        missing_G = (self.own_KG[0] < 0) | (self.own_KG[0] >= num_rows)
        return (
            positive_G.masked_fill(missing_G, 0.0),
            self.own_KG.gather(0, best_G[None]),
            missing_G,
        )


class RunningLogSumExp:
    """Log-sum-exp of each query over the chunks so far, by a running maximum and sum.

    Attributes:
        peak_G: Largest logit; -inf before the first.
        total_G: Sum of exp(logit - peak).
    """

    def __init__(self, queries_GD: Tensor) -> None:
        self.peak_G = queries_GD.new_full((len(queries_GD),), -torch.inf)
        self.total_G = queries_GD.new_zeros(len(queries_GD))

    def add(self, logits_cG: Tensor) -> None:
        """Add a chunk; its logits are overwritten by exp(logit - peak)."""
        peak_G = torch.maximum(self.peak_G, logits_cG.amax(dim=0))
        # The peak is -inf while a query has seen no logit; -inf - -inf would be NaN: shift by 0.
        shift_G = peak_G.masked_fill(peak_G == -torch.inf, 0.0)
        # Rescale the old sum to the new peak.
        self.total_G *= (self.peak_G - shift_G).exp_()
        self.total_G += logits_cG.sub_(shift_G).exp_().sum(dim=0)
        self.peak_G = peak_G

    def result(self) -> Tensor:
        """Return the log-sum-exp, (G,); -inf without any logit."""
        return self.peak_G + self.total_G.log()
