"""A run folder like a real one, made in an instant, and a reader of report pages."""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dml_dist.report import GalleryClass, GalleryNeighbor, GalleryQuery, write_gallery
from dml_dist.report.proxy_diagnostics import ProxyFacts, write_proxy_facts
from dml_dist.runs.artifacts import (
    ClassTable,
    PerClass,
    SavedEmbeddings,
    write_class_table,
    write_embeddings,
)
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import RecordWriter

EVIL = '<script>alert("x")</script>'


def scores(recall: float, num_queries: int = 600) -> dict[str, Any]:
    return {
        "recall_at_1": recall,
        "recall_at_10": min(1.0, recall + 0.1),
        "map_at_r": recall / 2,
        "r_precision": recall / 1.5,
        "num_queries": num_queries,
        "num_lone_queries": 3,
    }


def begin(run: RunFolder, **values: Any) -> int:
    return run.begin_attempt(
        **{
            "world_size": 2,
            "launcher": "ray",
            "device": "2 x cpu",
            "command": "dml-dist train x.yaml",
        }
        | values
    )


def add_records(run: RunFolder, attempt: int = 1, num_steps: int = 500) -> None:
    with RecordWriter(run.records("steps"), attempt) as steps:
        for step in range(10, num_steps + 1, 10):
            steps.write(step, loss=6.0 * 0.99**step, lr=1e-3, images_per_second=2000.0 + step)
    with RecordWriter(run.records("evaluations"), attempt) as evaluations:
        evaluations.write(0, split="test", protocol="untrained", **scores(0.05))
        for step in range(100, num_steps + 1, 100):
            held_out = scores(0.9 - 0.001 * abs(step - 300), 60)
            evaluations.write(step, split="validation", **held_out)
            evaluations.write(step, split="test", protocol="literature", **scores(step / 1000))
        evaluations.write(num_steps, split="test", protocol="final", **scores(0.8734))


def picture(seed: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


def encoded(seed: int, side: int, kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed, side)).save(file, kind)
    return file.getvalue()


def query(row: int, hits: str, class_name: str = "Z") -> GalleryQuery:
    neighbors = tuple(
        GalleryNeighbor(row + i + 1, class_name, 0.1 * i, hit == "+", picture(row + i + 1))
        for i, hit in enumerate(hits)
    )
    return GalleryQuery(row, class_name, picture(row), neighbors)


def new_run(path: Path) -> RunFolder:
    return RunFolder.create(path, f"name: demo\nseed: 7 # {EVIL}\n", name="demo", seed=7)


def write_classes(run: RunFolder, recall: list[float], super_class: str | None = None) -> None:
    """Write per_class.parquet: classes "class 0", "class 1" (EVIL), ... of 4 images each."""
    count, values = len(recall), np.array(recall)
    results = PerClass(
        label=np.arange(count),
        num_images=np.full(count, 4),
        num_queries=np.full(count, 4),
        recall_at_1=values,
        r_precision=values / 2,
        map_at_r=values / 3,
    )
    names = [EVIL if at == 1 else f"class {at}" for at in range(count)]
    write_class_table(run.per_class, ClassTable(results, names, [super_class] * count))


def write_vectors(run: RunFolder, num_classes: int, per_class: int = 4, width: int = 8) -> None:
    """Write embeddings.npz: a cloud around each class's direction."""
    generator = np.random.default_rng(5)
    labels = np.repeat(np.arange(num_classes), per_class)
    centers = generator.normal(size=(num_classes, width))
    vectors = centers[labels] + 0.3 * generator.normal(size=(len(labels), width))
    saved = SavedEmbeddings(vectors.astype(np.float32), np.arange(len(labels)), labels)
    write_embeddings(run.embeddings, saved)


def proxy_facts(num_classes: int = 30) -> ProxyFacts:
    """Return facts in which classes 2 and 3 are twins and two images of class 4 lie at 5."""
    generator = np.random.default_rng(6)
    similarity = generator.uniform(0.1, 0.5, num_classes).astype(np.float32)
    similarity[[2, 3]] = 0.987
    nearest = (np.arange(num_classes) + 1) % num_classes
    nearest[[2, 3]] = 3, 2
    images = np.repeat(np.arange(10), 4)
    found = images.copy()
    found[[16, 17]] = 5
    return ProxyFacts(
        names=np.array([f"proxy {at}" for at in range(num_classes)]),
        norms=generator.uniform(1, 2, (num_classes, 1)).astype(np.float32),
        drawn=np.arange(num_classes),
        nearest=nearest,
        similarity=similarity,
        image_class=images,
        image_nearest=found,
    )


def make_run(path: Path) -> RunFolder:
    run = new_run(path)
    begin(run)
    run.add_facts({"training classes": 11318, f"{EVIL}a": f"{EVIL}b", "parts": "32 + 32"})
    add_records(run)
    classes = [
        GalleryClass("weak", 0.25, 4, True, (query(40, "-+-", "weak"),)),
        GalleryClass("strong", 1.0, 4, False, (query(50, "+++", "strong"),)),
    ]
    queries = [query(10, "+-+"), query(20, "--+", EVIL), query(30, "+++")]
    write_gallery(path, queries, classes)
    write_classes(run, [0.0, 0.25, 0.5, 1.0, 1.0, 0.75])
    write_vectors(run, 6)
    write_proxy_facts(path, proxy_facts())
    run.finish(
        {
            "untrained": scores(0.05),
            "trained": scores(0.8734),
            "seconds": {"training": 31.4, "evaluation": 2.3, "total": 101.7},
            "images_per_second": 2093.4,
        }
    )
    return run


class Page(HTMLParser):
    """A page's elements, texts and open tags."""

    VOID = ("meta", "link", "img", "br", "wbr", "path", "use")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.raw = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(self.raw)
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    def classes(self) -> Counter[str]:
        return Counter(
            name for _, attributes in self.elements for name in attributes.get("class", "").split()
        )

    def table(self, section: str) -> list[list[str]]:
        """Return the texts of the cells of a section's tables, row by row, headers included."""
        (part,) = re.findall(rf'<section id="{section}">(.*?)</section>', self.raw, re.DOTALL)
        rows = re.findall(r"<tr[^>]*>(.*?)</tr>", part, re.DOTALL)
        cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
        return [[html.unescape(re.sub(r"<[^>]+>", "", cell)) for cell in row] for row in cells]
