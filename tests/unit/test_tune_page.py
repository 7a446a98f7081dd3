"""The page of a search of values, against numbers worked out by hand from a few made-up trials."""

from __future__ import annotations

import csv
import io
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from dml_dist.config.load import dump_config, parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import RecordWriter
from dml_dist.runs.tuning import TuningFolder, searched_paths, tune_section
from dml_dist.studies import tune_page, tune_read
from dml_dist.studies.samplers import create_study
from dml_dist.studies.storage import load_study, open_trials
from dml_dist.studies.trials import Suggestion, Trials
from dml_dist.studies.tune_figures import rungs_of
from dml_dist.studies.tune_page import write_tuning
from dml_dist.studies.tune_read import read_tuning
from dml_dist.studies.tune_value_figures import importances
from tests.report_runs import EVIL, Page, begin

DASH = "–"  # noqa: RUF001
SPACE = {
    "optim.lr": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True},
    "optim.weight_decay": {"type": "float", "low": 0.0, "high": 0.1},
}
STEPS = 90
IN_MEMORY: dict[Path, optuna.Study] = {}
"""Studies of the searches that have no file."""


@pytest.fixture(autouse=True)
def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        tune_read, "load_study", lambda folder: IN_MEMORY.get(folder.path) or load_study(folder)
    )


def config_of(**tune: Any) -> RunConfig:
    section = {"space": SPACE, "trials": 8, "pruner": {"name": "asha", "grace_steps": 10}}
    return parse_config(
        {
            "name": "demo",
            "data": {"path": "/nowhere/shards"},
            "optim": {"lr": 0.01, "weight_decay": 0.02},
            "train": {"global_batch_size": 32, "steps": STEPS},
            "tune": section | tune,
        }
    )


class Search:
    """A search's folder, whose trials have the values and outcomes that a test gives.

    Trials are in memory unless `sqlite`: making a file takes a second.
    """

    def __init__(self, path: Path, config: RunConfig, *, sqlite: bool = False) -> None:
        path.mkdir(parents=True)
        self.folder, self.config = TuningFolder(path), config
        self.folder.write_config(config)
        section = tune_section(config)
        if sqlite:  # With the configuration's own values as the first trial's.
            self.trials, _ = open_trials(config, self.folder, STEPS)
            return
        study = create_study(section, section.objectives, section.pruner, steps=STEPS)
        IN_MEMORY[path] = study
        paths_of = partial(searched_paths, config)
        self.trials = Trials(study, section.space, paths_of, tuple(section.methods))

    def begin(self, lr: float = 0.01, weight_decay: float = 0.02, **values: Any) -> Suggestion:
        point = {"optim.lr": lr, "optim.weight_decay": weight_decay, **values}
        if not self.trials.waiting():
            self.trials.study.enqueue_trial(point)
        return self.trials.suggest()

    def record(self, name: str, curve: dict[int, float]) -> None:
        """Write a run with MAP@R on validation classes; step -> value."""
        text = dump_config(self.config.model_copy(update={"tune": None}))
        run = RunFolder.create(self.folder.run(name), text, name=name, seed=0)
        begin(run)
        with RecordWriter(run.records("evaluations"), 1) as evaluations:
            evaluations.write(0, split="test", protocol="untrained", map_at_r=0.99)
            for step, value in curve.items():
                evaluations.write(step, split="validation", protocol="validation", map_at_r=value)

    def complete(self, value: float, *others: float, **values: Any) -> Suggestion:
        trial = self.begin(**values)
        self.record(trial.label, {10: value / 2, STEPS: value})
        self.trials.complete(trial.number, [value, *others], seconds=20.0, steps=STEPS)
        return trial

    def prune(self, step: int, value: float, seconds: float, **values: Any) -> Suggestion:
        trial = self.begin(**values)
        self.trials.report(trial.number, step, value)
        self.record(trial.label, {step: value})
        self.trials.prune(trial.number, seconds=seconds, steps=step)
        return trial


def table_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "report/trials.csv").read_text())))


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    """Return a search with a trial in each state: 3 complete, 2 pruned, 1 each of the others."""
    search = Search(tmp_path_factory.mktemp("tune") / "demo", config_of(), sqlite=True)
    search.complete(0.30)
    search.prune(10, 0.10, 2.0, lr=0.002)
    search.prune(30, 0.15, 9.0, lr=0.003)
    failed = search.begin(lr=0.004)
    search.trials.fail(failed.number, f"out of memory {EVIL}", seconds=1.0, steps=3)
    diverged = search.begin(lr=0.05)
    search.trials.diverged(diverged.number, "loss nan at step 12", seconds=3.0, steps=12)
    search.complete(0.50, lr=0.0987, weight_decay=0.05)
    search.complete(0.40, lr=0.03, weight_decay=0.0)
    search.begin(lr=0.006)
    search.trials.study.set_user_attr("changes", [f"tune.space.optim.lr.high: 0.05 -> 0.1 {EVIL}"])
    search.folder.best_path.write_text(f"# from trial-5 {EVIL}\nname: demo\n")
    return search


@pytest.fixture(scope="module")
def page(search: Search) -> Page:
    return Page(write_tuning(search.folder.path))


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figures, which take seconds to draw."""
    nothing = tune_page._Figures([], [], [], [], None, [], [], [], [])
    monkeypatch.setattr(tune_page, "_figures", lambda *_: nothing)


def test_states(page: Page) -> None:
    states = "8 trials: 3 complete, 2 pruned, 1 failed, 1 diverged, 1 running"
    assert states in page.text
    assert page.classes()["open"] == 1  # "unfinished", in the page's header
    assert "Running or interrupted, so without a value: trial-7." in page.text
    assert "Few trials are complete (3)" in page.text
    assert [row[:2] for row in page.table("trials")[1:]] == [
        ["trial-0", "complete"],
        ["trial-1", "pruned"],
        ["trial-2", "pruned"],
        ["trial-3", "failed"],
        ["trial-4", "diverged"],
        ["trial-5", "best"],
        ["trial-6", "complete"],
        ["trial-7", "running"],
    ]


def test_best_values_against_the_configuration(page: Page) -> None:
    assert page.table("best")[1:] == [
        ["optim.lr", "0.0987", "0.01", "0.0001 to 0.1 (log)", "high end: widen the range"],
        ["optim.weight_decay", "0.05", "0.02", "0 to 0.1", ""],
    ]
    assert (
        "MAP@R of the best trial, trial-5: 50.00 %; of the first trial, trial-0 with the "
        "configuration's own values: 30.00 %."
    ) in page.text


def test_savings(page: Page) -> None:
    """Trials 1 and 2 left out 80 and 60 of 90 steps, at 0.2 and 0.3 s each."""
    made = 3 * 90 + 10 + 30 + 3 + 12
    share = 100 * 140 / (made + 140)
    assert f"All trials together: 1 min 15 s, {made} steps." in page.text
    assert (
        f"Pruning 2 trials saved 140 steps, {share:.0f} % of the steps without pruning; at the "
        "speed of the same trials, about 34 s."
    ) in page.text


def test_trials_as_rows_and_as_csv(search: Search, page: Page) -> None:
    rows = page.table("trials")
    assert rows[0] == ["trial", "state", "values", "MAP@R", "steps", "time"]
    assert rows[2][2:] == [
        *("optim.lr 0.002, optim.weight_decay 0.02", "10.00 % so far", "10", "2 s")
    ]
    assert rows[4][3:] == [DASH, "3", "1 s"]
    assert rows[5][3:] == [DASH, "12", "3 s"]  # Not the value that the sampler learns from.
    assert rows[6][3:] == ["50.00 %", "90", "20 s"]
    links = [values["href"] for tag, values in page.elements if tag == "a"]
    assert "../runs/trial-5/" in links
    assert "../runs/trial-3/" not in links  # It has no run.
    csv_rows = table_of(search.folder.path)
    assert [row["map_at_r"] for row in csv_rows] == ["0.3", "", "", "", "", "0.5", "0.4", ""]
    assert [row["optim.lr"] for row in csv_rows][1:3] == ["0.002", "0.003"]
    assert csv_rows[2]["last_value"] == "0.15"
    assert csv_rows[4]["problem"] == "loss nan at step 12"


def test_the_page_is_escaped_and_needs_no_network(page: Page) -> None:
    assert EVIL not in page.raw
    assert page.text.count(EVIL) >= 4  # In the problem (twice), the change and best.yaml.
    assert not page.open
    outside = [one for _, one in page.elements if "://" in one.get("href", "") + one.get("src", "")]
    assert outside == []


def test_every_section_has_its_figures(search: Search, page: Page) -> None:
    pictures = {path.stem for path in (search.folder.path / "report").glob("*.png")}
    assert pictures == {"history", "parallel", "slice-0", "slice-1", "learning", "cost"}
    assert "Importances are missing: they need 5 complete trials, and there are 3." in page.text
    assert page.raw.count('<svg role="img"') == len(pictures)
    assert "Dotted: the rungs at which ASHA prunes, steps 10, 30." in page.text


def test_curves_are_those_of_validation_classes(search: Search) -> None:
    tuning = read_tuning(search.folder.path)
    steps, values = tuning.trials[5].curve("map_at_r", STEPS)
    assert steps.tolist() == [10, 90]
    assert values.tolist() == [0.25, 0.5]


def test_facts(page: Page) -> None:
    facts = dict(zip(*(page_facts(page, kind) for kind in ("dt", "dd")), strict=True))
    assert facts["trials"] == "8 of 8"
    assert facts["objective"] == "maximize MAP@R"
    assert facts["pruner"] == "asha, rungs at 10, 30"
    assert facts["sampler"] == "tpe, seed 0"
    assert facts["storage"] == "optuna.db"
    assert facts["ranks of a run"] == "2: 2 x cpu"
    assert facts["all trials together"] == "1 min 15 s"


def page_facts(page: Page, tag: str) -> list[str]:
    return re.findall(rf"<{tag}>(.*?)</{tag}>", page.raw)


# ---------------------------------------------------------------- other searches


@pytest.mark.usefixtures("no_figures")
def test_trials_outside_changed_ranges(tmp_path: Path) -> None:
    search = Search(tmp_path / "demo", config_of(trials=2), sqlite=True)
    search.complete(0.3)
    search.complete(0.5, lr=0.09)
    space = {**SPACE, "optim.lr": {**SPACE["optim.lr"], "low": 0.02, "high": 0.1}}
    changed = config_of(trials=2, space=space)
    search.folder.write_config(changed)
    open_trials(changed, search.folder, STEPS)
    page = Page(write_tuning(search.folder.path))
    assert "2 trials: 1 complete, 1 outside" in page.text
    assert "optim.lr: 0.0001 to 0.1 (log) -> 0.02 to 0.1 (log)." in page.text
    assert page.table("best")[1][:4] == [
        *("optim.lr", "0.09", "0.01, outside the range", "0.02 to 0.1 (log)")
    ]
    assert [row[1] for row in page.table("trials")[1:]] == ["outside", "best"]
    assert "50.00 %; the first trial, trial-0, is outside." in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_continued_trial_counts_once(tmp_path: Path) -> None:
    search = Search(tmp_path / "demo", config_of(trials=2))
    search.complete(0.3)
    search.prune(30, 0.2, 6.0)
    search.trials.add_continuation(1)
    again = search.trials.interrupted()
    assert again is not None
    search.trials.complete(again.number, [0.4], seconds=18.0, steps=90)
    page = Page(write_tuning(search.folder.path))
    assert "2 trials: 2 complete" in page.text
    assert "finished" in page.texts
    assert page.table("trials")[3][:2] == ["trial-1", "best, continues trial 1"]
    tuning = read_tuning(search.folder.path)
    assert (tuning.seconds, tuning.savings.steps) == (38.0, 0)


@pytest.mark.parametrize("kind", ["nothing", "running", "one", "failed"])
def test_searches_with_few_outcomes(tmp_path: Path, kind: str) -> None:
    search = Search(tmp_path / "demo", config_of(trials=2))
    match kind:
        case "running":
            search.begin()
        case "one":
            search.complete(0.3)
        case "failed":
            for _ in range(2):
                search.trials.fail(search.begin().number, "no GPU")
    page = Page(write_tuning(search.folder.path))
    assert not page.open
    expected = {
        "nothing": ["no trial yet", "0 of 2 trials have started.", "No trial is complete."],
        "running": ["1 trial: 1 running", "1 of 2 trials have started."],
        "one": ["MAP@R of the best trial, trial-0: 30.00 %; of the first trial, trial-0"],
        "failed": [
            "No trial is complete (2 failed), so there are no best values.",
            "Failed trials (2): no GPU.",
        ],
    }
    for text in expected[kind]:
        assert text in page.text


def test_two_objectives(tmp_path: Path) -> None:
    """Of (MAP@R, seconds), 0.5 in 20 s and 0.3 in 10 s are on the front, 0.4 in 30 s is not."""
    objectives = [{"metric": "map_at_r"}, {"metric": "train_seconds", "direction": "minimize"}]
    config = config_of(objectives=objectives, pruner={"name": "none"}, trials=4)
    search = Search(tmp_path / "demo", config)
    search.complete(0.5, 20.0, lr=0.02)
    search.complete(0.4, 30.0)
    search.complete(0.3, 10.0, lr=0.001)
    search.trials.diverged(search.begin().number, "loss nan")
    page = Page(write_tuning(search.folder.path))
    assert page.table("best") == [
        ["trial", "MAP@R", "training time", "optim.lr", "optim.weight_decay"],
        ["trial-2", "30.00 %", "10 s", "0.001", "0.02"],
        ["trial-0", "50.00 %", "20 s", "0.02", "0.02"],
    ]
    assert {"front.png", "history-2.png"} <= {path.name for path in page_files(search)}


def page_files(search: Search) -> list[Path]:
    return list((search.folder.path / "report").iterdir())


def test_methods_folds_and_choices(tmp_path: Path) -> None:
    """Paths that a method does not have, and curves of two folds."""
    pooling = {"type": "categorical", "choices": ["gem", "avg"]}
    config = config_of(
        space=SPACE | {"model.pooling": pooling},
        methods={"nca": [], "other": ["optim.momentum=0.8"]},
        without={"other": ["optim.weight_decay"]},
        folds=2,
        trials=3,
    )
    search = Search(tmp_path / "demo", config)
    for number, method in enumerate(["nca", "other", "nca"]):
        trial = search.begin(**{"method": method, "model.pooling": "avg"})
        for fold in range(2):
            search.record(f"{trial.label}-fold-{fold}", {45: 0.1, 90: 0.25 + 0.25 * fold})
        search.trials.complete(trial.number, [0.2 + number / 10], seconds=9.0, steps=180)
    page = Page(write_tuning(search.folder.path))
    assert page.table("best")[1] == ["method", "nca", DASH, "one of nca, other", ""]
    assert "A path that a trial's method does not have is below its axis." in page.text
    tuning = read_tuning(search.folder.path)
    assert tuning.trial_steps == 180
    assert rungs_of(tuning) == [10, 30, 90]
    steps, values = tuning.trials[1].curve("map_at_r", STEPS)
    np.testing.assert_array_equal(steps, [45, 90, np.nan, 135, 180])
    np.testing.assert_array_equal(values, [0.1, 0.25, np.nan, 0.1, 0.5])


@pytest.mark.usefixtures("no_figures")
def test_results_on_test_classes(search: Search) -> None:
    for name, recall in (("tuned-seed-0", 0.5), ("tuned-seed-1", 0.6), ("untuned-seed-0", 0.45)):
        run = RunFolder.create(search.folder.run(name), "", name=name, seed=0)
        run.finish({"trained": {"recall_at_1": recall, "map_at_r": recall / 2}})
    final = {"label": "trial-5", "number": 5, "values": {"optim.lr": 0.0987}}
    seeds = {"0": "2026-01-01T00:00:00", "1": "2026-01-01T00:00:00"}
    search.folder.final_path.write_text(json.dumps({**final, "seeds": seeds}))
    try:
        page = Page(write_tuning(search.folder.path))
    finally:
        search.folder.final_path.unlink()
    # Half the interval: 12.706 * s / sqrt(2), s = 0.1 / sqrt(2).
    assert page.table("final") == [
        ["test classes", "tuned", "untuned", "difference"],
        ["R@1", "55.00 ± 63.53 %", "45.00 %", "+5.00 %"],
        ["MAP@R", "27.50 ± 31.77 %", "22.50 %", "+2.50 %"],
    ]
    assert "Tuned: trial-5 with optim.lr 0.0987" in page.text
    assert "Not finished: untuned-seed-1." in page.text


def test_importances_find_the_value_that_matters(tmp_path: Path) -> None:
    search = Search(tmp_path / "demo", config_of(trials=30))
    generator = np.random.default_rng(0)
    for _ in range(30):
        exponent = generator.uniform(-4, -1)
        trial = search.begin(10**exponent, generator.uniform(0, 0.1))
        search.trials.complete(trial.number, [0.5 - 0.1 * abs(exponent + 3)])
    tuning = read_tuning(search.folder.path)
    found = importances(tuning, 0)
    assert list(found) == ["optim.lr", "optim.weight_decay"]
    assert found["optim.lr"] > 0.8
    assert sum(found.values()) == pytest.approx(1.0)
    assert found == importances(tuning, 0)


def test_another_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no tune\.yaml"):
        write_tuning(tmp_path)
