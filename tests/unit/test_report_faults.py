"""A report never ends a run: unusual results are drawn, and what fails is named on the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dml_dist.report import try_to_write, write_report
from dml_dist.report.proxy_diagnostics import write_proxy_facts
from dml_dist.runs.artifacts import SavedEmbeddings, write_embeddings
from tests.report_runs import Page, add_records, make_run, new_run, proxy_facts, scores

LABELS = np.repeat(np.arange(3), 4)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "demo").path


def signs(count: int) -> np.ndarray:
    return np.where(np.arange(count) % 2, 1.0, -1.0)[:, None]


@pytest.mark.parametrize(
    ("vectors", "labels"),
    [
        (signs(12), LABELS),
        (np.ones((12, 1)), LABELS),
        (np.ones((12, 2)), LABELS),
        (np.zeros((12, 8)), LABELS),
        (np.zeros((12, 8)), np.zeros(12, dtype=np.int64)),
        (np.eye(3), np.arange(3)),
        (np.ones((1, 8)), np.zeros(1, dtype=np.int64)),
        (np.zeros((0, 8)), np.zeros(0, dtype=np.int64)),
    ],
    ids=["width 1", "one point", "2-d point", "zeros", "one class", "no pair", "1 image", "empty"],
)
def test_unusual_embeddings_are_no_fault(
    vectors: np.ndarray, labels: np.ndarray, tmp_path: Path
) -> None:
    """Embedding size 1, black images, one class: each has a page without a failed part."""
    folder = new_run(tmp_path / "run")
    saved = SavedEmbeddings(vectors.astype(np.float32), np.arange(len(labels)), labels)
    write_embeddings(folder.embeddings, saved)
    page = Page(write_report(folder.path))
    assert "failed:" not in page.text
    if vectors.shape == (12, 8) and labels.any():
        assert "class centers: all centers are equal." in page.text


def test_equal_proxies_are_no_fault(tmp_path: Path) -> None:
    facts = proxy_facts(30)
    for value in (0.0, 1.0):
        folder = new_run(tmp_path / str(value))
        same = np.full_like(facts.similarity, value)
        norms = np.full_like(facts.norms, value)
        write_proxy_facts(folder.path, replace(facts, similarity=same, norms=norms))
        assert "failed:" not in Page(write_report(folder.path)).text


@pytest.mark.parametrize(
    ("place", "part"),
    [
        ("page.draw_curves", "curves"),
        ("page.draw_space", "embedding space"),
        ("page.read_gallery", "retrieval gallery"),
        ("page.read_space", "embeddings"),
        ("page._headline", "headline"),
        ("summary.RunSummary.table", "results"),
        ("tiles.TileMaker.by_outcome", "retrieval"),
    ],
)
def test_a_part_that_fails_is_named_and_the_rest_is_there(
    place: str, part: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise ZeroDivisionError("division by zero")

    for slow in ("draw_space", "draw_proxies"):
        monkeypatch.setattr(f"dml_dist.report.page.{slow}", lambda *_: [])
    monkeypatch.setattr(f"dml_dist.report.{place}", fail)
    page = Page(write_report(run))
    assert f"The part '{part}' failed: ZeroDivisionError: division by zero." in page.text
    assert "config.yaml" in page.text
    assert ("Training loss against the step" in page.text) == (part != "curves")


@pytest.mark.parametrize("error", [OSError("disk full"), ZeroDivisionError(), MemoryError()])
def test_no_page_at_all_is_a_warning(
    error: Exception, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: Path) -> Path:
        raise error

    assert try_to_write(fail, run) is None
    assert f"the report of {run} could not be written: {type(error).__name__}" in caplog.text


def test_a_network_of_constant_output_has_a_page(tmp_path: Path) -> None:
    """What a diverged or dead network gives: every score 0 or NaN."""
    folder = new_run(tmp_path / "run")
    add_records(folder)
    folder.finish({"trained": dict.fromkeys(scores(0.5), 0.0) | {"nmi": float("nan")}})
    assert "failed:" not in Page(write_report(folder.path)).text
