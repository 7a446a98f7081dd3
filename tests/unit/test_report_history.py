"""Restarts of a run and the cost of its checkpoints: on the page, in curves, on the terminal."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dml_dist.orchestration.tables import print_results
from dml_dist.report import write_report
from dml_dist.report.attempts import History, Mark, read_history
from dml_dist.report.curves import draw_curves
from dml_dist.report.summary import read_summary
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.info import Attempt
from dml_dist.runs.provenance import GitState
from tests.report_runs import EVIL, Page, begin, new_run

BEGIN = datetime(2026, 5, 1, 10, 0, tzinfo=UTC).timestamp()


def at(seconds: float) -> str:
    return datetime.fromtimestamp(BEGIN + seconds, UTC).isoformat(timespec="milliseconds")


def attempt(
    number: int, ranks: int, first: int | None = None, began: float | None = None, **more: Any
) -> Attempt:
    return Attempt(
        attempt=number,
        started=at(0),
        world_size=ranks,
        launcher="ray",
        device="cpu",
        command="dml-dist train",
        git=GitState("a" * 40, dirty=False),
        versions={},
        platform="Linux",
        host="node-1",
        first_step=first,
        began=None if began is None else at(began),
        **more,
    )


def record(number: int, step: int, time: float, **values: float) -> dict[str, Any]:
    return {"attempt": number, "step": step, "time": BEGIN + time, **values}


# Three ranks make 50 steps; their node is lost after the checkpoint of step 40. The first new
# group of ranks makes no step, the second goes on at 40, is killed at 45 and starts there again.
ATTEMPTS = (
    attempt(1, 3, 0, 0.0, nodes=("a", "b", "b")),
    attempt(2, 3, nodes=("a", "b", "b"), reason="node c was lost"),
    attempt(3, 2, 40, 100.0, nodes=("a", "b"), reason=f"the node was lost {EVIL}"),
    attempt(4, 3, 40, 130.0, nodes=("a", "b", EVIL), reason="room for 3 ranks"),
)
STEPS = [
    *(record(1, step, step, loss=1.0) for step in range(5, 55, 5)),
    record(3, 45, 110.0, loss=1.0),
    *(record(4, step, 90.0 + step, loss=1.0) for step in range(45, 105, 5)),
]
SAVES = [
    record(1, 20, 21.0, seconds=0.5),
    record(1, 40, 41.0, seconds=0.7),
    record(4, 80, 171.0, seconds=0.6),
    record(4, 100, 200.0, seconds=0.6),
]


def write_history(
    run: RunFolder, attempts: Sequence[Attempt], steps: Sequence[Any], saves: Sequence[Any]
) -> None:
    info = json.loads(run.info_path.read_text())
    info["attempts"] = [asdict(attempt) for attempt in attempts]
    run.info_path.write_text(json.dumps(info))
    for kind, records in (("steps", steps), ("checkpoints", saves)):
        lines = "".join(json.dumps(record) + "\n" for record in records)
        run.records(kind).write_text(lines)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = new_run(tmp_path_factory.mktemp("runs") / "demo")
    write_history(run, ATTEMPTS, STEPS, SAVES)
    return run


# ---------------------------------------------------------------- what is read


def test_steps_and_time_are_lost_once() -> None:
    history = read_history(ATTEMPTS, STEPS, SAVES)
    rows = [(r.first_step, r.steps_repeated, r.seconds_lost) for r in history.restarts]
    # From the checkpoint at 41 s; then from the begin of attempt 3 at the same step.
    assert rows == [(None, None, None), (40, 10, 59.0), (40, 5, 30.0)]
    # Attempts 1, 3 and 4 recorded 10 + 1 + 12 times 5 steps for a run of 100.
    assert sum(r.steps_repeated or 0 for r in history.restarts) == 5 * len(STEPS) - 100
    assert history.seconds_lost == 89.0
    assert history.training_seconds == pytest.approx(50 + 10 + 70)
    assert (
        history.restarts_text
        == "3 restarts: 15 steps repeated, 1 min 29 s lost (44.5 % of the run)"
    )
    assert history.checkpoints_text == (
        "4 checkpoints saved in 2.4 s, 0.6 s each (1.8 % of the training time)"
    )


def test_without_a_checkpoint_all_time_since_the_first_step_is_lost() -> None:
    attempts = attempt(1, 2, 0, 5.0), attempt(2, 2, 0, 65.0)
    history = read_history(attempts, [record(1, 30, 20.0)], [])
    (restart,) = history.restarts
    assert (restart.steps_repeated, restart.seconds_lost) == (30, 60.0)
    assert (
        history.restarts_text
        == "1 restart: 30 steps repeated, 1 min 00 s lost (100.0 % of the run)"
    )


def test_a_return_to_an_older_checkpoint_counts_no_time_twice() -> None:
    attempts = (
        attempt(1, 2, 0, 0.0),
        attempt(2, 2, 40, 60.0),
        attempt(3, 2, 20, 100.0),  # The checkpoint of step 40 is damaged.
    )
    steps = [record(1, 50, 50.0), record(2, 60, 90.0), record(3, 100, 200.0)]
    saves = [record(1, 20, 20.0, seconds=1), record(1, 40, 40.0, seconds=1)]
    history = read_history(attempts, steps, saves)
    assert [r.seconds_lost for r in history.restarts] == [20.0, 80.0]
    assert [r.steps_repeated for r in history.restarts] == [10, 40]
    assert history.seconds_lost == 80.0


def test_a_later_save_of_the_same_step_is_not_what_a_restart_continued_from() -> None:
    attempts = attempt(1, 2, 0, 0.0), attempt(2, 2, 20, 60.0)
    saves = [record(1, 20, 20.0, seconds=1), record(2, 20, 70.0, seconds=1)]
    (restart,) = read_history(attempts, [record(1, 25, 25.0)], saves).restarts
    assert restart.seconds_lost == 40.0


def test_clocks_that_differ_give_no_negative_time() -> None:
    attempts = attempt(1, 2, 0, 0.0), attempt(2, 2, 20, 10.0)
    history = read_history(attempts, [record(1, 20, 20.0)], [record(1, 20, 20.0, seconds=1)])
    assert (history.restarts[0].seconds_lost, history.seconds_lost) == (0.0, 0.0)


def test_what_is_not_recorded_is_unknown() -> None:
    attempts = attempt(1, 2, 0, 0.0), attempt(2, 2, 20, 30.0), attempt(3, 2, 20, 40.0)
    steps = [record(1, 25, 25.0), record(2, 24, 35.0), record(3, 30, 50.0)]
    history = read_history(attempts, steps, [])
    assert [r.seconds_lost_text for r in history.restarts] == ["unknown", "10 s"]
    assert (history.restarts_text or "").startswith("2 restarts: at least 9 steps repeated, 10 s")


def test_marks_join_attempts_at_one_step_and_skip_those_without_a_step() -> None:
    assert read_history(ATTEMPTS, STEPS, SAVES).marks == (Mark(40, ""),)
    fewer = (*ATTEMPTS[:3], replace(ATTEMPTS[3], world_size=4), attempt(5, 2, 80, 300.0))
    assert read_history(fewer, STEPS, SAVES).marks == (Mark(40, "3 → 4"), Mark(80, "4 → 2"))


# ---------------------------------------------------------------- what is shown


def test_the_page_tells_of_restarts(restarted: RunFolder) -> None:
    page = Page(write_report(restarted.path))
    assert page.table("history") == [
        ["training began", "ranks", "nodes", "why", "after step", "steps repeated", "time lost"],
        ["not begun", "3", "a, b (2 ranks)", "node c was lost", *"–––"],  # noqa: RUF001
        ["2026-05-01 10:01 UTC", "3 → 2", "a, b", f"the node was lost {EVIL}", "40", "10", "59 s"],
        ["2026-05-01 10:02 UTC", "2 → 3", f"a, b, {EVIL}", "room for 3 ranks", "40", "5", "30 s"],
    ]
    assert "3 restarts: 15 steps repeated, 1 min 29 s lost (44.5 % of the run)." in page.text
    assert "4 checkpoints saved in 2.4 s, 0.6 s each (1.8 % of the training time)." in page.text
    assert "Restarts and checkpoints" in page.text
    assert ("<script" in page.raw, page.open) == (False, [])


def test_a_run_without_restarts_shows_checkpoints_alone(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    write_history(run, [attempt(1, 2, 0, 0.0)], [record(1, 10, 10.0, loss=1.0)], SAVES[:1])
    page = Page(write_report(run.path))
    assert "1 checkpoint saved in 0.5 s (2.4 % of the training time)." in page.text
    assert ("#history" in page.raw, "Restarts" in page.text) == (True, False)
    write_history(run, [attempt(1, 2, 0, 0.0)], [record(1, 10, 10.0, loss=1.0)], [])
    assert "history" not in Page(write_report(run.path)).raw


def test_a_run_of_an_older_version_is_shown(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    for _ in range(3):
        begin(run)
    lines = (json.dumps(record(number, 10 * number, 9.0, loss=1.0)) for number in (1, 2))
    run.records("steps").write_text("\n".join(lines))
    info = json.loads(run.info_path.read_text())
    for values in info["attempts"]:
        for key in ("nodes", "reason", "first_step", "began"):
            del values[key]
    run.info_path.write_text(json.dumps(info))
    page = Page(write_report(run.path))
    assert page.table("history")[1:] == [
        ["unknown", "2", *["unknown"] * 5],
        ["not begun", "2", "unknown", "unknown", *"–––"],  # noqa: RUF001
    ]
    assert "2 restarts." in page.text
    assert "Vertical lines" not in page.text


def test_restarts_are_marked_in_curves(restarted: RunFolder) -> None:
    summary = read_summary(restarted.path)
    marked = replace(summary, history=history_of([Mark(40, "3 → 2"), Mark(60, "")]))
    (plain,), (curve,) = (
        draw_curves(replace(summary, history=history_of(marks)))
        for marks in ([], marked.history.marks)
    )
    assert curve.svg.count("var(--muted); stroke-opacity") == 2
    assert "3 → 2" in curve.svg
    assert "Vertical lines: restarts" in curve.caption
    assert "→" not in plain.svg
    assert "Vertical lines" not in plain.caption


def test_problems_are_marked_in_curves(restarted: RunFolder) -> None:
    summary = read_summary(restarted.path)
    steps = [{**record, "problem": i // 2} for i, record in enumerate(summary.steps)]
    begins = (len(steps) + 1) // 2 - 1
    curves = draw_curves(replace(summary, steps=steps, history=history_of([])))
    assert curves[0].svg.count("var(--muted); stroke-opacity") == begins > 0
    assert curves[0].caption.endswith("Dotted lines: the next problem of alternating projections.")
    assert "Vertical lines" not in curves[0].caption


def test_labels_of_many_restarts_do_not_overlap(restarted: RunFolder) -> None:
    many = history_of([Mark(step, "12 → 11") for step in range(5, 100)])
    (curve,) = draw_curves(replace(read_summary(restarted.path), history=many))
    # The place of a label in the SVG is that of its middle.
    places = re.findall(r'<text[^>]*x="([\d.]+)"[^>]*>12 → 11</text>', curve.svg)
    steps = sorted(float(place) for place in places)
    assert 8 <= len(steps) <= 12
    assert min(b - a for a, b in pairwise(steps)) > 20


def history_of(marks: Sequence[Mark]) -> History:
    return History((), tuple(marks), (), None, None)


def test_the_terminal_tells_of_restarts(restarted: RunFolder, tmp_path: Path) -> None:
    output = io.StringIO()
    print_results(restarted, Console(file=output, width=100))
    assert output.getvalue().splitlines()[-2:] == [
        "3 restarts: 15 steps repeated, 1 min 29 s lost (44.5 % of the run)",
        "4 checkpoints saved in 2.4 s, 0.6 s each (1.8 % of the training time)",
    ]
    output = io.StringIO()
    plain = new_run(tmp_path / "demo")
    begin(plain)
    print_results(plain, Console(file=output, width=100))
    assert "restart" not in output.getvalue()
