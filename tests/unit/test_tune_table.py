"""What a search shows while it runs."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from dml_dist.config.study import ObjectiveConfig
from dml_dist.report.formatting import MISSING
from dml_dist.studies import tune_table
from dml_dist.studies.tune_table import Row, TrialTable


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(tune_table.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def console_of(*, terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=160), file


def rendered(table: TrialTable) -> str:
    console, file = console_of(terminal=False)
    console.print(table._render())
    return re.sub(r" +", " ", file.getvalue())


def row(number: int) -> Row:
    return Row(f"trial-{number}", {"optim.lr": 0.001 * (number + 1)})


def test_one_line_for_each_trial_without_a_terminal(clock: Clock) -> None:
    console, file = console_of(terminal=False)
    with TrialTable(console, (ObjectiveConfig(),), 4) as table:
        table.set_concurrency(2)
        for number in range(2):
            table.put(number, row(number))
        table.progress(0, 10, 0.25)
        table.progress(1, 10, 0.125)
        assert file.getvalue() == ""
        clock.now += 30.0
        table.end(0, "complete", [0.5], 30.0)
        table.end(1, "pruned", (), 10.0)
    lines = file.getvalue().splitlines()
    assert lines == [
        # Two trials wait, 30 s each, and the one that runs is over its mean; two at a time.
        "trial-0: optim.lr 0.001: MAP@R 50.00 % (complete, 30 s); 1 of 4 trials, "
        "best MAP@R 50.00 % (trial-0), about 30 s left",
        # Two trials wait, each of the mean of 30 and 10 s.
        "trial-1: optim.lr 0.002: MAP@R 12.50 % at 10 (pruned, 10 s); 2 of 4 trials, "
        "best MAP@R 50.00 % (trial-0), about 20 s left",
    ]


def test_live_table_on_a_terminal(clock: Clock) -> None:
    console, file = console_of(terminal=True)
    objectives = (ObjectiveConfig(), ObjectiveConfig(metric="train_seconds", direction="minimize"))
    with TrialTable(console, objectives, 3) as table:
        for number in range(3):
            table.put(number, row(number))
        table.progress(2, 1000, 0.25)
        table.end(0, "complete", [0.25, 90.0], 100.0)
        table.end(1, "complete", [0.5, 60.0], 70.0)
        text = rendered(table)
    assert "trial-0" in file.getvalue()
    assert "2 of 3 trials, best MAP@R 50.00 % (trial-1)" in text
    assert (
        f"│ trial-0 │ optim.lr 0.001 │ {MISSING} │ 25.00 % │ 1 min 30 s │ complete, 1 min 40 s │"
        in text
    )
    assert (
        f"│ trial-2 │ optim.lr 0.003 │ 25.00 % at 1,000 │ {MISSING} │ {MISSING} │ running, 0 s │"
        in text
    )


def test_the_best_is_the_lowest_where_low_values_are_good() -> None:
    console, _ = console_of(terminal=False)
    objective = ObjectiveConfig(metric="uniformity", direction="minimize")
    table = TrialTable(console, (objective,), 2)
    for number, value in enumerate((-1.0, -3.0)):
        table.put(number, row(number))
        table.end(number, "complete", [value], 1.0)
    assert "(trial-1)" in rendered(table)


def test_values_of_a_diverged_trial_are_never_the_best() -> None:
    console, _ = console_of(terminal=False)
    table = TrialTable(console, (ObjectiveConfig(),), 2)
    table.put(0, row(0))
    table.end(0, "diverged", (), 1.0)
    assert "best" not in rendered(table)


def test_many_trials_are_cut() -> None:
    console, _ = console_of(terminal=False)
    table = TrialTable(console, (ObjectiveConfig(),), 40)
    for number in range(30):
        table.put(number, row(number))
        if number < 28:
            table.end(number, "complete", [0.5], 1.0)
    text = rendered(table)
    assert "trial-9 " not in text
    assert "trial-10 " in text
    assert "trial-29 " in text
    assert "10 earlier trials are not shown" in text
