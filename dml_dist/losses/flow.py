"""Conditional normalizing flow from embeddings to residual noise, given a vector of their class.

Roth, Vinyals, Akata, "Non-isotropy Regularization for Proxy-based Deep Metric Learning", CVPR
2022: f(x) = t(z | p_y). `forward` computes z = t^-1(f(x) | p_y) with its
log-determinant; `inverse` computes t.

Block k of the flow, x of D coordinates, condition c:

    x   <- x[permutation_k]                          fixed, drawn from the seed
    x1, x2 = x[:d1], x[d1:]                          d1 = D / 2 rounded, halves to even
    a   = subnet2([x2, c]);  s = S(a[:d1]);       x1 <- exp(s) x1 + a[d1:]
    a   = subnet1([x1, c]);  s = S(a[:D - d1]);   x2 <- exp(s) x2 + a[D - d1:]

with the soft clamp S(a) = clamp 0.636 atan(a), so that |s| < clamp. The log-determinant is the sum
of all s. A sub-network is `depth` linear layers with ReLU between them. Transform and sub-network
are zuko's, which is imported only when a flow is built.

Shape legend: G rows, D coordinates, E size of the condition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from dml_dist.random_streams import Stream, generator_of, seed_of

if TYPE_CHECKING:
    from zuko.transforms import CouplingTransform, DependentTransform

_SOFT_CLAMP = 0.636
"""About 2 / pi: scales atan to the range -1 .. 1."""


class ConditionalFlow(nn.Module):
    """The flow of `num_blocks` affine coupling blocks.

    Weights and permutations depend on the seed alone; the global random state is unchanged.
    """

    def __init__(
        self,
        num_features: int,
        num_conditions: int,
        *,
        seed: int,
        num_blocks: int = 5,
        depth: int = 8,
        width: int = 128,
        clamp: float = 2.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Build the flow on the CPU.

        Args:
            num_features: D >= 2.
            num_conditions: E >= 1.
            seed: Seed of weights and permutations, >= 0.
            num_blocks: Coupling blocks, >= 1.
            depth: Linear layers of a sub-network, >= 2.
            width: Units of its hidden layers, >= 1.
            clamp: Bound of the logarithm of a scale, > 0.
            dtype: float32 or float64.

        Raises:
            ValueError: If a size is too small.
        """
        super().__init__()
        if num_features < 2 or num_conditions < 1 or num_blocks < 1 or depth < 2 or width < 1:
            raise ValueError(
                "a flow needs num_features >= 2, num_conditions >= 1, num_blocks >= 1, depth >= 2 "
                f"and width >= 1, but was given {num_features}, {num_conditions}, {num_blocks}, "
                f"{depth} and {width}"
            )
        # zuko draws weights from torch's global generator: fork it so that callers see no change.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(Stream.FLOW_WEIGHTS, seed))
            blocks = [
                _CouplingBlock(num_features, num_conditions, depth, width, clamp)
                for _ in range(num_blocks)
            ]
        self.blocks = nn.ModuleList(blocks).to(dtype)
        generator = generator_of(Stream.FLOW_PERMUTATIONS, seed)
        for block in blocks:
            block.permutation.copy_(torch.from_numpy(generator.permutation(num_features)))

    def forward(self, x_GD: Tensor, condition_GE: Tensor) -> tuple[Tensor, Tensor]:
        """Return z, (G, D), and log |det dz/dx|, (G,)."""
        log_det_G = x_GD.new_zeros(x_GD.shape[0])
        for block in self._blocks():
            x_GD, part_G = block(x_GD, condition_GE)
            log_det_G = log_det_G + part_G
        return x_GD, log_det_G

    def inverse(self, z_GD: Tensor, condition_GE: Tensor) -> Tensor:
        """Return x such that `forward` maps it to z, (G, D)."""
        for block in reversed(self._blocks()):
            z_GD = block.inverse(z_GD, condition_GE)
        return z_GD

    def _blocks(self) -> list[_CouplingBlock]:
        return cast("list[_CouplingBlock]", list(self.blocks))


class _CouplingBlock(nn.Module):
    """A fixed permutation and two affine couplings: each half is transformed given the other."""

    permutation: Tensor
    in_second: Tensor

    def __init__(
        self, num_features: int, num_conditions: int, depth: int, width: int, clamp: float
    ) -> None:
        from zuko.nn import MLP

        super().__init__()
        self.first = round(num_features / 2)  # Rounds half to even, as in the module docstring.
        self.clamp = clamp
        rest = num_features - self.first
        hidden = [width] * (depth - 1)
        self.subnet1 = MLP(self.first + num_conditions, 2 * rest, hidden)
        self.subnet2 = MLP(rest + num_conditions, 2 * self.first, hidden)
        self.register_buffer("permutation", torch.arange(num_features))
        self.register_buffer("in_second", torch.arange(num_features) >= self.first)

    def forward(self, x_GD: Tensor, condition_GE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transformed rows, and the log-determinant of each."""
        x_GD, first_G = self._transform_first(condition_GE).call_and_ladj(x_GD[:, self.permutation])
        x_GD, second_G = self._transform_second(condition_GE).call_and_ladj(x_GD)
        return x_GD, first_G + second_G

    def inverse(self, z_GD: Tensor, condition_GE: Tensor) -> Tensor:
        """Return the rows that `forward` maps to z."""
        z_GD = self._transform_second(condition_GE).inv(z_GD)
        z_GD = self._transform_first(condition_GE).inv(z_GD)
        return z_GD[:, self.permutation.argsort()]

    def _transform_first(self, condition_GE: Tensor) -> CouplingTransform:
        return self._coupling(self.subnet2, condition_GE, self.in_second)

    def _transform_second(self, condition_GE: Tensor) -> CouplingTransform:
        return self._coupling(self.subnet1, condition_GE, ~self.in_second)

    def _coupling(
        self, subnet: nn.Module, condition_GE: Tensor, constant_D: Tensor
    ) -> CouplingTransform:
        """Return the transform of the coordinates outside `constant_D`, given those inside."""
        from zuko.transforms import CouplingTransform

        def transform(constant_GF: Tensor) -> DependentTransform:
            a_scale, shift = subnet(torch.cat([constant_GF, condition_GE], dim=1)).chunk(2, dim=1)
            return _affine(shift, self.clamp * _SOFT_CLAMP * a_scale.atan())

        return CouplingTransform(transform, constant_D)


def _affine(shift: Tensor, log_scale: Tensor) -> DependentTransform:
    """Return x -> exp(log_scale) x + shift, whose log-determinant is the sum of log_scale."""
    from zuko.transforms import DependentTransform, MonotonicAffineTransform

    affine = MonotonicAffineTransform(shift, log_scale)
    # zuko applies a clamp of its own to the scale: overwrite it with ours.
    affine.log_scale, affine.scale = log_scale, log_scale.exp()
    return DependentTransform(affine, 1)
