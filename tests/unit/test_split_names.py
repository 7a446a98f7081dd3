"""Splits of foreign tar shards by the names of folders and files."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from dml_dist.data import pool
from dml_dist.data.build_index import build_index
from dml_dist.data.split_names import split_of_names
from dml_dist.runtime.datasets import index_folder
from tests.oracles_data import encoded_image, write_tar


@pytest.mark.parametrize(
    ("tar_shard", "key", "split"),
    [
        ("train/000.tar", "k", "train"),
        ("photos/Validation/000.tar", "k", "val"),
        ("test/train-000.tar", "k", "test"),
        ("imagenet-train-000000.tar", "k", "train"),
        ("cc_val000.tar", "k", "val"),
        ("TESTING_1.tar", "k", "test"),
        ("dev.tar", "test/1", "val"),
        ("all.tar", "Train/cat/1", "train"),
        ("all.tar", "train/cat/test/1", "test"),
        ("train_test.tar", "k", None),
        ("trains-1.tar", "contest/1", None),
        ("all.tar", "train", None),
    ],
)
def test_names(tar_shard: str, key: str, split: str | None) -> None:
    assert split_of_names(tar_shard, key) == split


@pytest.fixture(autouse=True)
def _one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_num_cores", lambda: 1)


def test_an_index_has_the_splits_of_folders(tmp_path: Path) -> None:
    for folder, seed in (("train", 0), ("val", 4), ("test", 8), ("more", 12)):
        members = []
        for at in range(seed, seed + 4):
            facts = b'{"label": 1, "split": "mine"}' if at == 3 else b'{"label": 1}'
            members += [(f"k{at}.png", encoded_image(at)), (f"k{at}.json", facts)]
        write_tar(tmp_path / folder / "0.tar", members)
    index = build_index(tmp_path, processes=1)
    counts = {name: int((index.split == name).sum()) for name in sorted(set(index.split))}
    assert counts == {"mine": 1, "test": 4, "train": 7, "val": 4}
    out = io.StringIO()
    index_folder(str(tmp_path), None, Console(file=out, width=200))
    text = out.getvalue()
    for split, number in counts.items():
        assert f"{split}: {number} images of 1 classes" in text
    assert "every image" not in text
    index = build_index(tmp_path, "all", processes=1)
    assert sorted(set(index.split)) == ["all", "mine"]


def test_one_split_is_said_when_indexing(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", encoded_image(0)), ("a.cls", b"1")])
    write_tar(tmp_path / "b.tar", [("b.png", encoded_image(1)[:60]), ("b.cls", b"1")])
    out = io.StringIO()
    index_folder(str(tmp_path), None, Console(file=out, width=300), on_broken="skip")
    assert "every image is in the split 'train'; training also evaluates" in out.getvalue()
    assert "skipped 1 broken images, all in" in out.getvalue()
    assert "  b.tar: key 'b': the image cannot be decoded" in out.getvalue()
