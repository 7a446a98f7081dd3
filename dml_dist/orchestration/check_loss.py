"""`dml-dist check-loss`: check that a loss has the same gradients on any number of ranks.

The loss runs on seeded batches, including edge cases, in one process and on 2 and 3 gloo ranks, in
float64. Loss and all gradients (network, proxy tables, other parameters of the loss) must equal
those of one process on the whole batch, with a relative tolerance of 1e-10. Losses of pairs with a
table form (`losses/table.py`) are checked in this form as well.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from dml_dist.config.load import parse_config
from dml_dist.config.objective import LossConfig
from dml_dist.errors import ConfigError
from dml_dist.orchestration.check_loss_ranks import (
    Measured,
    cases_of,
    measure,
    measure_on_ranks,
    preload_forkserver,
)
from dml_dist.parallel.comm import Comm

LIMIT = 1e-10
"""Maximum deviation, relative to the largest element of the same gradient."""

_SMALL = 1e-3
"""Minimum denominator of a relative deviation, for gradients that are nearly zero."""

WORLD_SIZES = (2, 3)


@dataclass(frozen=True)
class Finding:
    """Result of one case on one number of ranks.

    Attributes:
        case: Name of the case.
        world_size: Number of ranks.
        deviation: Largest relative deviation; infinite if a value is not finite.
        parts: What deviates by more than the limit, the worst first.
        problem: Diagnosis, or "".
        skipped: Why the loss does not support the case, or "".
    """

    case: str
    world_size: int
    deviation: float = 0.0
    parts: tuple[str, ...] = ()
    problem: str = ""
    skipped: str = ""


def check_loss(target: str, options: Sequence[str], console: Console) -> None:
    """Check a loss, and print a table of cases and a diagnosis.

    Args:
        target: Name of a loss, as in the configuration's `loss.name`, or `package.module:name` of
            a custom loss.
        options: Its options, as `key=value`.
        console: Console for the table.

    Raises:
        ConfigError: If there is no such loss, an option is wrong, or the check fails.
    """
    config = loss_config(target, options)
    preload_forkserver()
    findings = run_cases(config)
    console.print(_table(findings))
    if problems := _problems(findings):
        raise ConfigError(
            f"check-loss {target}: on 1, 2 and 3 ranks loss and gradients deviate from those of "
            f"one process by more than {LIMIT:g}; " + "; ".join(problems)
        )
    if skipped := [finding for finding in findings if finding.skipped]:
        console.print(f"skipped: {skipped[0].skipped}", highlight=False, markup=False)
    largest = max(finding.deviation for finding in findings)
    console.print(
        f"{target} passes: on 1, 2 and 3 ranks loss and gradients are those of one process, the "
        f"largest deviation is {largest:.1e}, the limit {LIMIT:g}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def loss_config(target: str, options: Sequence[str]) -> LossConfig:
    """Return the loss section for a target and its options.

    Raises:
        ConfigError: If the target or an option is invalid.
    """
    for option in options:
        if "=" not in option:
            raise ConfigError(
                f"--option must be key=value, got {option!r}; for example --option margin=0.2"
            )
    loss: dict[str, object] = {"name": target}
    prefix = "loss."
    if ":" in target:
        loss = {"name": "custom", "target": target, "options": {}}
        prefix = "loss.options."
    plain = {
        "name": "check-loss",
        "data": {"path": "."},
        "train": {"steps": 1, "global_batch_size": 8},
        "loss": loss,
    }
    return parse_config(plain, [prefix + option for option in options]).loss


def run_cases(config: LossConfig) -> list[Finding]:
    """Return the results of all cases on 1, 2 and 3 ranks.

    Raises:
        ConfigError: If the loss cannot be built, or raises on a batch.
    """
    cases = cases_of(config)
    alone = _measure_dense(config)
    again = _measure_dense(config)
    findings = [
        _compare(case.name, 1, one, [two])
        for case, one, two in zip(cases, alone, again, strict=True)
    ]
    # A loss that differs from itself in one process cannot be compared across ranks.
    if any(finding.problem for finding in findings):
        return findings
    for world_size in WORLD_SIZES:
        ranks = measure_on_ranks(config, world_size)
        for case, one, found in zip(cases, alone, zip(*ranks, strict=True), strict=True):
            findings.append(_compare(case.name, world_size, one, list(found)))
    return findings


def _measure_dense(config: LossConfig) -> list[Measured]:
    try:
        return measure(config, Comm.single())
    except ConfigError:
        raise
    except Exception as error:  # User code may raise anything.
        raise ConfigError(
            f"check-loss: the loss raised {type(error).__name__}: {error}; it must accept "
            "embeddings (B, D) in float64 and labels (B,), and be differentiable by autograd"
        ) from error


def _compare(case: str, world_size: int, expected: Measured, found: list[Measured]) -> Finding:
    """Compare the ranks' results of a case with those of one process."""
    for measured in (expected, *found):
        if measured.skipped:
            return Finding(case, world_size, skipped=measured.skipped)
    bad = [_group(name) for name, grad in expected.grads.items() if not bool(grad.isfinite().all())]
    if not math.isfinite(expected.loss):
        bad.insert(0, "loss")
    if bad:
        return Finding(case, world_size, math.inf, tuple(dict.fromkeys(bad)), _NOT_FINITE)
    if len({measured.loss for measured in found}) > 1:
        return Finding(case, world_size, math.inf, ("loss",), _DIFFERS)
    pairs = [("loss", torch.tensor(found[0].loss), torch.tensor(expected.loss))]
    pairs += [
        (_group(name), _full_gradient(name, found), grad) for name, grad in expected.grads.items()
    ]
    deviations = [_deviation(actual, wanted) for _, actual, wanted in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -deviations[i])
    wrong = [pairs[i] for i in order if deviations[i] > LIMIT]
    problem = _diagnosis(wrong[0][1], wrong[0][2], world_size) if wrong else ""
    parts = tuple(dict.fromkeys(part for part, _, _ in wrong))
    return Finding(case, world_size, deviations[order[0]], parts, problem)


def _problems(findings: Sequence[Finding]) -> list[str]:
    """Return each distinct problem with its parts and the first case."""
    result = []
    for problem in dict.fromkeys(finding.problem for finding in findings if finding.problem):
        of_it = [finding for finding in findings if finding.problem == problem]
        parts = ", ".join(dict.fromkeys(part for finding in of_it for part in finding.parts))
        first = of_it[0]
        ranks = "in one process" if first.world_size == 1 else f"on {first.world_size} ranks"
        result.append(
            f"{parts}: {problem} ({len(of_it)} of {len(findings)} results, first in case "
            f"{first.case!r} {ranks}, deviation {first.deviation:.1e})"
        )
    return result


_NOT_FINITE = (
    "not finite: guard square roots, logarithms and divisions against 0 (equal rows, zero rows, "
    "batches without pairs)"
)
_DIFFERS = (
    "different values on the ranks: compute it only from the merged statistics or the gathered "
    "batch, and do not use a global random generator"
)
_NONDETERMINISTIC = (
    "not deterministic, two runs on the same batch in one process differ: use fixed seeds, and "
    "keep no state between calls"
)
_TOO_LARGE = (
    "W times too large: a value that is global on every shard or rank is summed over them; divide "
    "by the global count"
)
_TOO_SMALL = (
    "W times too small: a count that is global on every shard or rank is summed over them; divide "
    "by the global count once"
)
_OTHER = (
    "not those of one process: partial must return statistics of its own shard alone, merges must "
    "name their merge, and finish must use only merged statistics"
)


def _group(name: str) -> str:
    return "network" if name.startswith("network.") else name


def _full_gradient(name: str, found: list[Measured]) -> Tensor:
    """Return a full gradient: a table's rows concatenated over ranks, else the first rank's."""
    if name not in found[0].row_low:
        return found[0].grads[name]
    return torch.cat([m.grads[name] for m in sorted(found, key=lambda m: m.row_low[name])])


def _deviation(actual: Tensor, wanted: Tensor) -> float:
    if actual.shape != wanted.shape or not bool(actual.isfinite().all()):
        return math.inf
    scale = max(float(wanted.abs().max()), _SMALL)
    return float((actual - wanted).abs().max()) / scale


def _diagnosis(actual: Tensor, wanted: Tensor, world_size: int) -> str:
    """Return a diagnosis of a wrong gradient or value."""
    if world_size == 1:
        return _NONDETERMINISTIC
    if actual.shape != wanted.shape or not bool(actual.isfinite().all()):
        return _OTHER
    actual, wanted = actual.double().reshape(-1), wanted.double().reshape(-1)
    # The least-squares factor between both: W or 1 / W points to a typical scaling error.
    factor = float(actual @ wanted / (wanted @ wanted).clamp_min(1e-300))
    rest = float((actual - factor * wanted).norm() / actual.norm().clamp_min(1e-300))
    if rest < 1e-6 and abs(factor - world_size) < 1e-6:
        return _TOO_LARGE
    if rest < 1e-6 and abs(factor * world_size - 1.0) < 1e-6:
        return _TOO_SMALL
    return _OTHER


def _table(findings: Sequence[Finding]) -> Table:
    """Return a table of the largest deviation of each case on each number of ranks."""
    by_case = {(finding.case, finding.world_size): finding for finding in findings}
    sizes = sorted({finding.world_size for finding in findings})
    names = ["again", *(f"{size} ranks" for size in sizes[1:])]
    table = Table("largest deviation", *names, "")
    table.columns[0].no_wrap = True
    for case in dict.fromkeys(finding.case for finding in findings):
        row = [by_case[case, size] for size in sizes]
        is_wrong = any(finding.problem for finding in row)
        verdict = Text("wrong", "red") if is_wrong else "ok"
        table.add_row(case, *(_cell(finding) for finding in row), verdict)
    return table


def _cell(finding: Finding) -> str:
    return "skipped" if finding.skipped else f"{finding.deviation:.1e}"
