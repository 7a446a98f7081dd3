"""Micro-batches in one process: memory, precision, resuming, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dml_dist.errors import ConfigError
from dml_dist.parallel.comm import Comm
from dml_dist.runs.study import FREE
from dml_dist.train.run_plan import resolve
from dml_dist.train.state import build_state
from dml_dist.train.step import train_step
from tests.distributed.test_micro_batches import DrawingBackbone
from tests.saved_bytes import SavedBytes
from tests.training_setup import (
    NUM_CLASSES,
    SmallRun,
    small_config,
    small_plan,
    small_run,
    snapshot,
)

NORMED = "{name: custom, target: 'tests.distributed.test_training:NormedBackbone'}"
DRAWING = f"{{name: custom, target: '{DrawingBackbone.__module__}:DrawingBackbone'}}"


def peak_bytes(num_images: int, micro_batch_size: int | None) -> int:
    """Return the largest number of saved bytes in a step."""
    state = build_state(small_config(), num_classes=NUM_CLASSES, comm=Comm.single())
    images = torch.randn(num_images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with SavedBytes([*state.model.parameters(), *state.owned.values()]) as saved:
        train_step(
            state,
            images,
            torch.arange(num_images) % NUM_CLASSES,
            [num_images],
            learning_rate_factor=1.0,
            micro_batch_size=micro_batch_size,
        )
    assert saved.now == 0
    return saved.peak


def test_activations_of_one_micro_batch_are_in_memory() -> None:
    assert 0 < peak_bytes(32, 4) <= peak_bytes(4, None) < peak_bytes(32, None) / 7
    assert peak_bytes(32, 32) == peak_bytes(32, None)


def small_gradients(micro_batch_size: int | None, **changes: Any) -> dict[str, Tensor]:
    """Return the gradients of one step of seven images of seven classes."""
    state = build_state(small_config(**changes), num_classes=NUM_CLASSES, comm=Comm.single())
    images = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    train_step(
        state,
        images.to(state.precision.dtype),
        torch.arange(7),
        [7],
        learning_rate_factor=1.0,
        micro_batch_size=micro_batch_size,
    )
    found = {}
    for name, parameter in state.model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def test_lower_precision_gives_all_weights_their_gradients() -> None:
    whole = small_gradients(None, train__precision="bf16")
    for name, gradient in small_gradients(2, train__precision="bf16").items():
        assert gradient.dtype == torch.float32
        difference = torch.linalg.vector_norm(gradient - whole[name])
        assert difference <= 0.02 * torch.linalg.vector_norm(whole[name]), name


@pytest.mark.gpu
def test_the_second_pass_on_a_gpu_draws_what_the_first_drew() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    config = small_config(model__backbone=DRAWING)
    state = build_state(config, num_classes=NUM_CLASSES, comm=Comm.single("cuda:0"))
    images, labels = torch.randn(7, 3, 32, 32, device="cuda"), torch.arange(7, device="cuda")
    DrawingBackbone.factors.clear()
    train_step(state, images, labels, [7], learning_rate_factor=1.0, micro_batch_size=3)
    first, second = DrawingBackbone.factors[:3], DrawingBackbone.factors[3:]
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def test_a_batch_without_pairs_has_a_gradient_of_zeros() -> None:
    for mining in ("all", "hard"):
        found = small_gradients(3, loss=f"{{name: triplet, mining: {mining}}}")
        assert not any(gradient.any() for gradient in found.values())


def test_a_run_is_continued_with_other_micro_batches(tmp_path: Path) -> None:
    whole = small_run(tmp_path / "whole", small_config(train__precision="float64")).train()
    config = small_config(train__precision="float64")
    run: SmallRun = small_run(tmp_path / "cut", config, fail_at=4)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.config = small_config(train__precision="float64", train__micro_batch_size=3)
    run.fail_at, run.attempt = None, 2
    result = run.train(resume=True)
    assert [change.path for change in result.changes] == ["train.micro_batch_size"]
    assert result.start_step == 3
    for name, value in snapshot(whole.state).items():
        torch.testing.assert_close(snapshot(result.state)[name], value, rtol=0, atol=1e-9)
    assert "train.micro_batch_size" in FREE


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ("{name: conv4, norm: batch}", r"\(layers: 4\) with synchronized statistics"),
        (
            "{name: resnet18, batch_norm: {statistics: per_rank}}",
            r"\(layers: 20\) with per_rank statistics",
        ),
        (NORMED, r"\(layers: 1\) with synchronized statistics"),
    ],
)
def test_batch_statistics_are_refused(backbone: str, words: str) -> None:
    config = small_config(model__backbone=backbone, train__micro_batch_size=4)
    with pytest.raises(ConfigError, match=f"train.micro_batch_size is 4, but .* {words}"):
        small_plan(config, 2)
    small_plan(small_config(model__backbone=backbone), 2)


def test_normalised_embeddings_are_refused() -> None:
    config = small_config(model__normalize="batch", train__micro_batch_size=4)
    with pytest.raises(ConfigError, match=r"\(layers: 1\) with synchronized .*normalize: none"):
        small_plan(config, 1)


def test_frozen_statistics_and_other_layers_are_accepted() -> None:
    for backbone in (
        "{name: conv4}",
        "{name: resnet18, weights: IMAGENET1K_V1}",
        "{name: swin_t}",
        NORMED.replace("}", ", batch_norm: {statistics: frozen}}"),
    ):
        small_plan(small_config(model__backbone=backbone, train__micro_batch_size=4), 2)


@pytest.mark.parametrize(("size", "text"), [(2, "2 (3 per rank)"), (50, "50 (1 per rank)")])
def test_the_plan_shows_micro_batches(size: int, text: str) -> None:
    config = small_config(train__micro_batch_size=size)
    assert ("images per micro-batch", text) in small_plan(config, 2).describe()
    plan = resolve(small_config(), train_class_sizes=[5] * NUM_CLASSES, world_size=2)
    assert "images per micro-batch" not in dict(plan.describe())
