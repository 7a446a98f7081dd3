"""What the report says of classes, embeddings and proxies, against loops; and big runs' pages."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dml_dist.random_streams import Stream, seed_of
from dml_dist.report import space, write_gallery, write_report
from dml_dist.report.class_results import read_class_results, weakest_rows
from dml_dist.report.proxy_diagnostics import read_proxy_facts, write_proxy_facts
from dml_dist.report.space import (
    MOST_POINTS,
    MOST_QUERIES,
    Space,
    draw_maps,
    measure_distances,
    principal_components,
    read_space,
)
from dml_dist.report.tiles import MOST_BYTES
from dml_dist.runtime.proxy_facts import _nearest_classes, _Table
from dml_dist.train.checkpoint_files import PartFile, write_part
from tests.report_runs import (
    EVIL,
    Page,
    add_records,
    begin,
    encoded,
    make_run,
    new_run,
    proxy_facts,
    query,
    write_classes,
    write_vectors,
)


@pytest.fixture(autouse=True)
def _no_umap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the same figures whether umap-learn is installed or not."""
    monkeypatch.setitem(sys.modules, "umap", None)


# ---------------------------------------------------------------- the page


def test_the_page_shows_classes_space_and_proxies(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    page = Page(write_report(run.path))
    for text in (
        "R@1 of 6 test classes. In 2 of them (33.3%) every query hits, in 1 (16.7%) none does",
        "The 6 classes with the lowest R@1", "class 0", EVIL,
        "Worst classes", "weak R@1 25.00 % of 4 queries", "Best classes", "strong R@1 100.00 %",
        "All 24 test images, in the two directions of largest variance",
        "Distance from a test image", "for all of 24 images",
        "Of 40 training images", "95.0%",
        "proxy 2 proxy 3 0.987", "proxy 4 proxy 5 2 of 4",
        "Norms of the 30 proxies", "the highest 0.987",
    ):  # fmt: skip
        assert text in page.text, text
    for name in ("classes", "map-pca", "distances", "proxy-norms", "proxy-similarity", "lr"):
        assert (run.report_dir / f"{name}.png").is_file()
    links = {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"}
    ids = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert links == {"results", "curves", "classes", "retrieval", "space", "proxies", "plan"}
    assert links <= ids
    assert page.open == []


def test_damaged_and_missing_parts_are_named_and_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    for path in (run.per_class, run.embeddings, run.report_dir / "proxies.npz"):
        path.write_bytes(path.read_bytes()[:100])
    page = Page(write_report(run.path))
    for name in ("per_class.parquet", "embeddings.npz", "proxies.npz"):
        assert f"{name} cannot be read" in page.text, name
    assert "does not hold" not in page.text
    for name in ("per_class.parquet", "embeddings.npz", "proxies.npz"):
        (path,) = run.path.rglob(name)
        path.unlink()
    assert "Embedding space" not in page.text
    page = Page(write_report(run.path))
    assert "does not hold: results per class, embeddings, proxy statistics." in page.text
    assert page.open == []


def test_a_big_run_gives_a_small_page_that_says_what_was_drawn(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    begin(run)
    add_records(run, num_steps=20_000)
    count = 3_000
    write_classes(run, np.random.default_rng(1).uniform(size=count).tolist())
    write_vectors(run, count, per_class=4, width=16)
    write_proxy_facts(run.path, proxy_facts(5_000))
    queries = []
    for number in range(30):
        # Images that are kept as they are: 160 pixels of noise as PNG, 77 kB each.
        item = query(100 * number, "+-+-", f"class {number}")
        images = {row: encoded(row, 160, "PNG") for row in range(item.row, item.row + 5)}
        found = tuple(
            type(one)(**{**vars(one), "image": images[one.row]}) for one in item.neighbors
        )
        queries.append(type(item)(item.row, item.class_name, images[item.row], found))
    write_gallery(run.path, queries)
    images = run.report_dir / "images"
    assert sum(path.stat().st_size for path in images.iterdir()) > 4 * MOST_BYTES
    path = write_report(run.path)
    assert path.stat().st_size < 5e6
    page = Page(path)
    drawn = f"{MOST_POINTS:,} of 12,000 test images, all of the colored classes, the others drawn"
    assert drawn in page.text
    assert f"for {MOST_QUERIES:,} drawn of 12,000 images" in page.text
    assert "image missing" not in page.text


# ---------------------------------------------------------------- classes and space


def test_classes_without_a_query_are_left_out(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = new_run(tmp_path / "demo")
    write_classes(run, [0.5, 0.25, 0.25, 1.0], super_class="s")
    table = pq.read_table(run.per_class)
    table = table.set_column(4, "num_queries", pa.array([4, 4, 4, 0]))
    table = table.set_column(7, "map_at_r", pa.array([0.1, 0.2, 0.05, float("nan")]))
    pq.write_table(table, run.per_class)
    results = read_class_results(run.path)
    assert results is not None
    assert results.names == ["class 0", EVIL, "class 2"]
    assert results.results.label.tolist() == [0, 1, 2]
    assert results.super_classes == ["s"] * 3
    # Lowest R@1 first, then the lowest MAP@R.
    assert [row.name for row in weakest_rows(results)] == ["class 2", EVIL, "class 0"]


@pytest.mark.parametrize("num_classes", [5, 260])
def test_distances_are_those_of_loops(num_classes: int) -> None:
    generator = np.random.default_rng(num_classes)
    labels = np.concatenate([np.repeat(np.arange(num_classes), 2), [num_classes, 0, 1]])
    vectors = generator.normal(size=(len(labels), 3)).astype(np.float32)
    measured = measure_distances(Space(vectors, labels, "euclidean"), seed=1)
    assert measured is not None
    same, other, within = [], [], []
    for one in range(len(labels)):
        lengths = np.linalg.norm(vectors - vectors[one], axis=1)
        mates = [at for at in range(len(labels)) if labels[at] == labels[one] and at != one]
        if mates:  # the last class has one image: no query
            same.append(lengths[mates].min())
            within.append(lengths[mates].mean())
            other.append(lengths[labels != labels[one]].min())
    for found, expected in ((measured.same, same), (measured.other, other)):
        np.testing.assert_allclose(np.sort(found), np.sort(expected), atol=1e-5)
    np.testing.assert_allclose(np.sort(measured.within), np.sort(within), atol=1e-5)
    centers = [vectors[labels == label].mean(axis=0) for label in range(num_classes + 1)]
    pairs = [np.linalg.norm(one - two) for at, one in enumerate(centers) for two in centers[:at]]
    # Exact for few classes, a mean over drawn pairs for many.
    assert measured.between == pytest.approx(np.mean(pairs), rel=1e-6 if num_classes == 5 else 0.02)
    assert measured.ratio == pytest.approx(np.mean(within) / measured.between, rel=1e-5)


def test_there_are_no_distances_without_pairs() -> None:
    vectors = np.eye(4, dtype=np.float32)
    assert measure_distances(Space(vectors, np.arange(4), "cosine"), 0) is None
    assert measure_distances(Space(vectors, np.zeros(4, np.int64), "cosine"), 0) is None
    assert draw_maps(Space(vectors[:2], np.arange(2), "cosine"), None, 0) == []


def test_principal_components_are_those_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    generator = np.random.default_rng(3)
    vectors = generator.normal(size=(200, 6)) * np.array([5, 3, 1, 1, 0.5, 0.1]) + 7
    positions, share = principal_components(vectors)
    reference = decomposition.PCA(2).fit(vectors)
    expected = reference.transform(vectors)
    signs = np.sign((positions * expected).sum(axis=0))
    np.testing.assert_allclose(positions * signs, expected, atol=1e-8)
    assert share == pytest.approx(reference.explained_variance_ratio_.sum())


def test_cosine_normalizes_and_euclidean_does_not(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    write_vectors(run, 3)
    raw = np.load(run.embeddings)["embeddings"]
    euclidean, cosine = read_space(run.path, "euclidean"), read_space(run.path, "cosine")
    assert euclidean is not None
    assert cosine is not None
    np.testing.assert_array_equal(euclidean.vectors, raw)
    np.testing.assert_allclose(np.linalg.norm(cosine.vectors, axis=1), 1, rtol=1e-6)


def test_every_image_of_the_colored_classes_is_on_the_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_run(tmp_path / "demo")
    num_classes = 3 * MOST_POINTS
    recall = np.ones(num_classes)
    recall[100::1000] = 0.0  # more classes than colors: the first ones are colored
    write_classes(run, recall.tolist())
    classes = read_class_results(run.path)
    assert classes is not None
    labels = np.arange(num_classes).repeat(2)
    vectors = np.random.default_rng(0).normal(size=(len(labels), 4)).astype(np.float32)
    vectors[:, 0] = labels
    on_map: list[float] = []

    def recorded(vectors_ND: np.ndarray) -> tuple[np.ndarray, float]:
        on_map.extend(vectors_ND[:, 0].tolist())
        return principal_components(vectors_ND)

    monkeypatch.setattr(space, "principal_components", recorded)
    (picture,) = draw_maps(Space(vectors, labels, "euclidean"), classes, seed=9)
    assert len(on_map) == MOST_POINTS
    colored = classes.results.worst_first()[:6].tolist()
    assert colored == [100, 1100, 2100, 3100, 4100, 5100]
    assert [on_map.count(label) for label in colored] == [2] * 6
    assert len(set(on_map)) > MOST_POINTS // 2  # and others at random
    assert "all of the colored classes, the others drawn at random" in picture.caption


def test_umap_draws_a_second_map_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    class UMAP:
        def __init__(self, **options: Any) -> None:
            given.update(options)

        def fit_transform(self, vectors: np.ndarray) -> np.ndarray:
            given["shape"] = vectors.shape
            return vectors[:, :2]

    stub = types.ModuleType("umap")
    stub.UMAP = UMAP  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", stub)
    vectors = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    maps = draw_maps(Space(vectors, np.arange(12) // 2, "cosine"), None, seed=9)
    assert [picture.name for picture in maps] == ["map-pca", "map-umap"]
    seed = seed_of(Stream.MAP_LAYOUT, 9, bits=32)
    assert (given["random_state"], given["n_neighbors"], given["shape"]) == (seed, 11, (12, 4))


# ---------------------------------------------------------------- proxies


def test_facts_about_proxies_are_kept_and_counted(tmp_path: Path) -> None:
    run = new_run(tmp_path / "demo")
    assert read_proxy_facts(run.path) is None
    facts = proxy_facts()
    write_proxy_facts(run.path, facts)
    read = read_proxy_facts(run.path)
    assert read is not None
    np.testing.assert_array_equal(read.norms, facts.norms)
    assert read.own_share == pytest.approx(38 / 40)
    pairs = read.similar_pairs()
    assert pairs[0][:2] == ("proxy 2", "proxy 3")
    assert len({frozenset(pair[:2]) for pair in pairs}) == len(pairs) == 10
    assert read.confusions() == [("proxy 4", "proxy 5", 2, 4)]


@pytest.mark.parametrize("per_class", [1, 3])
def test_nearest_proxies_are_those_of_loops(
    tmp_path: Path, per_class: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dml_dist.runtime.proxy_facts._CHUNK_ROWS", 5 * per_class)
    monkeypatch.setattr("dml_dist.runtime.proxy_facts._BLOCK_FLOATS", 40 * per_class)
    num_classes = 23
    generator = torch.Generator().manual_seed(per_class)
    values = torch.randn(num_classes * per_class, 4, generator=generator)
    bounds = [0, 9 * per_class, 16 * per_class, len(values)]
    files: list[PartFile] = []
    for low, high in itertools.pairwise(bounds):
        part = {"values": values[low:high], "rows": {}, "shared": {}}
        name = f"proxies-{low}-{high}.pt"
        files.append(write_part(tmp_path, name, part, table="proxies", low=low, high=high))
    table = _Table(tmp_path, files, num_classes)
    norms, width = table.norms()
    assert width == 4
    np.testing.assert_allclose(norms.ravel(), values.norm(dim=1), rtol=1e-6)

    unit = (values / values.norm(dim=1, keepdim=True)).double()
    drawn = np.array([0, 4, 8, 9, 15, 22])
    similarity, other = _nearest_classes(table, drawn)
    for at, label in enumerate(drawn):
        own = unit[label * per_class : (label + 1) * per_class]
        best = max(
            (float((own @ unit[row]).max()), row // per_class)
            for row in range(len(values))
            if row // per_class != label
        )
        assert (pytest.approx(best[0], abs=1e-6), best[1]) == (similarity[at], other[at])
    queries = torch.randn(17, 4, generator=generator)
    _, found = table.nearest(queries, np.full(17, -1))
    expected = (queries.double() @ unit.T).argmax(dim=1) // per_class
    np.testing.assert_array_equal(found, expected)


def test_the_nearest_other_class_may_be_far(tmp_path: Path) -> None:
    values = torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    part = {"values": values, "rows": {}, "shared": {}}
    file = write_part(tmp_path, "proxies-0-2.pt", part, table="proxies", low=0, high=2)
    similarity, other = _nearest_classes(_Table(tmp_path, [file], 2), np.arange(2))
    assert (similarity.tolist(), other.tolist()) == ([-1.0, -1.0], [1, 0])
