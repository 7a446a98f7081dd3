"""`check-loss`: right losses pass, wrong ones are diagnosed, built-in and custom."""

from __future__ import annotations

import io
from typing import get_args

import pytest
from rich.console import Console

from dml_dist.config.objective import CustomLossConfig, LossConfig
from dml_dist.errors import ConfigError
from dml_dist.orchestration import check_loss as module
from dml_dist.orchestration.check_loss import check_loss, loss_config, run_cases
from dml_dist.orchestration.check_loss_ranks import CASES, Measured, cases_of, measure
from dml_dist.parallel.comm import Comm
from dml_dist.topology import Topology
from tests.ranks import run_ranks

EXAMPLES = "tests.custom_examples:"
NAMES = [
    member.model_fields["name"].default
    for member in get_args(get_args(LossConfig)[0])
    if member is not CustomLossConfig
]
CHECKED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("proxy_nca", ("proxies_per_class=2",)),
    ("proxy_nca", ("assignment=dynamic", "proxy_share=0.75")),
    ("proxy_nca", ("assignment=fractional", "proxy_share=0.75", "surrogate=margin")),
    ("proxy_nca", ("class_weighting=inverse_frequency", "label_smoothing=0.1")),
    *((name, ()) for name in NAMES),
    ("contrastive", ("negative_margin=1.2",)),
    ("triplet", ("mining=hard", "swap=true")),
    ("triplet", ("mining=semi_hard", "margin=0.5")),
    ("margin", ("nu=0.1",)),
    ("margin", ("beta_form=class",)),
    (EXAMPLES + "HardNegativeSoftmax", ("scale=8.0",)),
    (EXAMPLES + "ContrastivePairs", ()),
    (EXAMPLES + "RowsCountedByEveryShard", ()),
)


def _measure_all(topology: Topology) -> list[list[Measured]]:
    comm = Comm.from_default_group()
    return [measure(loss_config(target, options), comm) for target, options in CHECKED]


@pytest.fixture(scope="module")
def on_ranks() -> dict[int, list[list[list[Measured]]]]:
    """Results of every rank for every loss, by number of ranks; one process group for each."""
    return {size: run_ranks(_measure_all, size, timeout=120) for size in (2, 3)}


@pytest.mark.parametrize("number", range(len(CHECKED)), ids=lambda i: " ".join(CHECKED[i][:1]))
def test_losses_pass_and_the_wrong_one_is_named(
    number: int,
    on_ranks: dict[int, list[list[list[Measured]]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, options = CHECKED[number]
    monkeypatch.setattr(
        module,
        "measure_on_ranks",
        lambda config, size: [rank[number] for rank in on_ranks[size]],
    )
    output = io.StringIO()
    if target.endswith("RowsCountedByEveryShard"):
        part = "(loss|network|proxies)"  # The largest deviation first.
        wrong = f"{part}, {part}, {part}: W times too small"
        with pytest.raises(ConfigError, match=wrong) as info:
            check_loss(target, options, Console(file=output))
        assert info.value.exit_code == 2
        assert output.getvalue().count("wrong") == len(CASES)
        return
    check_loss(target, options, Console(file=output, width=200))
    assert f"{target} passes" in output.getvalue()
    cases = cases_of(loss_config(target, options))
    for case in cases:
        assert case.name in output.getvalue()
    has_table_form = target in ("contrastive", "triplet", "multi_similarity")
    assert len(cases) == len(CASES) * (2 if has_table_form and "swap=true" not in options else 1)


def test_a_gradient_that_is_not_finite_is_found_in_one_process() -> None:
    findings = run_cases(loss_config(EXAMPLES + "RootOfSquares", []))
    assert {finding.world_size for finding in findings} == {1}
    wrong = [finding for finding in findings if finding.problem]
    assert "equal rows" in {finding.case for finding in wrong}
    assert all(finding.problem.startswith("not finite") for finding in wrong)


def test_too_large_by_the_number_of_ranks_is_named(
    on_ranks: dict[int, list[list[list[Measured]]]],
) -> None:
    """Proxies with W times their gradient, as when local ones are not divided by W."""
    config = loss_config(*CHECKED[0])
    alone = measure(config, Comm.single())[0]
    ranks = [rank[0][0] for rank in on_ranks[3]]
    for measured in ranks:
        measured.grads["proxies"] *= 3
    found = module._compare("first", 3, alone, ranks)
    assert found.parts == ("proxies",)
    assert found.problem.startswith("W times too large")
    ranks[1].grads["proxies"] += 1.0
    assert module._compare("first", 3, alone, ranks).problem.startswith("not those of one process")


def test_invalid_arguments_are_rejected() -> None:
    for target, options, message in (
        ("tripplet", [], "triplet"),
        ("triplet", ["margin=3"], "margin must be at most 2"),
        ("triplet", ["margin"], "--option must be key=value, got 'margin'"),
        ("triplet", ["marign=0.1"], "margin"),
    ):
        with pytest.raises(ConfigError, match=message):
            loss_config(target, options)


@pytest.mark.slow
def test_with_own_processes(capsys: pytest.CaptureFixture[str]) -> None:
    """With ranks that the command starts itself."""
    check_loss("margin", ["beta_form=class", "nu=0.1"], Console(width=200))
    assert "margin passes" in capsys.readouterr().out
