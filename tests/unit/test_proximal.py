"""The proximal term against autograd of lambda / 2 |theta - theta_0|^2."""

from __future__ import annotations

import numpy as np
import torch

from dml_dist.config.load import parse_config
from dml_dist.models.build_model import build_model
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.comm import Comm
from dml_dist.train.proximal import ProximalTerm, pulled_parameters, pulled_weights
from dml_dist.train.state import build_state
from dml_dist.train.step import train_step
from tests.training_setup import IMAGES_PER_CLASS, NUM_CLASSES, images_of, small_config


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
    term = ProximalTerm(pulled_weights(other), 0.3)
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
    term = ProximalTerm(pulled_weights(other), 1.0)
    assert all(parameter.ndim > 1 for parameter in pulled_parameters(model).values())
    anchor = dict(other.named_parameters())
    squares = [
        (p - anchor[name]).square().sum() for name, p in model.named_parameters() if p.ndim > 1
    ]
    torch.testing.assert_close(term.distance(model), torch.stack(squares).sum().sqrt())


def test_the_solution_is_a_copy() -> None:
    model = make_model()
    term = ProximalTerm(pulled_weights(model), 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    count = sum(p.numel() for p in pulled_parameters(model).values())
    torch.testing.assert_close(float(term.distance(model)), count**0.5)


def test_parameters_without_a_gradient_get_none() -> None:
    model = make_model()
    term = ProximalTerm(pulled_weights(make_model(1)), 1.0)
    model.head(torch.zeros(1, model.head.in_features, dtype=torch.float64)).sum().backward()
    term.add_gradients(model)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.head.weight.grad is not None


def test_the_term_is_added_after_clipping() -> None:
    """A step of gradient descent by lr (g min(1, c / |g|) + lambda (theta - theta_0)).

    Gradients are clipped from a norm above 0.05 to 0.05; the term alone is larger than that.
    """
    config = small_config(
        optim="{name: sgd, lr: 0.5, proxy_lr: 0.5, momentum: 0.0}", train__precision="float64"
    )
    rows = np.arange(0, NUM_CLASSES * IMAGES_PER_CLASS, 4)
    images, labels = images_of(rows).double(), torch.from_numpy(rows // IMAGES_PER_CLASS)
    state = build_state(config, num_classes=NUM_CLASSES, comm=Comm.single())
    state.objective(state.model(images), labels, [len(rows)], step=0).loss.backward()
    parameters = dict(state.model.named_parameters())
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    proxies = state.owned["proxies"]
    assert proxies.grad is not None
    squares = [g.square().sum() for g in (*gradients.values(), proxies.grad)]
    norm = float(torch.stack(squares).sum().sqrt())
    assert norm > 0.05
    before = {name: p.detach().clone() for name, p in parameters.items()}
    drawn = {name: p.dim() > 1 for name, p in parameters.items()}
    term = ProximalTerm({name: p + 1.0 for name, p in before.items() if drawn[name]}, weight=0.3)
    output = train_step(
        state,
        images,
        labels,
        [len(rows)],
        learning_rate_factor=1.0,
        max_grad_norm=0.05,
        proximal=term,
    )
    assert output.gradient_norm is not None
    assert abs(float(output.gradient_norm) - norm) < 1e-9
    for name, gradient in gradients.items():
        whole = gradient * 0.05 / norm + (-0.3 if drawn[name] else 0.0)
        expected = before[name] - 0.5 * whole
        torch.testing.assert_close(parameters[name].detach(), expected, rtol=0, atol=1e-7)
