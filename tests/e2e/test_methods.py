"""Every method from the command to the page and the digits of a later evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from dml_dist.config.objective import LossConfig
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import read_records
from tests.report_runs import Page

Cli = Callable[..., tuple[int, str]]

BALANCED = "data.batches={name: balanced, classes_per_batch: 13, samples_per_class: 2}"
PROJECTIONS = "projections={steps_per_problem: 4, lead_steps: 3, mining: {neighbors_per_class: 2}}"
TABLE = (
    "projections={form: table, steps_per_problem: 6, patience: 1, proximal_weight: 0.01, "
    "representatives_per_class: 3, selection: k_center, pool_per_class: 5}"
)
METHODS = {
    "proxy_nca": ("loss={name: proxy_nca, proxies_per_class: 2}",),
    "margin surrogate": ("loss={name: proxy_nca, surrogate: margin}",),
    "fractional": ("loss={name: proxy_nca, assignment: fractional, proxy_share: 0.25}",),
    "fractional, as many": ("loss={name: proxy_nca, assignment: fractional}",),
    "dynamic": ("loss={name: proxy_nca, assignment: dynamic, proxy_share: 0.5}",),
    "proxy_anchor": ("loss={name: proxy_anchor}",),
    "soft_triple": ("loss={name: soft_triple, centers_per_class: 3}",),
    "normalized_softmax": ("loss={name: normalized_softmax, negatives_share: 0.5}",),
    "cosface": ("loss={name: cosface}",),
    "arcface": ("loss={name: arcface}",),
    "contrastive": ("loss={name: contrastive}",),
    "triplet": ("loss={name: triplet, mining: semi_hard}",),
    "margin": ("loss={name: margin, beta_form: class}",),
    "multi_similarity": ("loss={name: multi_similarity}",),
    "nir": ("nir={flow_weight: 0.01, flow: {num_blocks: 2, depth: 2, width: 8}}",),
    "projections": ("loss={name: triplet}", BALANCED, PROJECTIONS, "data.prefetch=1"),
    "table": (
        *("loss={name: contrastive}", TABLE, "optim.representative_lr=0.01", "optim.lr=0.1"),
        *("train.steps=16", "train.log_every=1", "evaluation.every_steps=2"),
    ),
}


def begins_of_problems(run: Path) -> set[int]:
    """Return after how many steps each further problem began, as recorded."""
    problems = [record["problem"] for record in read_records(RunFolder(run).records("steps"))]
    return {step for step in range(1, 16) if problems[step] != problems[step - 1]}


def expected_begins(run: Path) -> set[int]:
    """Return the same by the rule: 6 steps, or a validation that is no better than one before."""
    scores = {
        record["step"]: record["map_at_r"]
        for record in read_records(RunFolder(run).records("evaluations"))
        if record["protocol"] == "validation"
    }
    begins, best = [0], -1.0
    for step in range(1, 16):
        worse = step in scores and scores[step] <= best
        best = max(best, scores.get(step, -1.0))
        if worse or step - begins[-1] == 6:
            begins.append(step)
            best = -1.0
    return {*begins[1:]}


def test_every_loss_is_among_them() -> None:
    names = {section.model_fields["name"].default for section in get_args(get_args(LossConfig)[0])}
    assert names - {"custom"} <= METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_from_the_command_to_the_page(
    method: str, config_file: Path, cli: Cli, tmp_path: Path
) -> None:
    changes = ("train.steps=8", "data.loader_workers=0", "optim.proxy_lr=null", *METHODS[method])
    sets = [word for change in changes for word in ("--set", change)]
    code, output = cli("train", config_file, "--run-dir", "run", *sets)
    assert code == 0, output
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["trained"] != metrics["untrained"]
    page = Page(tmp_path / "run/report/index.html")
    assert not page.open
    # Proxies of one class each have facts to show; shared and chosen ones have not.
    shows = 'id="proxies"' in page.raw
    own = {"proxy_nca", "margin surrogate", "proxy_anchor", "soft_triple", "normalized_softmax"}
    assert shows == (method in own | {"cosface", "arcface", "nir"})
    if method == "table":
        begins = begins_of_problems(tmp_path / "run")
        assert begins == expected_begins(tmp_path / "run")
        assert begins != {6, 12}  # Patience ended a problem.
        assert "Loss between the batch and all representatives." in page.raw
        assert "Dotted lines: the next problem" in page.raw
    code, output = cli("evaluate", "run")
    assert code == 0, output
    again = json.loads((tmp_path / "run/metrics-test-best.json").read_text())
    assert again["trained"] == metrics["trained"]
