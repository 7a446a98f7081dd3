"""The result of a search: its best configuration, and the runs on test classes."""

from __future__ import annotations

import io
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from dml_dist.config.data import GlyphsConfig
from dml_dist.config.load import differing_paths, dump_config, load_config
from dml_dist.config.schema import RunConfig
from dml_dist.data.datasets import build_importer
from dml_dist.data.write_shards import import_dataset
from dml_dist.errors import ConfigError, DmlDistError, RunError, RunStopped
from dml_dist.files import read_json
from dml_dist.parallel.comm import Comm
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.tuning import (
    TuningFolder,
    searched_paths,
    trial_configs,
    tune_section,
    tuned_config,
)
from dml_dist.runtime.context import open_context
from dml_dist.runtime.datasets import describe
from dml_dist.runtime.progress import Event, discard, phase
from dml_dist.studies.final import Final, print_final, read_final, run_final, write_best
from dml_dist.studies.pool import Pool
from dml_dist.studies.samplers import create_study
from dml_dist.studies.trials import Trials
from dml_dist.topology import Topology
from tests.unit.test_tuning import WITH_METHODS, tuning


def trials_of(config: RunConfig, *results: tuple[dict[str, Any], float]) -> Trials:
    """Return trials of a search that were completed with these values and scores."""
    section = tune_section(config)
    study = create_study(section, section.objectives, section.pruner, steps=20)
    trials = Trials(study, section.space, partial(searched_paths, config), list(section.methods))
    for values, score in results:
        add_trial(trials, values, score)
    return trials


def add_trial(trials: Trials, values: dict[str, Any], score: float) -> None:
    trials.enqueue([values])
    found = trials.suggest()
    assert found.values == values
    trials.complete(found.number, [score, 1.0][: len(trials.study.directions)])


def read(folder: TuningFolder) -> Final:
    found = read_final(folder)
    assert found is not None
    return found


LOW, HIGH = {"optim.lr": 0.0123456789012345678}, {"optim.lr": 0.05}

# ---------------------------------------------------------------- best.yaml


def test_the_best_configuration_is_one_for_train(tmp_path: Path) -> None:
    config, folder = tuning("evaluation.final=metrics"), TuningFolder(tmp_path / "a study")
    folder.path.mkdir()
    trials = trials_of(config, ({"optim.lr": 0.03}, 0.25), (LOW, 0.5123456789), (HIGH, 0.5))
    run = RunFolder.create(folder.run("trial-1"), "", name="trial-1", seed=0)
    run.finish({"validation": {"map_at_r": 0.5}, "checkpoint": {"step": 15}})
    path = write_best(config, folder, trials)
    assert path == folder.path / "best.yaml"
    found = load_config(path)
    assert found == tuned_config(config, LOW).model_copy(update={"name": "demo_best"})
    assert (found.tune, found.compare, found.validation) == (None, None, config.validation)
    study = config.model_copy(update={"tune": None})
    assert {one.path for one in differing_paths(study, found)} == {"name", "optim.lr"}

    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert header == [
        f"# Best trial of the search demo in {folder.path}",
        "# Trial: trial-1 (number 1), the best of 3",
        "# Result on the validation classes: map_at_r 0.5123456789",
        "# Step of the best validation: 15",
        "# Searched values:",
        "#   optim.lr: 0.012345678901234568",
        f"# Train with: dml-dist train '{path}'",
    ]
    # The runs of trials may be removed to free the disk.
    shutil.rmtree(run.path)
    write_best(config, folder, trials)
    assert "Step of" not in path.read_text()
    assert load_config(path) == found


def test_the_best_configuration_keeps_its_validation_and_its_method(tmp_path: Path) -> None:
    values = {"method": "nca", "optim.lr": 0.02, "optim.proxy_lr": 0.75}
    objectives = [{"metric": "map_at_r"}, {"metric": "train_seconds", "direction": "minimize"}]
    config = tuning(**WITH_METHODS, folds=2, objectives=objectives, pruner={"name": "none"})
    folder = TuningFolder(tmp_path)
    trials = trials_of(config, (values, 0.5))
    for fold, step in enumerate((10, 20)):
        name = f"trial-0-fold-{fold}"
        run = RunFolder.create(folder.run(name), "", name=name, seed=0)
        run.finish({"checkpoint": {"step": step}})
    path = write_best(config, folder, trials)
    assert path is not None
    found = load_config(path)
    assert found.validation == config.validation
    assert (found.optim.proxy_lr, found.loss.name) == (0.75, "proxy_nca")
    text = path.read_text()
    assert "the best of 1 by map_at_r\n" in text
    assert "mean of 2 folds: map_at_r 0.5, train_seconds 1.0\n" in text
    assert "Step of the best validation: 10, 20\n" in text
    assert '#   method: "nca"\n' in text


def test_no_complete_trial_gives_no_file(tmp_path: Path) -> None:
    config = tuning()
    trials = trials_of(config)
    trials.fail(trials.suggest().number, "no memory")
    trials.diverged(trials.suggest().number, "the loss is not finite")
    assert write_best(config, TuningFolder(tmp_path), trials) is None
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- --final

GAIN = 0.05


class FakeRuns:
    """Finishes runs without training; one may fail, one may be stopped."""

    def __init__(self, *, fail: str = "", stop: str = "") -> None:
        self.configs: list[RunConfig] = []
        self.fail, self.stop = fail, stop

    def __call__(self, config: RunConfig, folder: Path) -> dict[str, Any]:
        self.configs.append(config)
        if config.name == self.fail:
            raise RunError("the loss is not finite")
        if config.name == self.stop:
            raise RunStopped("stopped by SIGTERM")
        # Seeds differ more than the variants do.
        noise = np.random.default_rng([config.seed, config.name.startswith("tuned")]).normal()
        score = 0.4 + 0.1 * config.seed + 0.001 * noise + GAIN * config.name.startswith("tuned")
        trained = {"recall_at_1": score, "map_at_r": score / 2, "density": score * 10}
        metrics = {"trained": {**trained, "num_queries": 20}, "checkpoint": {"step": 20}}
        run = RunFolder.create(folder, dump_config(config), name=config.name, seed=config.seed)
        run.finish(metrics)
        return metrics

    @property
    def names(self) -> list[str]:
        return [config.name for config in self.configs]


def final(config: RunConfig, folder: TuningFolder, trials: Trials, runs: FakeRuns) -> list[Event]:
    events: list[Event] = []
    pool = Pool(folder, config.launch, 1)
    pool._execute = runs
    run_final(config, folder, trials, pool, events.append)
    return events


@pytest.fixture
def folder(tmp_path: Path) -> TuningFolder:
    return TuningFolder(tmp_path)


def test_both_variants_are_run_with_each_seed(folder: TuningFolder) -> None:
    config = tuning("evaluation.final=metrics", final_seeds=[3, 0])
    trials = trials_of(config, (HIGH, 0.3), (LOW, 0.5))
    seen: list[Any] = []

    class Looking(FakeRuns):
        def __call__(self, config: RunConfig, path: Path) -> dict[str, Any]:
            assert path == folder.run(config.name)
            seen.append(read_json(folder.final_path))
            return super().__call__(config, path)

    events = final(config, folder, trials, runs := Looking())
    assert runs.names == ["tuned-seed-3", "untuned-seed-3", "tuned-seed-0", "untuned-seed-0"]
    assert [run.seed for run in runs.configs] == [3, 3, 0, 0]
    assert [run.optim.lr for run in runs.configs] == [LOW["optim.lr"], 0.01] * 2
    for run in runs.configs:
        assert (run.validation.name, run.data.test_split) == ("none", "test")
        assert (run.evaluation.final, run.train) == ("metrics", config.train)
    # What is evaluated is written before the first run.
    assert {key: seen[0][key] for key in ("label", "number", "values")} == {
        "label": "trial-1",
        "number": 1,
        "values": LOW,
    }
    assert list(seen[0]["seeds"]) == ["3", "0"]
    notes = [event["text"] for event in events if event["kind"] == "note"]
    assert notes[2].startswith("tuned-seed-0: R@1 45.")
    assert events[-1] == phase("final runs", 4, 4)


def test_the_untuned_variant_has_the_method_of_the_best_trial(folder: TuningFolder) -> None:
    config = tuning(**WITH_METHODS, final_seeds=[0])
    values = {"method": "triplet", "optim.lr": 0.02, "loss.margin": 0.3}
    final(config, folder, trials_of(config, (values, 0.5)), runs := FakeRuns())
    losses = [(run.loss.name, run.loss.margin, run.optim.lr) for run in runs.configs]  # type: ignore[union-attr]
    assert losses == [("triplet", 0.3, 0.02), ("triplet", 0.2, 0.01)]


def test_the_result_is_a_mean_with_an_interval_and_a_paired_difference(
    folder: TuningFolder,
) -> None:
    config = tuning(final_seeds=[0, 2, 10])
    assert read_final(folder) is None
    final(config, folder, trials_of(config, (LOW, 0.5)), FakeRuns())
    found = read(folder)
    assert (found.label, found.values, found.num_finished, found.missing) == ("trial-0", LOW, 6, [])
    assert found.keys == ["recall_at_1", "map_at_r", "density"]  # no count
    rows = {
        name: [
            read_json(folder.run(f"{name}-seed-{seed}") / "metrics.json")["trained"]["map_at_r"]
            for seed in (0, 2, 10)
        ]
        for name in ("tuned", "untuned")
    }
    for variant in found.variants:
        interval = variant.interval("map_at_r")
        expected = stats.ttest_1samp(rows[variant.name], 0.0).confidence_interval(0.95)
        np.testing.assert_allclose([interval.low, interval.high], expected)
        assert interval.mean == pytest.approx(np.mean(rows[variant.name]))
    gain = found.difference("map_at_r")
    expected = stats.ttest_rel(rows["tuned"], rows["untuned"]).confidence_interval(0.95)
    np.testing.assert_allclose([gain.low, gain.high], expected)
    # Seeds vary together, so the difference is known far better than either mean.
    assert gain.half < found.tuned.interval("map_at_r").half / 10


def test_a_run_that_fails_does_not_end_the_others(folder: TuningFolder) -> None:
    config = tuning(final_seeds=[0, 1])
    trials = trials_of(config, (LOW, 0.5))
    with pytest.raises(RunError, match=r"1 of 4 final runs failed: untuned-seed-0: the loss"):
        final(config, folder, trials, runs := FakeRuns(fail="untuned-seed-0"))
    assert len(runs.configs) == 4
    found = read(folder)
    assert (found.num_finished, found.missing) == (3, ["untuned-seed-0"])
    # The difference has the one pair that is complete.
    gain = found.difference("recall_at_1")
    pair = (found.tuned.metrics[1]["recall_at_1"], found.untuned.metrics[1]["recall_at_1"])
    assert (gain.count, gain.mean) == (1, pair[0] - pair[1])


def test_a_stopped_command_continues_and_seeds_can_be_added(folder: TuningFolder) -> None:
    config = tuning(final_seeds=[0, 1])
    trials = trials_of(config, (LOW, 0.5))
    with pytest.raises(RunStopped):
        final(config, folder, trials, first := FakeRuns(stop="untuned-seed-0"))
    begun = read_json(folder.final_path)
    final(config, folder, trials, second := FakeRuns())
    assert (first.names, second.names) == (
        ["tuned-seed-0", "untuned-seed-0"],
        ["untuned-seed-0", "tuned-seed-1", "untuned-seed-1"],
    )
    assert read_json(folder.final_path) == begun
    final(config, folder, trials, nothing := FakeRuns())
    assert nothing.names == []
    final(tuning(final_seeds=[7, 0]), folder, trials, more := FakeRuns())
    assert more.names == ["tuned-seed-7", "untuned-seed-7"]
    # Seed 1 stays part of the result, though it is no longer asked for.
    assert list(read(folder).seeds) == [0, 1, 7]
    assert read_json(folder.final_path)["seeds"]["0"] == begun["seeds"]["0"]
    assert read(folder).num_finished == 6


def test_test_classes_are_used_for_one_choice(folder: TuningFolder) -> None:
    config = tuning(final_seeds=[0])
    trials = trials_of(config, (LOW, 0.5))
    final(config, folder, trials, FakeRuns())
    before = folder.final_path.read_bytes()
    add_trial(trials, HIGH, 0.6)
    with pytest.raises(ConfigError, match=r"used for trial-0 with optim.lr 0.0123") as error:
        final(config, folder, trials, runs := FakeRuns())
    message = str(error.value)
    assert "the best trial is now trial-1 with optim.lr 0.05" in message
    assert "begin a new study" in message
    assert runs.names == []
    assert folder.final_path.read_bytes() == before


def test_what_final_needs(folder: TuningFolder) -> None:
    config = tuning()
    trials = trials_of(config)
    with pytest.raises(ConfigError, match="needs a complete trial, but none of the 0"):
        final(config, folder, trials, FakeRuns())
    add_trial(trials, LOW, 0.5)
    number = trials.suggest().number
    with pytest.raises(ConfigError, match=r"1 trial is not finished .* without --final first"):
        final(config, folder, trials, FakeRuns())
    trials.prune(number)
    trials.enqueue([HIGH])  # Waits for a later call: nothing has begun.
    # Refused before the test classes count as used.
    patient = tuning(
        "data.batches={name: balanced, samples_per_class: 2, classes_per_batch: 8}",
        "projections={steps_per_problem: 10, patience: 2, min_steps: 2, lead_steps: 2}",
    )
    with pytest.raises(ConfigError, match=r"patience is 2, but validation\.name is none"):
        final(patient, folder, trials, FakeRuns())
    assert not folder.final_path.exists()
    final(config, folder, trials, runs := FakeRuns())
    assert len(runs.configs) == 6


def test_the_table(folder: TuningFolder) -> None:
    config = tuning(final_seeds=[0, 1])
    out = io.StringIO()
    console = Console(file=out, width=80)
    print_final(folder, console)
    assert out.getvalue() == ""
    trials = trials_of(config, (LOW, 0.5))
    with pytest.raises(RunError):
        final(config, folder, trials, FakeRuns(fail="untuned-seed-1"))
    print_final(folder, console)
    found = read(folder)
    rows = {line.split()[0]: line for line in out.getvalue().splitlines() if line.strip()}
    mean = 100 * np.mean([one["recall_at_1"] for one in found.tuned.metrics.values()])
    assert f"{mean:.2f} ± " in rows["R@1"]
    assert f" {100 * found.untuned.metrics[0]['recall_at_1']:.2f} % " in rows["R@1"]
    assert rows["R@1"].rstrip().endswith(f"+{100 * found.difference('recall_at_1').mean:.2f} %")
    assert "%" not in next(line for name, line in rows.items() if name == "Embedding-space")
    assert rows["tuned:"] == "tuned: trial-0 with optim.lr 0.0123"
    assert rows["not"] == "not finished: untuned-seed-1"


# ---------------------------------------------------------------- real runs


@pytest.fixture(scope="module")
def glyphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of each of 16 glyph classes, half of them test classes."""
    out = tmp_path_factory.mktemp("glyphs")
    data = GlyphsConfig(num_classes=16, images_per_class=6, image_size=24)
    import_dataset(build_importer(data), out, samples_per_shard=16, description=describe(data))
    return out


def real_config(data: Path) -> RunConfig:
    return tuning(
        f"data={{path: {data}, batches: {{name: shuffled, window: 1}}, loader_workers: 0}}",
        "data.transform={size: 24, flip: 0.0}",
        "model={backbone: {name: conv4, width: 8}, embedding_size: 8}",
        "train={global_batch_size: 12, steps: 3}",
        "evaluation={final: metrics, metrics: [], every_steps: 2, evaluate_test_every: 2}",
        "validation.fraction=0.25",
        "loggers=[]",
        "launch.threads_per_rank=1",
        final_seeds=[5],
        folds=2,
    )


def test_trials_never_read_a_test_class_and_final_runs_do(glyphs: Path, tmp_path: Path) -> None:
    folder = TuningFolder(tmp_path / "study")
    config = real_config(glyphs)
    trial = trial_configs(config, "trial-0", LOW)[1]
    context = open_context(trial, Topology(), Comm.single(), discard)
    index, test_rows = context.index, context.index.rows("test")
    train_classes = np.unique(index.label[index.rows("train")])
    assert context.resolve().num_classes == len(train_classes) / 2  # of the two folds

    # Where no image of a test class can be read, a trial works and a final run does not.
    damaged = tmp_path / "damaged"
    shutil.copytree(glyphs, damaged)
    for shard in np.unique(index.tar_shard[test_rows]):
        tar = damaged / index.tar_shards[shard]
        tar.write_bytes(bytes(tar.stat().st_size))
    with Pool(folder, config.launch, 1) as pool:
        locked = real_config(damaged)
        metrics = pool.execute(trial_configs(locked, "trial-0", LOW)[1], folder.run("trial-0"))
        assert set(metrics) == {"validation", "checkpoint", "seconds"}
        trials = trials_of(config, (LOW, metrics["validation"]["map_at_r"]))
        other = TuningFolder(tmp_path / "other")
        other.path.mkdir()
        with pytest.raises(DmlDistError, match="test-0000"):
            run_final(locked, other, trials, pool, discard)

        run_final(config, folder, trials, pool, discard)
    found = read(folder)
    assert found.num_finished == 2
    for variant in found.variants:
        run = RunFolder(folder.run(f"{variant.name}-seed-5"))
        own = open_context(load_config(run.config_path), Topology(), Comm.single(), discard)
        np.testing.assert_array_equal(own.split.train_classes, train_classes)
        assert f"{len(train_classes)} classes" in str(run.info().facts)
        assert variant.metrics[5]["num_queries"] == len(test_rows)
