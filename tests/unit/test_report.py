"""Reports use only a run's folder, and never fail on missing or damaged files."""

from __future__ import annotations

import base64
import io
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dml_dist.errors import ConfigError, DataError
from dml_dist.report import write_report
from dml_dist.report.summary import read_summary
from dml_dist.runs import folder as runs
from dml_dist.runs.provenance import GitState
from dml_dist.runs.records import RecordWriter
from tests.report_runs import EVIL, Page, add_records, begin, make_run, new_run, picture, scores


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "demo"
    make_run(path)
    assert write_report(path) == path / "report" / "index.html"
    return path


@pytest.fixture(scope="module")
def page(full: Path) -> Page:
    return Page(full / "report" / "index.html")


# ---------------------------------------------------------------- the page


def test_the_page_shows_the_run(page: Page) -> None:
    for text in (
        "demo", "finished", "2 ranks: 2 x cpu", "87.34 % R@1 on test classes 5.00 % untrained",
        "43.67 % MAP@R on test classes 2.50 % untrained", "1 min 42 s", "2,093",
        "best validation", "at step 300, chosen by MAP@R", "11,318", "32 + 32",
        "time: training 31 s", "seed 7", "name: demo", "python 3.", "dml-dist train x.yaml",
        "Training loss against the step", "R@1 validation", "MAP@R validation",
        "R@1 test, literature protocol", "step (optimizer updates)", "score (%)",
        "1 of the 3 queries shown is a miss", "R@1 over all queries is 87.34 %",
    ):  # fmt: skip
        assert text in page.text, text
    assert "not finished" not in page.text
    assert "There is no " not in page.text
    assert "There are no " not in page.text


def test_the_page_is_whole_and_needs_no_network(page: Page) -> None:
    assert page.open == []
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert attributes.get(name, "data:,").startswith(("data:", "#"))
    assert not re.search(r"url\((?!#)|@import", page.raw)
    policy = [attributes.get("content", "") for tag, attributes in page.elements if tag == "meta"]
    assert any("default-src 'none'" in content for content in policy)


def test_names_inside_the_page_are_unique_and_defined(page: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert ids.most_common(1)[0][1] == 1
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page.raw)
    assert {first or second for first, second in used} <= set(ids)
    defined = set(re.findall(r"(--[a-z-]+):", page.raw))
    assert set(re.findall(r"var\((--[a-z-]+)\)", page.raw)) <= defined
    assert "#00fe" not in page.raw  # a placeholder that was not replaced


def test_text_of_others_is_escaped(page: Page) -> None:
    assert "<script" not in page.raw
    assert page.text.count(EVIL) >= 6  # config, fact, its label, and each tile of a class


def test_hits_and_misses_have_a_symbol_and_misses_come_first(page: Page) -> None:
    classes = page.classes()
    # 6 hits and 3 misses of queries, 4 and 2 of classes, and two lines that explain them.
    assert (classes["hit"], classes["miss"], classes["query"]) == (12, 7, 5)
    # One more cross stands before what the weak class was mistaken for.
    assert (page.text.count("✓"), page.text.count("✕")) == (12, 8)
    assert page.text.index("Misses: the nearest") < page.text.index("Hits: the nearest")
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 20
    first = next(image for image in images if image["title"].endswith("row 20"))
    data = base64.b64decode(first["src"].removeprefix("data:image/png;base64,"))
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(pixels, picture(20))  # the query that misses
    shown = [image["title"] for image in images]
    assert shown.index(first["title"]) < shown.index("Z, row 10")


def test_the_literature_protocol_is_dashed(full: Path, page: Page) -> None:
    dashed = re.findall(r"stroke-dasharray: [\d.]+,", page.raw)
    assert len(dashed) == 4  # two lines and their two entries in the legend
    literature = read_summary(full).evaluation("recall_at_1", "literature")
    # At step 500 the final evaluation of the same split is shown next to it.
    np.testing.assert_array_equal(literature.steps, [100, 200, 300, 400, 500])
    np.testing.assert_allclose(literature.values, [0.1, 0.2, 0.3, 0.4, 0.5])


def test_figures_are_saved_as_png(full: Path) -> None:
    for name in ("loss", "retrieval"):
        with Image.open(full / "report" / f"{name}.png") as image:
            assert image.format == "PNG"
            assert image.width >= 900
            assert len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_the_same_run_gives_the_same_page(full: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(full, copy)
    before = (full / "report" / "index.html").read_bytes()
    assert write_report(copy).read_bytes() == before


# ---------------------------------------------------------------- unfinished runs


def test_a_run_that_has_just_begun_says_what_is_missing(tmp_path: Path) -> None:
    new_run(tmp_path / "demo")
    page = Page(write_report(tmp_path / "demo"))
    for text in (
        "running, or its processes were killed",
        "no training records, so no loss curve",
        "no validation records",
        "no result on the test classes",
        "does not hold: retrieval gallery, results per class, embeddings, proxy statistics",
    ):
        assert text in page.text, text
    assert page.open == []
    assert "table" not in [tag for tag, _ in page.elements]
    assert sorted(path.name for path in (tmp_path / "demo" / "report").iterdir()) == ["index.html"]


def test_a_crashed_run_shows_what_it_recorded(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    begin(run)
    with RecordWriter(run.records("steps"), 1) as steps:
        steps.write(10, loss=5.0, images_per_second=100.0)
    with RecordWriter(run.records("evaluations"), 1) as evaluations:
        evaluations.write(0, split="test", protocol="untrained", **scores(0.05))
    with open(run.records("steps"), "ab") as file:
        file.write(b'{"step": 20, "lo')
    run.config_path.unlink()
    page = Page(write_report(run.path))
    for text in (
        "last training record is of step 10",
        "no result on the test classes",
        "config.yaml is missing",
        "5.00 %",
        "training images per second",
    ):
        assert text in page.text, text
    assert "Configuration" not in page.text
    assert (run.report_dir / "loss.png").is_file()
    assert not (run.report_dir / "retrieval.png").exists()


def test_a_run_without_a_final_evaluation_shows_its_validation(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    begin(run)
    with RecordWriter(run.records("evaluations"), 1) as evaluations:
        evaluations.write(100, split="validation", protocol="validation", **scores(0.9, 60))
    run.finish({"checkpoint": {"step": 100}, "seconds": {"train": 3.0}})
    page = Page(write_report(run.path))
    assert ("finished" in page.text, page.open) == (True, [])
    assert "There is no result on the test classes." in page.text
    header = re.findall(r'<th scope="col">([^<]*)</th>', page.raw)
    assert header == ["metric", "best validation"]
    assert "Untrained and trained" not in page.text
    assert "Best validation: held-out training classes at step 100" in page.text
    sections = {attributes["href"] for tag, attributes in page.elements if tag == "a"}
    assert sections == {"#results", "#curves", "#plan"}


def test_a_run_without_its_untrained_network_and_galleries(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    begin(run)
    run.finish({"trained": scores(0.75)})
    page = Page(write_report(run.path))
    assert "75.00 % R@1 on test classes" in page.text
    assert "no result of the untrained network to compare with" in page.text
    assert "does not hold: retrieval gallery, results per class, embeddings" in page.text
    assert re.findall(r'<th scope="col">([^<]*)</th>', page.raw) == ["metric", "trained"]
    assert " untrained " not in page.text.replace("the untrained network", "")


@pytest.mark.parametrize(
    ("end", "text"),
    [
        (("stopped", "SIGTERM.", 20), "The run was stopped after step 20: SIGTERM. It can be"),
        (("stopped", "SIGINT", None), "The run was stopped: SIGINT. It can be resumed."),
        (("failed", "disk full", None), "The run failed: disk full. It can be resumed."),
    ],
)
def test_a_run_that_ended_early_says_why(tmp_path: Path, end: Any, text: str) -> None:
    run = new_run(tmp_path / "demo")
    begin(run)
    add_records(run, num_steps=20)
    run.end(*end)
    page = Page(write_report(run.path))
    (chip,) = re.findall(r'<span class="chip open">([^<]*)</span>', page.raw)
    assert chip == end[0]
    assert text in page.text
    assert "Its last training record is of step 20." in page.text


def test_results_of_records_stand_in_for_metrics(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    begin(run)
    add_records(run, num_steps=100)
    page = Page(write_report(run.path))
    assert "87.34 % R@1 on test classes 5.00 % untrained" in page.text
    assert "no result on the test classes" not in page.text


def test_damaged_files_are_named_on_the_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    run.metrics_path.write_text('{"trained": ')
    (run.report_dir / "retrieval.json").write_text('{"queries": [{"query": {}}]}')
    page = Page(write_report(run.path))
    assert "metrics.json, which is damaged" in page.text
    assert "retrieval.json is damaged" in page.text
    run.info_path.write_text("{")
    with pytest.raises(DataError, match=r"run\.json"):
        write_report(run.path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run\.json"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_non_finite_values_are_reported(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    begin(run)
    with RecordWriter(run.records("steps"), 1) as steps:
        for step in range(1, 61):
            steps.write(step, loss=1.0 if step < 50 else float("inf" if step == 50 else "nan"))
    with RecordWriter(run.records("evaluations"), 1) as evaluations:
        for step, value in ((1, float("nan")), (2, 0.25), (3, 0.25)):
            values = {**scores(0.5), "map_at_r": value}
            evaluations.write(step, split="validation", protocol="validation", **values)
    run.finish({"trained": {"recall_at_10": float("nan"), "map_at_r": 0.5}})
    page = Page(write_report(run.path))
    assert "11 records have no finite loss" in page.text
    assert "not a number R@10 on test classes" in page.text
    assert "at step 2, chosen by MAP@R" in page.text


# ---------------------------------------------------------------- warnings


def test_uncommitted_changes_and_resumption_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path / "demo")
    monkeypatch.setattr(runs, "git_revision", lambda folder: GitState("a" * 40, dirty=False))
    begin(run)
    add_records(run, num_steps=20)
    assert "⚠" not in Page(write_report(run.path)).text
    run.finish({"trained": scores(0.5)})
    monkeypatch.setattr(runs, "git_revision", lambda folder: GitState("b" * 40, dirty=True))
    monkeypatch.setattr(runs, "installed_versions", lambda: {"python": "4.0"})
    begin(run, world_size=3, changes=["launch.num_workers: 2 -> 3"])
    page = Page(write_report(run.path))
    for text in (
        "uncommitted changes in attempt 2:",
        "2 attempts, 1 with a changed configuration",
        "different versions of packages",
        "continued after its results were written",
        "launch.num_workers: 2 -> 3",
        "aaaaaaaaaaaa",
        "with uncommitted changes",
        "3 ranks: 2 x cpu",
    ):
        assert text in page.text, text
