"""Export and search: a bundle is self-contained and finds the neighbors of an evaluation."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from rich.console import Console

from dml_dist.config.load import load_config
from dml_dist.data.index import read_index
from dml_dist.data.reader import ShardReader
from dml_dist.errors import ConfigError, DataError
from dml_dist.export import export
from dml_dist.export import search_figure as search_picture
from dml_dist.export.bundle import read_bundle
from dml_dist.export.export import ExportOptions, run_export
from dml_dist.export.search import embed_images, nearest
from dml_dist.orchestration.train import run_training
from dml_dist.parallel.comm import Comm
from dml_dist.runs.code_note import say_if_code
from dml_dist.runs.folder import RunFolder
from dml_dist.runtime.context import open_context
from dml_dist.runtime.progress import discard
from dml_dist.topology import Topology
from dml_dist.train.checkpoint_choice import load_model, select_checkpoint
from tests.oracles_preprocessing import apply_steps

Cli = Callable[..., tuple[int, str]]
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(glyphs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of some steps on glyphs, by cosine."""
    folder = tmp_path_factory.mktemp("exported")
    config = folder / "run.yaml"
    config.write_text(
        f"""
        name: exported
        data:
          path: {glyphs}
          transform: {{size: 24, resize: 28, crop_scale: [0.7, 1.0], flip: 0.0}}
          loader_workers: 0
        model: {{backbone: {{name: conv4, width: 16}}, embedding_size: 12, pooling: gem}}
        optim: {{name: adam, lr: 0.003, proxy_lr: 0.05}}
        train: {{global_batch_size: 26, steps: 20}}
        validation: {{name: none}}
        evaluation: {{batch_size: 32}}
        launch: {{launcher: inprocess, threads_per_rank: 1}}
        """
    )
    run_training(load_config(config), QUIET, run_dir=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its bundle."""
    out = tmp_path_factory.mktemp("bundles") / "below" / "bundle"
    return run_export(run, out, QUIET, ExportOptions())


@pytest.fixture
def images(glyphs: Path, tmp_path: Path) -> list[Path]:
    """Some test images as files."""
    index = read_index(glyphs)
    rows = index.rows("test")[[3, 50, 111]]
    paths = []
    for row in rows:
        paths.append(tmp_path / f"{row}.png")
        paths[-1].write_bytes(ShardReader(index).read(int(row)))
    return paths


def test_a_bundle_finds_what_an_evaluation_finds(run: Path, bundle: Path) -> None:
    """Given an evaluation's embeddings: the same rows in the same order, at the same distances."""
    config = load_config(RunFolder(run).config_path)
    context = open_context(config, Topology(), Comm.single(), discard)
    rows = context.rows_of("test")
    checkpoint = select_checkpoint(RunFolder(run).checkpoints, "best")
    model = load_model(checkpoint, config.model, seed=config.seed)
    expected = context.measure(model, rows, "embed", neighbors=7)
    embeddings, labels, _ = context.embed(model, rows, "embed")
    read = read_bundle(bundle)
    assert read.keys == context.index.keys[rows].tolist()
    assert read.labels.tolist() == labels.tolist()
    assert {read.class_names[label] for label in labels} == {
        context.index.class_names[label] for label in labels
    }
    found = nearest(read, torch.from_numpy(embeddings), 8)
    assert expected.neighbors is not None
    assert expected.neighbor_distances is not None
    for query, (neighbors, distances) in enumerate(
        zip(expected.neighbors.tolist(), expected.neighbor_distances.tolist(), strict=True)
    ):
        others = [item for item in found[query] if item.row != query][:7]
        assert [item.row for item in others] == neighbors
        assert [item.distance for item in others] == distances


def test_images_are_embedded_as_in_an_evaluation(
    run: Path, bundle: Path, glyphs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file to the embedding, with onnxruntime and with torch."""
    read = read_bundle(bundle)
    config = load_config(RunFolder(run).config_path)
    context = open_context(config, Topology(), Comm.single(), discard)
    rows = context.rows_of("test")[:5]
    batches = [
        context.transform.evaluation(
            torch.from_numpy(_pixels(ShardReader(context.index).read(row)))
        )
        for row in rows.tolist()
    ]
    for runtime in ("onnxruntime", "torch"):
        found = embed_images(read, torch.stack(batches), runtime)  # type: ignore[arg-type]
        torch.testing.assert_close(found.norm(dim=1), torch.ones(5), rtol=0, atol=1e-5)
        torch.testing.assert_close(found, read.stored_ND[:5], rtol=0, atol=1e-5)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert embed_images(read, torch.stack(batches)).shape == (5, 12)
    with pytest.raises(ConfigError, match=r"pip install 'dml-dist\[export\]'`, or give --runtime"):
        embed_images(read, torch.stack(batches), "onnxruntime")


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).transpose(2, 0, 1).copy()


def test_other_programs_can_use_a_bundle(bundle: Path, glyphs: Path) -> None:
    """From an image file to its row of the index, by what the bundle's files say alone."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    written = json.loads((bundle / "preprocessing.json").read_text())
    table = pq.read_table(bundle / "gallery.parquet").to_pydict()
    names = json.loads((bundle / "labels.json").read_text())
    onnx = manifest["onnx"]
    session = onnxruntime.InferenceSession(
        str(bundle / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    source = read_index(glyphs)
    rows = source.rows("test")
    assert table["key"] == source.keys[rows].tolist()
    assert table["super_class"] == source.super_class[rows].tolist()
    assert table["tar_shard"] == [source.tar_shards[at] for at in source.tar_shard[rows]]
    assert [names[str(label)] for label in table["label"]] == [
        source.class_names[label] for label in source.label[rows]
    ]
    stored = faiss.read_index(str(bundle / "gallery.faiss")).reconstruct_n(0, len(rows))
    reader = ShardReader(source)
    for place in range(0, len(rows), 40):
        image = apply_steps(written, reader.read(int(rows[place])))
        (found,) = session.run([onnx["output"]], {onnx["input"]: image[None]})
        assert found.shape == (1, manifest["embedding_size"])
        # Pixels may differ by a level, since PIL rounds in another way.
        np.testing.assert_allclose(found[0], stored[place], rtol=0, atol=2e-3)


def test_images_that_are_queries_alone_are_not_in_the_gallery(
    run: Path, glyphs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "roles"
    shutil.copytree(glyphs, data)
    monkeypatch.setattr(export, "export_onnx", lambda *_: {"largest_difference": 0.0})
    overrides = [f"data.path={data}"]

    def set_roles(roles: list[str]) -> list[str]:
        """Give the test images roles in turn; return the keys of those that are in the gallery."""
        table = pq.read_table(glyphs / "index.parquet")
        rows = table.to_pylist()
        tests = [row for row in rows if row["split"] == "test"]
        for at, row in enumerate(tests):
            row["role"] = roles[at % len(roles)]
        pq.write_table(pa.Table.from_pylist(rows, table.schema), data / "index.parquet")
        return [row["key"] for row in tests if row["role"] in ("gallery", "both")]

    keys = set_roles(["query", "gallery", "both"])
    assert len(keys) == 160
    bundle = run_export(run, tmp_path / "bundle", QUIET, ExportOptions(), overrides)
    table = pq.read_table(bundle / "gallery.parquet").to_pydict()
    assert table["key"] == keys
    assert faiss.read_index(str(bundle / "gallery.faiss")).ntotal == 160
    gallery = json.loads((bundle / "manifest.json").read_text())["gallery"]
    assert (gallery["num_images"], gallery["thumbnails"]["number"]) == (160, 160)
    assert set_roles(["query"]) == []
    with pytest.raises(DataError, match="has queries only, no gallery images"):
        run_export(run, tmp_path / "other", QUIET, ExportOptions(), overrides)
    assert not (tmp_path / "other").exists()


def test_search_needs_the_bundle_alone(
    bundle: Path, images: list[Path], cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(bundle, moved)

    def refuse(*_: Any) -> bytes:
        raise AssertionError("the data set was read")

    monkeypatch.setattr(ShardReader, "read", refuse)
    code, output = cli("search", moved, *images, "--top", 12)
    assert code == 0, output
    for image in images:
        assert image.name in output
    assert f"picture: {tmp_path / 'search.png'}" in output
    with Image.open(tmp_path / "search.png") as picture:
        assert picture.width > 1500  # a query and ten neighbours
        assert picture.height > 6 * 150  # two lines for each of three queries
    monkeypatch.setattr(search_picture, "_MOST_LINES", 1)
    code, output = cli("search", moved, images[0], "--top", 300)
    assert code == 0, output
    assert "search-2.png (the first rows; the tables are complete)" in output
    assert re.search(r"│ 240 +│", output)
    assert not re.search(r"│ 241 +│", output)  # the gallery ends


def test_the_manifest_says_what_it_is(bundle: Path, run: Path) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["name"] == "exported"
    assert manifest["normalized"] is True
    assert manifest["run"]["checkpoint"].startswith("step_00000020")
    assert manifest["run"]["exported_with"]["versions"]["onnx"]
    assert manifest["metrics"]["trained"]["recall_at_1"] >= 0
    assert manifest["gallery"]["num_images"] == 240
    assert manifest["gallery"]["num_classes"] == 30
    assert manifest["gallery"]["thumbnails"]["number"] == 240
    assert 0 <= manifest["onnx"]["largest_difference"] <= 1e-4
    assert set(manifest["files"]) == {p.name for p in bundle.iterdir()} - {"manifest.json"}
    assert not list(bundle.parent.glob(".*"))
    assert (manifest["embedding_size"], manifest["distance"]) == (12, "cosine")
    assert manifest["model"]["embedding_size"] == 12
    assert (manifest["run"]["seed"], manifest["run"]["step"]) == (0, 20)
    assert manifest["run"]["split"] == "test"
    assert faiss.read_index(str(bundle / "gallery.faiss")).d == 12


def test_wrong_exports(run: Path, cli: Cli, tmp_path: Path, glyphs: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    empty = tmp_path / "empty-run"
    RunFolder.create(empty, (run / "config.yaml").read_text(), name="x", seed=0)
    cases = [
        ((run, "--out", taken), "a bundle needs a new folder"),
        ((tmp_path, "--out", "new"), "is not the folder of a run"),
        ((empty, "--out", "new"), "there is no checkpoint in"),
        ((run, "--out", "new", "--checkpoint", "step_9"), "give best, last or one of"),
        ((run, "--out", "new", "--split", "validation"), "holds out no classes"),
        ((run, "--out", "new", "--split", "dev"), "no image belongs to the split 'dev'"),
        ((run, "--out", "new", "--set", "model.embedding_size=3"), "leave these changes out"),
    ]
    for arguments, words in cases:
        code, output = cli("export", *arguments)
        assert code == 2, (arguments, output)
        assert words in output
    assert [path.name for path in taken.iterdir()] == ["file"]
    assert not list(tmp_path.glob("*new*"))
    assert not list(tmp_path.glob(".*"))


def test_a_missing_package_names_the_extra(
    run: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    code, output = cli("export", run, "--out", "new")
    assert code == 2
    assert "pip install 'dml-dist[export]'" in output


def test_a_failing_export_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(Exception, match="no such operator"):
        run_export(run, tmp_path / "new", QUIET, ExportOptions())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("file", "keys"),
    [
        ("preprocessing.json", ("transform",)),
        ("manifest.json", ("model", "backbone")),
    ],
)
def test_a_bundle_runs_no_code_unless_it_is_trusted(
    bundle: Path, images: list[Path], cli: Cli, tmp_path: Path, file: str, keys: tuple[str, ...]
) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(bundle, hostile)
    values = json.loads((hostile / file).read_text())
    section = values
    for key in keys[:-1]:
        section = section[key]
    # The target needs no file beside the bundle.
    section[keys[-1]] = {"name": "custom", "target": "os:system", "options": {"command": "touch x"}}
    (hostile / file).write_text(json.dumps(values))
    manifest = json.loads((hostile / "manifest.json").read_text())
    manifest["files"] = {}
    (hostile / "manifest.json").write_text(json.dumps(manifest))
    code, output = cli("search", hostile, images[0], "--runtime", "torch")
    assert code == 2, output
    assert ".target: os:system" in output
    assert "--trust" in output
    assert not (tmp_path / "x").exists()
    cli("search", hostile, images[0], "--runtime", "torch", "--trust")
    assert (tmp_path / "x").exists()


def test_a_bundle_has_a_plain_index_alone(
    bundle: Path, images: list[Path], cli: Cli, tmp_path: Path
) -> None:
    hostile = tmp_path / "hostile"
    shutil.copytree(bundle, hostile)
    faiss.write_index(faiss.IndexIDMap(faiss.IndexFlatL2(12)), str(hostile / "gallery.faiss"))
    manifest = json.loads((hostile / "manifest.json").read_text())
    manifest["files"] = {}
    (hostile / "manifest.json").write_text(json.dumps(manifest))
    code, output = cli("search", hostile, images[0])
    assert code == 2, output
    assert "gallery.faiss begins with b'IxMp', not with b'IxF2'" in " ".join(output.split())


def test_a_run_folder_that_names_code_says_so(run: Path, cli: Cli, tmp_path: Path) -> None:
    own = tmp_path / "run"
    shutil.copytree(run, own, ignore=shutil.ignore_patterns("checkpoints"))
    said = io.StringIO()
    say_if_code(own, Console(file=said))
    assert not said.getvalue()
    text = (own / "config.yaml").read_text()
    start = text.index("\nloss:")
    end = text.index("\n", start + 1)
    while text[end + 1] == " ":
        end = text.index("\n", end + 1)
    (own / "config.yaml").write_text(
        text[:start]
        + "\nloss: {name: custom, target: 'tests.custom_examples:Nothing', options: {}}"
        + text[end:]
    )
    for command in (("report", own), ("evaluate", own), ("export", own, "--out", "bundle")):
        _, output = cli(*command)
        assert "config.yaml names code (loss.target: tests.custom_examples:Nothing)" in output


def test_wrong_searches(bundle: Path, images: list[Path], cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken.png").touch()
    damaged = tmp_path / "damaged"
    shutil.copytree(bundle, damaged)
    with open(damaged / "gallery.faiss", "r+b") as file:
        file.seek(100)
        file.write(b"\xff\xff")
    broken = tmp_path / "broken"
    shutil.copytree(bundle, broken)
    (broken / "model.onnx").unlink()
    newer = tmp_path / "newer"
    newer.mkdir()
    (newer / "manifest.json").write_text('{"format_version": 99}')
    image = images[0]
    cases = [
        ((bundle, "text.jpg"), "text.jpg cannot be decoded"),
        ((bundle, "gone.png"), "the image gone.png cannot be read: No such file"),
        ((bundle, "empty"), "the image empty cannot be read: Is a directory"),
        (("empty", image), "it is empty"),
        (("nowhere", image), "it does not exist"),
        ((damaged, image), "gallery.faiss of the bundle"),
        ((broken, image), "is missing since the export"),
        ((newer, image), "has format 99, but this version of dml-dist reads format 1"),
        ((bundle, image, "--out", "taken.png"), "taken.png exists"),
        ((bundle, image, "--out", "picture.jpg"), "must name a PNG file"),
        ((bundle, image, "--out", "no/picture.png"), "no does not exist"),
        ((bundle, image, "--top", "0"), "top"),
    ]
    for arguments, words in cases:
        code, output = cli("search", *arguments)
        assert code == 2, (arguments, output)
        assert words in " ".join(output.split()), output
    assert not (tmp_path / "search.png").exists()
