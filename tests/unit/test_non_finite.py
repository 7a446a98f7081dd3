"""Non-finite embeddings, gradients and weights: noticed under every loss, and named truthfully."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import dml_dist
from dml_dist.errors import DivergedError, RunError
from dml_dist.parallel.comm import Comm
from dml_dist.runs.records import read_records
from dml_dist.runtime.signals import StopRequest
from dml_dist.runtime.tasks import fatal_event, rebuild_error
from dml_dist.studies.tune_trial import execute_trial, trial_payload
from dml_dist.topology import Topology
from dml_dist.train.meter import Meter
from dml_dist.train.step import train_step
from tests.training_setup import SmallRun, small_config

PROXIES = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "contrastive": dml_dist.contrastive_loss,
    "multi_similarity": dml_dist.multi_similarity_loss,
    "multi_similarity of all pairs": lambda x, y: dml_dist.multi_similarity_loss(
        x, y, epsilon=None
    ),
    "margin": dml_dist.margin_loss,
    "triplet": dml_dist.triplet_loss,
    "triplet semi_hard": lambda x, y: dml_dist.triplet_loss(x, y, mining="semi_hard"),
    "triplet hard": lambda x, y: dml_dist.triplet_loss(x, y, mining="hard"),
    "proxy_nca": lambda x, y: dml_dist.proxy_nca_loss(x, y, PROXIES),
    "proxy_nca margin": lambda x, y: dml_dist.proxy_nca_loss(x, y, PROXIES, surrogate="margin"),
    "proxy_nca dynamic": lambda x, y: dml_dist.dynamic_proxy_nca_loss(x, y, PROXIES),
    "proxy_nca dynamic margin": lambda x, y: dml_dist.dynamic_proxy_nca_loss(
        x, y, PROXIES, surrogate="margin"
    ),
    "proxy_anchor": lambda x, y: dml_dist.proxy_anchor_loss(x, y, PROXIES),
    "softmax": lambda x, y: dml_dist.normalized_softmax_loss(x, y, PROXIES),
    "cosface": lambda x, y: dml_dist.cosface_loss(x, y, PROXIES),
    "arcface": lambda x, y: dml_dist.arcface_loss(x, y, PROXIES),
    "soft_triple": lambda x, y: dml_dist.soft_triple_loss(x, y, PROXIES, centers_per_class=2),
}


@pytest.mark.parametrize("name", LOSSES)
def test_no_comparison_hides_an_embedding_that_is_not_finite(name: str) -> None:
    """All rows NaN, one value NaN or infinite, and a row whose norm overflows."""
    labels = torch.arange(8) % 4
    whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    assert LOSSES[name](whole, labels).isfinite()
    for rows, value in [(slice(None), torch.nan), (2, torch.nan), (5, torch.inf), (7, 3e38)]:
        spoiled = whole.clone()
        spoiled[rows, 1:3] = value
        assert LOSSES[name](spoiled, labels).isnan(), (rows, value)


@pytest.mark.parametrize("name", [name for name in LOSSES if "nca" in name])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nor_does_one_hide_a_proxy(
    name: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one of a class that is not in the batch, which no row is the nearest to."""
    spoiled = PROXIES.clone()
    spoiled[6, 0] = value
    monkeypatch.setattr("tests.unit.test_non_finite.PROXIES", spoiled)
    embeddings = torch.randn(8, 6, generator=torch.Generator().manual_seed(2))
    assert LOSSES[name](embeddings, torch.arange(8) % 4).isnan()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_rows_has_the_loss_0(name: str) -> None:
    embeddings = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    loss = LOSSES[name](embeddings, torch.zeros(0, dtype=torch.int64))
    assert (loss.shape, loss.dtype, float(loss.detach())) == ((), torch.float64, 0.0)
    loss.backward()
    assert embeddings.grad is not None


# ---------------------------------------------------------------- in a run


def run_of(folder: Path, **changes: Any) -> SmallRun:
    changes = {"train__max_grad_norm": "null", "checkpoint__every_steps": 100, **changes}
    config = small_config(**changes)
    return SmallRun(Topology(), Comm.single(), config, folder, validation=False)


@pytest.mark.parametrize(
    "loss",
    [
        "{name: multi_similarity}",
        "{name: triplet, mining: semi_hard}",
        "{name: proxy_nca}",
        "{name: custom, target: 'tests.custom_examples:ContrastivePairs'}",
    ],
)
def test_an_embedding_is_noticed_at_its_step_and_named(loss: str, tmp_path: Path) -> None:
    """One image of step 2 is spoiled; the run has saved nothing yet."""
    run = run_of(tmp_path, loss=loss, train__log_every=4)
    batches = run.batches

    def spoiled(start: int, end: int) -> Any:
        for batch in batches(start, end):
            if batch.step == 1:
                batch.images[3] = torch.nan
            yield batch

    run.batches = spoiled  # type: ignore[method-assign]
    with pytest.raises(
        DivergedError, match=r"loss is not finite at step 2 \(noticed at step 4\)"
    ) as caught:
        run.train()
    row = run.seen[1][3]
    assert f"the worst sample is row {row}, whose embedding has norm nan" in str(caught.value)
    assert str(caught.value).endswith("there is no checkpoint yet")
    assert str(read_records(tmp_path / "steps.jsonl")[0]["loss"]) == "nan"


@pytest.mark.parametrize("max_grad_norm", ["null", "1.0"])
def test_gradients_are_noticed_where_the_loss_is_finite(max_grad_norm: str, tmp_path: Path) -> None:
    loss = "{name: custom, target: 'tests.custom_examples:RootOfSquares'}"
    run = run_of(tmp_path, loss=loss, train__max_grad_norm=max_grad_norm, train__log_every=1)
    with pytest.raises(DivergedError, match=r"gradients are not finite at step 1 \(noticed at st"):
        run.train()


def test_weights_without_a_checkpoint(tmp_path: Path) -> None:
    """The update alone overflows."""
    run = run_of(tmp_path, optim__lr=1e39, train__steps=1)
    with pytest.raises(DivergedError, match=r"not finite at step 1\..*there is no checkpoint yet"):
        run.train()


def test_gradients_that_only_another_rank_has_end_this_rank_too() -> None:
    """Each rank owns other proxies: ranks agree on the first step of any of them."""

    class OfTwoRanks:
        def all_reduce_max(self, own: Tensor, *, what: str) -> Tensor:
            return torch.maximum(own, torch.tensor([0, 1, 1]))

    meter = Meter()
    for loss in (3.0, 2.0, 1.0):
        meter.add({"loss": torch.tensor(loss)}, torch.tensor(True), 8, 0.0)
    reading = meter.read(cast(Comm, OfTwoRanks()))
    assert (reading.first_bad, reading.bad_values) == (1, {"loss": 2.0})


@pytest.mark.parametrize(
    ("error", "state"), [(DivergedError("NaN"), "diverged"), (RunError("disk full"), "failed")]
)
def test_a_trial_tells_divergence_from_other_faults(
    error: RunError, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the class of the error, whatever was recorded: gradients diverge at a finite loss."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr("dml_dist.studies.tune_trial.execute_run", fail)
    payload = trial_payload([small_config()], [tmp_path / "run"], ["map_at_r"], 6)
    outcome = execute_trial(payload, lambda *_: None, StopRequest())
    assert (outcome["state"], outcome["problem"]) == (state, str(error))


def test_the_error_keeps_its_class_on_its_way_to_the_driver() -> None:
    error = rebuild_error(fatal_event(DivergedError("the loss is not finite"), 1))
    assert type(error) is DivergedError


def test_a_step_waits_for_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a value would wait for the device; a step reads none."""
    run = run_of(tmp_path, loss="{name: multi_similarity}", train__steps=2)

    def refuse(*_: Any) -> Any:
        raise AssertionError("the step reads a value of the device")

    def guarded(*arguments: Any, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "__bool__", "__float__"):
                patch.setattr(Tensor, name, refuse)
            return train_step(*arguments, **options)

    monkeypatch.setattr("dml_dist.train.loop.train_step", guarded)
    run.train()
