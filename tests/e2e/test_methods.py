"""Every method from the command to the page and the digits of a later evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest

from dml_dist.config.objective import LossConfig
from tests.report_runs import Page

Cli = Callable[..., tuple[int, str]]

BALANCED = "data.batches={name: balanced, classes_per_batch: 13, samples_per_class: 2}"
PROJECTIONS = "projections={steps_per_problem: 4, lead_steps: 3, mining: {neighbors_per_class: 2}}"
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
}


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
    code, output = cli("evaluate", "run")
    assert code == 0, output
    again = json.loads((tmp_path / "run/metrics-test-best.json").read_text())
    assert again["trained"] == metrics["trained"]
