"""Parameter groups, optimisers against torch's plain ones, clipping in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from dml_dist.config.model import Conv4Config, ModelConfig
from dml_dist.config.objective import (
    AdamConfig,
    AdamWConfig,
    CustomOptimizerConfig,
    OptimizerConfig,
    RMSpropConfig,
    SGDConfig,
)
from dml_dist.errors import CheckpointError, ConfigError
from dml_dist.models.build_model import build_model
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.comm import Comm
from dml_dist.train.optim import (
    build_optimizer,
    clip_gradients,
    parameter_groups,
    set_learning_rates,
)
from dml_dist.train.optim_state import join_rows, load_named_states, named_states, split_rows

SOME_NAMES = (
    "backbone.0.weight",
    "backbone.1.weight",
    "backbone.1.bias",
    "head.weight",
    "head.bias",
    "objective.proxies",
)


def network() -> EmbeddingModel:
    config = ModelConfig(backbone=Conv4Config(width=8), pooling="gem", embedding_size=4)
    return build_model(config, seed=0, dtype=torch.float64)


def proxies() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {"proxies": Parameter(torch.randn(6, 4, generator=generator, dtype=torch.float64))}


def settings(config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """Return learning rate and weight decay of every parameter by name."""
    groups = parameter_groups(config, network(), proxies())
    return {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}


def give_gradients(parameters: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def not_an_optimizer(groups: list[dict[str, Any]]) -> int:
    return len(groups)


class Momentumless(torch.optim.SGD):
    """A custom optimiser."""


def test_every_part_has_its_learning_rate() -> None:
    found = settings(AdamConfig(lr=1.0, head_lr=2.0, proxy_lr=3.0, bias_lr=4.0))
    assert found["backbone.0.weight"][0] == 1.0
    assert found["backbone.1.weight"][0] == 1.0
    assert found["backbone.1.bias"][0] == 4.0
    assert found["head.weight"][0] == 2.0
    assert found["pool.power"][0] == 2.0
    assert found["head.bias"][0] == 4.0
    assert found["objective.proxies"][0] == 3.0
    assert set(found) == {name for name, _ in network().named_parameters()} | {"objective.proxies"}


def test_loss_parameters_have_their_own_learning_rate() -> None:
    """Betas of classes (a table) and a single beta; without decay unless asked for."""
    owned = {**proxies(), "betas": Parameter(torch.ones(6, 1))}
    owned["representatives"] = Parameter(torch.ones(6, 4))
    replicated = {"beta": Parameter(torch.ones(1))}
    for config, rate, decay in (
        (
            AdamConfig(lr=1.0, proxy_lr=3.0, loss_lr=5.0, representative_lr=7.0, weight_decay=0.1),
            *(5.0, 0.0),
        ),
        (AdamConfig(lr=1.0, proxy_lr=3.0, weight_decay=0.1, no_weight_decay=()), 1.0, 0.1),
    ):
        groups = parameter_groups(config, network(), owned, replicated)
        found = {name: (g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
        assert found["objective.betas"] == (rate, decay)
        assert found["loss.beta"] == (rate, decay)
        assert found["objective.representatives"] == (config.representative_lr or 1.0, decay)
        assert found["objective.proxies"][0] == 3.0


def test_unset_learning_rates_are_those_of_the_group() -> None:
    found = settings(AdamConfig(lr=1.0, head_lr=2.0))
    assert found["head.bias"][0] == 2.0
    assert found["backbone.1.bias"][0] == 1.0
    assert found["objective.proxies"][0] == 1.0


@pytest.mark.parametrize(
    ("excluded", "decaying"),
    [
        ((), " ".join(SOME_NAMES)),
        (("biases",), "backbone.0.weight backbone.1.weight head.weight objective.proxies"),
        (("norms",), "backbone.0.weight head.weight head.bias objective.proxies"),
        (("head", "proxies"), "backbone.0.weight backbone.1.weight backbone.1.bias"),
        (("backbone",), "head.weight head.bias objective.proxies"),
    ],
)
def test_weight_decay_exclusions(excluded: tuple[Any, ...], decaying: str) -> None:
    found = settings(SGDConfig(weight_decay=0.1, no_weight_decay=excluded))
    assert [name for name in SOME_NAMES if found[name][1] > 0] == decaying.split()


@pytest.mark.parametrize(
    ("config", "reference", "options"),
    [
        (
            AdamConfig(lr=0.1, eps=1.0, betas=(0.8, 0.9)),
            torch.optim.Adam,
            {"eps": 1.0, "betas": (0.8, 0.9)},
        ),
        (AdamWConfig(lr=0.1, weight_decay=0.3), torch.optim.AdamW, {}),
        (SGDConfig(lr=0.1, nesterov=True), torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (RMSpropConfig(lr=0.1, momentum=0.5), torch.optim.RMSprop, {"momentum": 0.5}),
        (
            CustomOptimizerConfig(
                lr=0.1, target=f"{__name__}:Momentumless", options={"momentum": 0.3}
            ),
            torch.optim.SGD,
            {"momentum": 0.3},
        ),
    ],
    ids=["adam", "adamw", "sgd", "rmsprop", "custom"],
)
def test_optimisers_step_as_torch_does(
    config: OptimizerConfig, reference: Any, options: dict[str, Any]
) -> None:
    model, rows = network(), proxies()
    optimizer = build_optimizer(config, parameter_groups(config, model, rows))
    twin, twin_rows = network(), proxies()
    found = settings(config)
    named = [*twin.named_parameters(), ("objective.proxies", twin_rows["proxies"])]
    groups = [{"params": [value], "weight_decay": found[name][1]} for name, value in named]
    expected = reference(groups, lr=0.05, **options)
    set_learning_rates(optimizer, 0.5)
    for seed in range(3):
        give_gradients([*model.parameters(), *rows.values()], seed)
        give_gradients([*twin.parameters(), *twin_rows.values()], seed)
        optimizer.step()
        expected.step()
    pairs = zip(
        [*model.parameters(), *rows.values()],
        [*twin.parameters(), *twin_rows.values()],
        strict=True,
    )
    for one, two in pairs:
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("config", [AdamConfig(), SGDConfig(), RMSpropConfig(momentum=0.5)])
def test_a_parameter_may_get_its_first_gradient_late(config: OptimizerConfig) -> None:
    """As the backbone's do after its warm-up, in a group with parameters that have state."""
    model = network()
    optimizer = build_optimizer(config, parameter_groups(config, model, {}))
    give_gradients([model.head.weight], 0)
    optimizer.step()
    before = model.backbone[0].weight.detach().clone()
    give_gradients([*model.parameters()], 1)
    optimizer.step()
    assert not torch.equal(model.backbone[0].weight, before)


def test_wrong_custom_optimisers() -> None:
    groups = parameter_groups(AdamConfig(), network(), proxies())
    with pytest.raises(
        ConfigError, match=r"returned int\. It must return a torch\.optim\.Optimizer"
    ):
        build_optimizer(CustomOptimizerConfig(target=f"{__name__}:not_an_optimizer"), groups)
    wrong = CustomOptimizerConfig(target=f"{__name__}:Momentumless", options={"speed": 1})
    with pytest.raises(ConfigError, match="speed"):
        build_optimizer(wrong, groups)


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_clipping_is_torchs_in_one_process(max_norm: float) -> None:
    model, rows = network(), proxies()
    twin, twin_rows = network(), proxies()
    give_gradients([*model.parameters(), *rows.values()], 3)
    give_gradients([*twin.parameters(), *twin_rows.values()], 3)
    norm = clip_gradients(model.parameters(), rows.values(), max_norm, Comm.single())
    expected = clip_grad_norm_([*twin.parameters(), *twin_rows.values()], max_norm)
    assert float(norm) == pytest.approx(float(expected), rel=1e-12)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-5, atol=0)


def test_clipping_passes_over_parameters_without_gradient() -> None:
    model = network()
    model.head.bias.grad = torch.full((4,), 3.0, dtype=torch.float64)
    norm = clip_gradients(model.parameters(), [], 1.0, Comm.single())
    assert float(norm) == pytest.approx(6.0)
    torch.testing.assert_close(model.head.bias.grad, torch.full((4,), 0.5, dtype=torch.float64))
    assert model.head.weight.grad is None


def test_clipping_of_gradients_whose_squares_overflow() -> None:
    large = torch.nn.Parameter(torch.zeros(2))
    large.grad = torch.tensor([3e26, 4e26])
    norm = clip_gradients([large], [], 1.0, Comm.single())
    assert float(norm) == pytest.approx(5e26)
    torch.testing.assert_close(large.grad, torch.tensor([0.6, 0.8]))


def test_states_by_name_survive_another_order_of_parameters() -> None:
    config = AdamConfig()
    model, rows = network(), proxies()
    optimizer = build_optimizer(config, parameter_groups(config, model, rows))
    give_gradients([*model.parameters(), *rows.values()], 0)
    model.head.bias.grad = None
    optimizer.step()
    states = named_states(optimizer)
    assert "head.bias" not in states
    twin = network()
    groups = parameter_groups(config, twin, proxies())[::-1]
    other = build_optimizer(config, groups)
    load_named_states(other, states)
    found = named_states(other)
    assert found.keys() == states.keys()
    for name, state in states.items():
        for key, value in state.items():
            assert torch.equal(found[name][key], value), (name, key)
    with pytest.raises(CheckpointError, match=r"neck.weight"):
        load_named_states(other, {"neck.weight": {}})


def test_rows_are_cut_and_joined() -> None:
    parameter = Parameter(torch.zeros(4, 2))
    state = {"step": torch.tensor(3.0), "exp_avg": torch.arange(8.0).reshape(4, 2), "beta": 0.5}
    rows, shared = split_rows(parameter, state)
    assert set(rows) == {"exp_avg"}
    halves = [
        ({key: value[cut] for key, value in rows.items()}, shared)
        for cut in (slice(0, 1), slice(1, 4))
    ]
    joined = join_rows(halves)
    assert torch.equal(joined["exp_avg"], state["exp_avg"])
    assert joined["beta"] == 0.5
    assert set(split_rows(parameter, {"row_variance": torch.zeros(4, 1)})[0]) == {"row_variance"}
    for shape in ((3,), (4,), (1, 2), (4, 3), (4, 2, 1)):
        with pytest.raises(CheckpointError, match="per element"):
            split_rows(parameter, {"factor": torch.zeros(shape)})
