"""Proxy-NCA's fractional and dynamic assignment on toy cases worked by hand, and their counts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dml_dist import dynamic_proxy_nca_loss, proxy_nca_loss
from dml_dist.config.objective import LossConfig, ProxyNCAConfig, TripletConfig
from dml_dist.losses.class_weights import class_weights, fractional_rows
from dml_dist.losses.numerics import merge_statistics
from dml_dist.losses.proxy_nca_dynamic import class_mates
from dml_dist.parallel.assignment import DynamicProxyObjective
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.train.optim_state import forget_rows
from tests.training_setup import small_config, small_run, whole_snapshot


def _circle(*degrees: float) -> Tensor:
    """Unit vectors at angles, float64."""
    angles = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def _cos(degrees: float) -> float:
    return math.cos(math.radians(degrees))


UNIT = {"embedding_scale": 1.0, "proxy_scale": 0.5}
"""Logits are the cosines."""


PROXIES = _circle(0, 90, 180, 270)
BATCH = _circle(10, 350, 80, 200)
"""Nearest proxies 0, 0, 1, 2; proxy 3 is no sample's."""


def _dynamic(labels: list[int], **options: Any) -> float:
    return dynamic_proxy_nca_loss(BATCH, torch.tensor(labels), PROXIES, **options).item()


def test_the_positive_is_the_proxy_of_another_sample_of_the_class() -> None:
    """Labels 0, 1, 0, 1 at 10, 350, 80, 200 degrees, with the nearest proxies 0, 0, 90, 180.

    Class 0 chose {0, 90}, class 1 {0, 180}; what is the positive is no negative:
    10: positive 90, negatives {0, 180}. 350: positive 180, negatives {0, 90}.
    80: positive 0, negative {180}. 200: positive 0, negative {90}.
    """
    terms = [
        math.log(math.exp(_cos(10)) + math.exp(_cos(170))) - _cos(80),
        math.log(math.exp(_cos(10)) + math.exp(_cos(100))) - _cos(170),
        _cos(100) - _cos(80),
        _cos(110) - _cos(160),
    ]
    found = _dynamic([0, 1, 0, 1], denominator="negatives", **UNIT)
    assert found == pytest.approx(sum(terms) / 4, rel=1e-12)
    with_positive = [math.log(1 + math.exp(term)) for term in terms]
    assert _dynamic([0, 1, 0, 1], **UNIT) == pytest.approx(sum(with_positive) / 4, rel=1e-12)


def test_a_sample_without_another_of_its_class_or_without_negatives_has_no_term() -> None:
    """Labels 0, 0, 1, 2: 80 and 200 degrees are alone; both samples of class 0 have proxy 0."""
    term = math.log(math.exp(_cos(80)) + math.exp(_cos(170))) - _cos(10)
    other = math.log(math.exp(_cos(100)) + math.exp(_cos(170))) - _cos(10)
    found = _dynamic([0, 0, 1, 2], denominator="negatives", **UNIT)
    assert found == pytest.approx((term + other) / 4, rel=1e-12)
    assert _dynamic([0, 1, 2, 3]) == 0
    assert _dynamic([5, 5, 5, 5]) == 0
    # At 10 and 350 degrees, of two classes with proxy 0: class 1's only choice is the positive.
    batch, labels = _circle(10, 20, 350), torch.tensor([0, 0, 1])
    assert dynamic_proxy_nca_loss(batch, labels, PROXIES) == 0


def test_the_mean_over_all_positives() -> None:
    """Labels 0, 0, 0, 1: of 10 degrees, y is 350 (proxy 0) or 80 (proxy 90); 180 is negative."""
    rows = {10: (10, 80, 170), 350: (10, 100, 170), 80: (80, 80, 100)}
    terms = [
        ((negative - first) + (negative - second)) / 2
        for first, second, negative in (tuple(map(_cos, row)) for row in rows.values())
    ]
    options: dict[str, Any] = {"denominator": "negatives", **UNIT}
    found = _dynamic([0, 0, 0, 1], positives="all", **options)
    assert found == pytest.approx(sum(terms) / 4, rel=1e-12)
    draws = [_dynamic([0, 0, 0, 1], step=step, **options) for step in range(400)]
    assert len(set(draws)) == 4  # 80 degrees has proxy 0 from either of the others.
    assert sum(draws) / 400 == pytest.approx(found, abs=0.02)
    assert draws[7] == _dynamic([0, 0, 0, 1], step=7, **options)
    assert draws != [_dynamic([0, 0, 0, 1], step=step, seed=1, **options) for step in range(400)]


def test_mates_are_drawn_evenly() -> None:
    """Each of a class's other rows, wherever they are in the batch."""
    groups = torch.tensor([2, 0, 2, 1, 2, 0, 2])
    found = [class_mates(groups, torch.full((7,), shift)) for shift in (1, 2, 3)]
    mates = torch.stack([torch.where(has, mate, -1) for mate, has in found])
    expected = {0: [2, 4, 6], 1: [5], 2: [0, 4, 6], 3: [], 4: [0, 2, 6], 5: [1], 6: [0, 2, 4]}
    for row, others in expected.items():
        assert sorted(mate for mate in mates[:, row].tolist() if mate >= 0) == others


def test_margin_surrogate_of_dynamic_assignment() -> None:
    """D = 2 - 2 cos: hinge 2 cos- - 2 cos+ + M, summed or averaged over a sample's negatives."""

    def hinge(negative: float, positive: float) -> float:
        return max(0.0, 2 * _cos(negative) - 2 * _cos(positive) + 1.8)

    rows = [
        [hinge(10, 80), hinge(170, 80)],
        [hinge(10, 170), hinge(100, 170)],
        [hinge(100, 80)],
        [hinge(110, 160)],
    ]
    options = {"surrogate": "margin", "margin": 1.8}
    found = _dynamic([0, 1, 0, 1], margin_reduction="sum", **options)
    assert found == pytest.approx(sum(map(sum, rows)) / 4, rel=1e-12)
    means = [sum(row) / len(row) for row in rows]
    assert _dynamic([0, 1, 0, 1], **options) == pytest.approx(sum(means) / 4, rel=1e-12)


def test_ties_go_to_the_lower_row() -> None:
    proxies = _circle(180, 90, 0, 0)
    proxies.requires_grad_()
    batch, labels = _circle(0, 0, 180, 180), torch.tensor([0, 0, 1, 1])
    loss = dynamic_proxy_nca_loss(batch, labels, proxies, **UNIT)
    loss.backward()
    assert proxies.grad is not None
    # Rows 2 and 0 are chosen; 3 equals 2, and 1 is no sample's: neither is counted.
    assert (proxies.grad[[1, 3]] == 0).all()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-12)


def test_equally_near_proxies_of_two_shards() -> None:
    """In either order of merging; columns are samples, rows value and proxy."""
    low = {"nearest": torch.tensor([[0.5, 0.2, 0.1], [1.0, 0.0, 2.0]], dtype=torch.float64)}
    high = {"nearest": torch.tensor([[0.5, 0.3, -0.1], [7.0, 8.0, 9.0]], dtype=torch.float64)}
    expected = torch.tensor([[0.5, 0.3, 0.1], [1.0, 8.0, 2.0]], dtype=torch.float64)
    for a, b in ((low, high), (high, low)):
        assert torch.equal(merge_statistics(a, b, {"nearest": "argmax"})["nearest"], expected)


def test_classes_that_share_a_proxy_give_no_negative() -> None:
    """Classes 0 and 2 share row 0, class 1 has row 1: one negative for every sample."""
    proxies, batch = _circle(0, 90), _circle(30, 60, 45)
    rows = torch.tensor([0, 1, 0])
    gaps = [_cos(60) - _cos(30), _cos(60) - _cos(30), 0.0]
    options: dict[str, Any] = {"class_rows": rows, **UNIT}
    loss = proxy_nca_loss(batch, torch.arange(3), proxies, denominator="negatives", **options)
    assert loss.item() == pytest.approx(sum(gaps) / 3, rel=1e-12)


def test_class_map_is_balanced_and_seeded() -> None:
    rows = fractional_rows(103, 10, seed=4)
    counts = torch.bincount(rows, minlength=10)
    assert (counts.min(), counts.max(), len(rows)) == (10, 11, 103)
    assert torch.equal(rows, fractional_rows(103, 10, seed=4))
    assert not torch.equal(rows, fractional_rows(103, 10, seed=5))
    assert not torch.equal(rows, rows.sort().values)
    one_to_one = fractional_rows(7, 7, seed=0)
    assert sorted(one_to_one.tolist()) == list(range(7))


def test_weights_of_classes() -> None:
    inverse = class_weights("inverse_frequency", [1, 4, 5])
    torch.testing.assert_close(inverse * 5 / inverse[2], torch.tensor([5, 1.25, 1]).double() * 5)
    effective = class_weights("effective_number", [1, 2, 3], beta=0.5)
    expected = torch.tensor([1.0, 1 / 1.5, 1 / 1.75], dtype=torch.float64)
    torch.testing.assert_close(effective / effective[0], expected)
    assert torch.equal(class_weights("none", [3, 8]), torch.ones(2).double())
    x, labels, proxies = _circle(20, 100), torch.tensor([0, 1]), _circle(0, 90, 200)
    alone = [
        proxy_nca_loss(x[[i]], labels[[i]], proxies, denominator="negatives").item() for i in (0, 1)
    ]
    weights = torch.tensor([3.0, 1.0, 9.0])
    both = proxy_nca_loss(x, labels, proxies, denominator="negatives", class_weights=weights).item()
    assert both == pytest.approx((3 * alone[0] + alone[1]) / 4, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "rows"),
    [
        (ProxyNCAConfig(proxies_per_class=2), (14, 14, 14)),
        (ProxyNCAConfig(assignment="fractional", proxy_share=0.5), (3, 4, 4)),
        (ProxyNCAConfig(assignment="dynamic", proxy_share=2.0), (14, 14, 14)),
        (TripletConfig(), (0, 0, 0)),
    ],
)
def test_rows_of_tables_of_planned_ranks(config: LossConfig, rows: tuple[int, ...]) -> None:
    objective = build_objective(
        config, num_classes=21, embedding_size=4, seed=0, comm=Comm.planned(3)
    )
    assert objective.proxy_rows() == rows
    assert all(parameter.is_meta for parameter in objective.parameters())


@dataclass
class Counted:
    """An objective on the circle, with its proxies at 0, 90, 180 and 270 degrees."""

    objective: DynamicProxyObjective

    def step(self, labels: list[int], *degrees: float) -> dict[str, float]:
        """Run one batch; return the recorded statistics."""
        output = self.objective(_circle(*degrees), torch.tensor(labels), [len(labels)])
        return {name: value.item() for name, value in output.statistics.items()}


def _counted(**options: Any) -> Counted:
    objective = build_objective(
        ProxyNCAConfig(assignment="dynamic", **options),
        num_classes=4,
        embedding_size=2,
        seed=0,
        comm=Comm.single(),
        dtype=torch.float64,
    )
    assert isinstance(objective, DynamicProxyObjective)
    with torch.no_grad():
        objective.proxies.copy_(PROXIES)
    return Counted(objective)


def test_occupancy_churn_and_dead_proxies() -> None:
    run = _counted(dead_after_steps=2)
    found = run.step([0, 1], 0, 90)
    assert (found["chosen_proxies"], found["dead_proxies"], found["assignment_churn"]) == (2, 0, 0)
    found = run.step([0, 1, 3], 0, 180, 180)  # class 1 moves on, class 3 is new
    assert (found["chosen_proxies"], found["dead_proxies"]) == (2, 1)  # 270 for two steps
    assert (found["assignment_churn"], found["proxy_occupancy"]) == (1 / 2, 3 / 4)
    found = run.step([0, 0, 3], 0, 270, 180)  # of class 0, one of two rows is elsewhere
    assert (found["dead_proxies"], found["assignment_churn"]) == (1, 1 / 3)  # 90 since step 1
    assert run.objective.idle_steps_L.tolist() == [0, 2, 0, 0]
    assert run.objective.last_rows.tolist() == [3, 2, -1, 2]


def test_a_proxy_is_dead_after_five_images_for_each_proxy() -> None:
    run = _counted()  # 4 proxies and batches of 6 images: 20 / 6 steps.
    dead = [run.step([0, 0, 1, 1, 2, 2], *[0] * 6)["dead_proxies"] for _ in range(4)]
    assert dead == [0, 0, 0, 3]
    assert run.objective.after_update(3) == {}
    assert run.objective.after_update(4)["proxies"].tolist() == [1, 2, 3]


def test_evaluation_mode_counts_nothing() -> None:
    run = _counted()
    run.objective.eval()
    run.step([0], 0)
    assert run.objective.idle_steps_L.tolist() == [0, 0, 0, 0]
    assert run.objective.last_rows.tolist() == [-1, -1, -1, -1]


def test_dead_proxies_are_revived_near_a_sample() -> None:
    run = _counted(dead_after_steps=2, revive_dead=True)
    table = run.objective.proxies
    optimizer = torch.optim.Adam([table], lr=0.1)
    table.grad = torch.ones_like(table)
    optimizer.step()
    with torch.no_grad():
        table.copy_(PROXIES)
    run.step([0, 1], 0, 90)
    assert run.objective.after_update(1) == {}
    run.step([0, 1], 10, 100)
    before = table.detach().clone()
    revived = run.objective.after_update(2)
    assert revived["proxies"].tolist() == [2, 3]
    assert run.objective.idle_steps_L.tolist() == [0, 0, 0, 0]
    assert torch.equal(table[:2], before[:2])
    distances = torch.cdist(table.detach()[2:], _circle(10, 100)).amin(dim=1)
    assert (distances < 0.5).all()
    assert (distances > 0).all()
    forget_rows(optimizer, table, revived["proxies"])
    moments = optimizer.state[table]["exp_avg"]
    assert (moments[2:] == 0).all()
    assert (moments[:2] != 0).all()


def _revived(seed: int) -> tuple[list[list[int]], list[Tensor]]:
    """Revive 7 of 8 proxies at steps 2, 4, 6 and 8, on one batch of 16 orthogonal samples.

    Returns:
        Each step's samples, by dead proxy, and what was added to them, (7, 16).
    """
    objective = build_objective(
        ProxyNCAConfig(assignment="dynamic", proxy_share=2.0, dead_after_steps=2, revive_dead=True),
        num_classes=4,
        embedding_size=16,
        seed=seed,
        comm=Comm.single(),
        dtype=torch.float64,
    )
    table = objective.owned_parameters()["proxies"].parameter
    samples, labels = torch.eye(16, dtype=torch.float64), torch.arange(16) % 4
    picked, noise = [], []
    for step in range(1, 9):
        with torch.no_grad():  # One proxy on the samples' side, all others opposite.
            table.fill_(-1.0)
            table[0] = 1.0
        objective(samples, labels, [16])
        if step % 2:
            assert objective.after_update(step) == {}
            continue
        assert objective.after_update(step)["proxies"].tolist() == list(range(1, 8))
        places = table.detach()[1:].argmax(dim=1)  # The noise has a length of about 0.1.
        picked.append(places.tolist())
        noise.append(table.detach()[1:] - samples[places])
    return picked, noise


def test_draws_of_revived_proxies_differ_between_steps_and_proxies() -> None:
    picked, noise = _revived(seed=0)
    assert len({tuple(places) for places in picked}) == 4
    assert all(len(set(places)) > 1 for places in picked)
    # 28 draws of 16 samples: 13 different ones are expected.
    assert len({place for places in picked for place in places}) >= 8
    added = torch.cat(noise)
    assert len({tuple(row) for row in added.tolist()}) == 28
    assert ((added.norm(dim=1) > 0.03) & (added.norm(dim=1) < 0.2)).all()
    other, _ = _revived(seed=1)
    assert all(one != two for one, two in zip(picked, other, strict=True))


def test_class_ids_beyond_the_classes_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"labels are 0 \.\. 4, outside the class ids 0 \.\. 3"):
        _counted().step([0, 4], 0, 90)


def test_revival_brings_dead_proxies_into_use() -> None:
    """On data, in small: clusters at 0 and 180 degrees, where the proxies of 90 and 270 are not."""
    found = {}
    for revive in (False, True):
        generator = np.random.default_rng(0)
        run = _counted(dead_after_steps=5, revive_dead=revive)
        optimizer = torch.optim.SGD([run.objective.proxies], lr=0.1)
        centers, labels = np.array([0, 180] * 16), torch.tensor([0, 1] * 16)
        for step in range(1, 24):
            batch = _circle(*(centers + generator.normal(0, 5, len(centers))))
            optimizer.zero_grad()
            output = run.objective(batch, labels, [len(labels)])
            output.loss.backward()
            optimizer.step()
            run.objective.after_update(step)
        found[revive] = {name: value.item() for name, value in output.statistics.items()}
    assert (found[False]["dead_proxies"], found[False]["chosen_proxies"]) == (2, 2)
    assert found[True]["dead_proxies"] == 0
    assert found[True]["chosen_proxies"] > 2


def test_counts_are_in_checkpoints(tmp_path: Path) -> None:
    config = small_config(loss="{name: proxy_nca, assignment: dynamic, dead_after_steps: 3}")
    run = small_run(tmp_path / "run", config).train()
    again = small_run(tmp_path / "run", config, attempt=2).train(resume=True)
    counts = again.state.objective.owned_buffers()
    assert set(counts) == {"proxy_idle_steps", "class_nearest"}
    for name, buffer in run.state.objective.owned_buffers().items():
        assert torch.equal(counts[name].values, buffer.values)
        assert (buffer.values > 0).any()
    assert set(whole_snapshot(again.state)) == set(whole_snapshot(run.state))


def test_a_run_warns_of_one_shared_proxy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new network's embeddings lie in a narrow cone; normalised by the batch they do not."""
    monkeypatch.setattr("dml_dist.train.dynamic_assignment._WARN_AFTER", 4)
    loss = "{name: proxy_nca, assignment: dynamic, proxy_share: 0.3, revive_dead: false}"
    spread = small_config(loss=loss, model__normalize="batch")
    small_run(tmp_path / "spread", spread).train()
    assert caplog.messages == []
    small_run(tmp_path / "narrow", small_config(loss=loss)).train()
    assert ["had the same nearest proxy for 4 steps" in text for text in caplog.messages] == [True]
