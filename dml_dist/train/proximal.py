"""The proximal term of alternating projections: weights are pulled towards an earlier solution.

    lambda / 2 |theta - theta_0|^2,  gradient lambda (theta - theta_0)

added to the gradients after clipping and before the update, without an autograd graph, so that the
optimiser sees it. It covers weights of the network; biases and the parameters of normalisation
layers are left out, and so is what the objective owns (METHODS 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dml_dist.models.embedding import EmbeddingModel
from dml_dist.train.optim import parameter_kinds


def pulled_parameters(model: EmbeddingModel) -> dict[str, nn.Parameter]:
    """Return the parameters that the term covers, by name."""
    kinds = parameter_kinds(model)
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if not kinds[name].bias and not kinds[name].norm
    }


def pulled_weights(model: EmbeddingModel) -> dict[str, Tensor]:
    """Return a copy of the parameters that the term covers, by name."""
    return {name: p.detach().clone() for name, p in pulled_parameters(model).items()}


@dataclass(frozen=True, eq=False)
class ProximalTerm:
    """The earlier solution, and how strongly it pulls.

    Attributes:
        anchor: theta_0 by name of the parameter.
        weight: lambda >= 0.
    """

    anchor: Mapping[str, Tensor]
    weight: float

    @torch.no_grad()
    def add_gradients(self, model: EmbeddingModel) -> None:
        """Add lambda (theta - theta_0) to the gradients of parameters that have one.

        A parameter without a gradient (a frozen backbone) is not updated, so nothing is added.
        """
        if self.weight == 0:
            return
        for name, parameter in pulled_parameters(model).items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - self.anchor[name], alpha=self.weight)

    @torch.no_grad()
    def distance(self, model: EmbeddingModel) -> Tensor:
        """Return |theta - theta_0|, 0-d float64."""
        differences = [p - self.anchor[name] for name, p in pulled_parameters(model).items()]
        norms = torch._foreach_norm(differences)
        return torch.stack(norms).double().square().sum().sqrt()
