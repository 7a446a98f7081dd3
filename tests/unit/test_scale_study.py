"""A scaling study over made-up runs: tables, noise, failures, resumption; and one that is real."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError, DataError, RunError, RunStopped
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.scaling import ScaleFolder
from dml_dist.studies.pool import execute_run
from dml_dist.studies.scale import study
from dml_dist.studies.scale.measure import measured_records
from dml_dist.studies.scale.points import COLUMNS, ScalePoint
from dml_dist.studies.scale.table import read_points, write_points
from tests.scaling import MadeUpRuns, scale_config

QUIET = Console(quiet=True)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> MadeUpRuns:
    """Runs that are made up, on a quiet machine, without data and pages."""
    made = MadeUpRuns()
    monkeypatch.setattr(study, "execute_alone", made)
    monkeypatch.setattr(study, "execute_run", made)
    monkeypatch.setattr(study, "cluster", lambda launch: nullcontext())
    monkeypatch.setattr(study, "prepare_shards", lambda config, planned, console: planned)
    monkeypatch.setattr(study, "write_scaling", lambda path: path)
    loads(monkeypatch, iter(lambda: 0.0, None))
    return made


def loads(monkeypatch: pytest.MonkeyPatch, values: Iterator[float]) -> None:
    monkeypatch.setattr(study.LoadMeter, "load", lambda self, start, end: next(values))


def measure(config: RunConfig, folder: Path, **options: Any) -> list[ScalePoint]:
    study.run_scaling(config, QUIET, run_dir=folder, **options)
    return read_points(ScaleFolder(folder))


def test_points_of_a_study(tmp_path: Path, runs: MadeUpRuns) -> None:
    sweep = {"world_size": [1, 2], "classes": [40], "proxies": ["sharded", "replicated"]}
    points = measure(scale_config(tmp_path, all=sweep), tmp_path / "study")
    names = ["w1-c40", "w1-c40-replicated", "w2-c40", "w2-c40-replicated"]
    assert [point.name for point in points] == runs.executed == names
    assert all(point.measured and not point.noisy and point.tries == 1 for point in points)
    alone, _, two, _ = points
    assert (alone.images_per_second, two.images_per_second) == (100, 200)
    assert two.seconds_step == pytest.approx(8 / 200)
    assert two.seconds_reduction == 0.001
    assert (two.sent_counted, math.isnan(alone.sent_counted)) == (1000, True)
    assert two.memory_measured == 5e6
    assert (two.steps, two.repetitions, two.images_seen, two.recall_at_1) == (4, 2, 80, 0.5)
    assert alone.loss_difference == 0
    assert two.loss_difference == pytest.approx(0.05)
    assert (two.device, two.oversubscribed) == ("cpu", two.processors < 2)
    with open(tmp_path / "study/points.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == list(COLUMNS)
    assert [row["name"] for row in rows] == names
    assert not list((tmp_path / "study").glob("runs/*/checkpoints"))


def test_a_noisy_point_is_measured_again_and_the_quietest_counts(
    tmp_path: Path, runs: MadeUpRuns, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, config = tmp_path / "study", scale_config(tmp_path, "scale.tries=3")
    loads(monkeypatch, iter([0.9, 0.1, 0.7, 0.5, 0.8]))
    quiet, noisy = measure(config, folder)
    assert runs.executed == ["w1-c16"] * 2 + ["w1-c40"] * 3
    assert (quiet.tries, quiet.load, quiet.noisy) == (2, 0.1, False)
    assert (noisy.tries, noisy.load, noisy.noisy) == (3, 0.5, True)
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["w1-c16", "w1-c40"]
    # More tries are no other study; a quieter one replaces what was noisy.
    loads(monkeypatch, iter([0.6, 0.0]))
    more = scale_config(tmp_path, "scale.tries=9")
    assert [point.tries for point in measure(more, folder, resume=True)] == [2, 5]


def test_a_point_that_fails_is_shown_and_repeated(tmp_path: Path, runs: MadeUpRuns) -> None:
    folder, config = tmp_path / "study", scale_config(tmp_path)
    runs.fail = lambda name: RunError("no memory") if name == "w1-c16" else None
    with pytest.raises(RunError, match=r"1 of 2 points failed \(w1-c16\).*--resume"):
        measure(config, folder)
    failed, other = read_points(ScaleFolder(folder))
    assert (failed.status, failed.problem, failed.tries) == ("failed", "no memory", 1)
    assert other.measured
    runs.fail = lambda name: None
    assert all(point.measured for point in measure(config, folder, resume=True))
    assert runs.executed == ["w1-c16", "w1-c40", "w1-c16"]


def test_an_interrupted_study_is_resumed(tmp_path: Path, runs: MadeUpRuns) -> None:
    folder, config = tmp_path / "study", scale_config(tmp_path)
    for error in (KeyboardInterrupt(), RunStopped("stopped")):
        runs.fail = lambda name, error=error: error if name == "w1-c40" else None  # type: ignore[misc]
        with pytest.raises(RunStopped):
            measure(config, folder, resume=folder.exists())
    assert [point.status for point in read_points(ScaleFolder(folder))] == ["measured", "waiting"]
    runs.fail = lambda name: None
    measure(config, folder, resume=True)
    assert runs.executed == ["w1-c16", "w1-c40", "w1-c40", "w1-c40"]
    with pytest.raises(ConfigError, match="already holds a study"):
        measure(config, folder)
    other = scale_config(tmp_path, "loss.embedding_scale=4.0")
    for options in ({"resume": True}, {}):
        with pytest.raises(ConfigError):
            measure(other, folder, **options)
    with pytest.raises(ConfigError, match=r"cannot change these fields.*embedding_scale"):
        study.ask_scaling("gpus=8", other, QUIET, run_dir=folder)


def test_records_of_a_run_that_was_cut_off(tmp_path: Path, runs: MadeUpRuns) -> None:
    folder, config = tmp_path / "study", scale_config(tmp_path)
    measure(config, folder)
    run = RunFolder(folder / "runs/w1-c16")
    lines = run.records("steps").read_bytes().splitlines(keepends=True)
    run.records("steps").write_bytes(b"".join(lines[:-1]))
    course = study.plan_points(config)[0].course
    with pytest.raises(RunError, match="lacks records of some of the steps 1 to 10"):
        measured_records(run, course)


def test_the_table_of_points(tmp_path: Path) -> None:
    folder = ScaleFolder(tmp_path)
    assert read_points(folder) == []
    point = ScalePoint("a", 2, 3, 4, 5, "conv4-8", 16, remote=True, problem='x, "y"', load=0.5)
    write_points(folder, [point, ScalePoint("b", 1, 3, 4, 5, "conv4-8", 16)])
    first, second = read_points(folder)
    assert repr(first) == repr(point)  # NaN is not equal to itself.
    assert math.isnan(second.load)
    (tmp_path / "points.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"points.parquet is damaged"):
        read_points(folder)


def _real(tmp_path: Path, **sweeps: dict[str, Any]) -> list[ScalePoint]:
    return measure(scale_config(tmp_path, "scale.tries=1", **sweeps), tmp_path / "study")


def test_a_real_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runs of one rank, in this process; see below for processes and ranks."""
    monkeypatch.setattr(study, "execute_alone", execute_run)
    sweep = {"classes": [40], "proxies": ["sharded", "replicated"], "tar_shards": [3]}
    points = _real(tmp_path, all=sweep)
    assert [point.tar_shards for point in points] == [3, 3]
    sharded, replicated = points
    assert sharded.measured
    assert replicated.measured
    assert replicated.loss_difference == sharded.loss_difference == 0
    assert sharded.recall_at_1 == replicated.recall_at_1
    parts = [getattr(sharded, f"seconds_{name}") for name in ("data", "forward", "backward")]
    assert all(part > 0 for part in parts)
    assert sum(parts) < sharded.seconds_step


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_real_study_of_ranks_and_a_web_server(tmp_path: Path) -> None:
    points = _real(
        tmp_path,
        ranks={"world_size": [1, 2], "classes": [2000]},
        replicated={"world_size": [2], "classes": [2000], "proxies": ["replicated"]},
        remote={"classes": [2000], "data": ["remote"]},
    )
    assert [point.name for point in points] == [
        "w1-c2000",
        "w1-c2000-remote",
        "w2-c2000",
        "w2-c2000-replicated",
    ]
    for point in points:
        assert point.measured
        assert point.loss_difference < 1e-5
        if point.world_size == 2:
            assert point.seconds_gather > 0
            assert point.seconds_reduction > 0
            # About ten collectives of a step have headers and acknowledgements of 1 kB or more;
            # and other programs of this machine may send.
            assert point.sent_predicted < point.sent_counted < 1.05 * point.sent_predicted + 40_000
