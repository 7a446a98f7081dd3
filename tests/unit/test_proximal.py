"""The proximal term against autograd of lambda / 2 |theta - theta_0|^2."""

from __future__ import annotations

import torch

from dml_dist.config.load import parse_config
from dml_dist.models.build_model import build_model
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.train.proximal import ProximalTerm, drawn_parameters


def make_model(seed: int = 0) -> EmbeddingModel:
    config = parse_config(
        {
            "name": "x",
            "data": {"path": "unused"},
            "model": {"backbone": {"name": "conv4", "width": 8}, "embedding_size": 4},
            "train": {"global_batch_size": 2, "steps": 1},
        }
    )
    return build_model(config.model, seed=seed, dtype=torch.float64)


def test_gradient_is_that_of_half_the_squared_distance() -> None:
    model, other = make_model(0), make_model(1)
    term = ProximalTerm.at(other, weight=0.3)
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    model(images).square().sum().backward()
    term.add_gradients(model)
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss = model(images).square().sum()
    anchor = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # Biases and the weights of normalisation are vectors.
            loss = loss + 0.15 * (parameter - anchor[name].detach()).square().sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-12, atol=1e-12)


def test_distance_runs_over_weights_alone() -> None:
    model, other = make_model(0), make_model(1)
    term = ProximalTerm.at(other, weight=1.0)
    assert all(parameter.ndim > 1 for parameter in drawn_parameters(model).values())
    anchor = dict(other.named_parameters())
    squares = [
        (p - anchor[name]).square().sum() for name, p in model.named_parameters() if p.ndim > 1
    ]
    torch.testing.assert_close(term.distance(model), torch.stack(squares).sum().sqrt())


def test_the_solution_is_a_copy() -> None:
    model = make_model()
    term = ProximalTerm.at(model, weight=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    count = sum(p.numel() for p in drawn_parameters(model).values())
    torch.testing.assert_close(float(term.distance(model)), count**0.5)


def test_parameters_without_a_gradient_get_none() -> None:
    model = make_model()
    term = ProximalTerm.at(make_model(1), weight=1.0)
    model.head(torch.zeros(1, model.head.in_features, dtype=torch.float64)).sum().backward()
    term.add_gradients(model)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.head.weight.grad is not None
