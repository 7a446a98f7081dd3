"""What every importer must do; a test class of each inherits it."""

from __future__ import annotations

import io
import pickle
from abc import ABC, abstractmethod
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dml_dist.data.datasets import build_importer
from dml_dist.data.index import Index, read_index
from dml_dist.data.sample import IMAGE_EXTENSIONS, check_samples
from dml_dist.data.verify import verify
from dml_dist.data.write_shards import import_dataset


class ImporterSuite(ABC):
    """Behaviour that the shard writer, the dry run and training rely on."""

    @abstractmethod
    def config(self, folder: Path) -> Any:
        """Return the configuration of a small data set of at least 2 classes; may write files."""

    @pytest.fixture
    def dataset(self, tmp_path: Path) -> Any:
        folder = tmp_path / "raw"
        folder.mkdir()
        return self.config(folder)

    def test_samples_are_acceptable_and_always_the_same(self, dataset: Any) -> None:
        samples = build_importer(dataset).samples()
        check_samples(samples)
        assert list(samples) == list(build_importer(dataset).samples())
        assert len({repr(sample.source) for sample in samples}) == len(samples)

    def test_facts_are_the_counts(self, dataset: Any) -> None:
        importer = build_importer(dataset)
        facts = importer.facts()
        assert facts is not None
        assert facts.exact
        counts = Counter((sample.split, sample.class_name) for sample in importer.samples())
        for split in {split for split, _ in counts}:
            expected = sorted(n for (where, _), n in counts.items() if where == split)
            assert sorted(facts.class_sizes[split]) == expected
        assert sum(map(sum, facts.class_sizes.values())) == len(importer.samples())

    def test_sources_give_images_after_pickling(self, dataset: Any) -> None:
        for sample in build_importer(dataset).samples()[:10]:
            data, extension = pickle.loads(pickle.dumps(sample)).source.read()
            assert extension in IMAGE_EXTENSIONS
            assert data == sample.source.read()[0]
            with Image.open(io.BytesIO(data)) as image:
                image.load()

    def test_shards_hold_the_samples(self, dataset: Any, tmp_path: Path) -> None:
        importer = build_importer(dataset)
        index = import_dataset(importer, tmp_path / "out", samples_per_shard=7, processes=1)
        self.check_index(importer.samples(), index)
        self.check_index(importer.samples(), read_index(tmp_path / "out"))
        assert verify(tmp_path / "out", processes=1).problems == []

    def check_index(self, samples: Any, index: Index) -> None:
        by_key = {sample.key: sample for sample in samples}
        assert set(index.keys) == set(by_key)
        assert sorted(set(index.label.tolist())) == list(range(len(index.class_names)))
        for row, key in enumerate(index.keys):
            sample = by_key[key]
            data, extension = sample.source.read()
            assert index.class_names[index.label[row]] == sample.class_name
            assert index.split[row] == sample.split
            assert index.super_class[row] == (sample.super_class or "")
            assert index.role[row] == sample.role
            assert index.extension[row] == extension
            with Image.open(io.BytesIO(data)) as image:
                assert image.size == (index.width[row], index.height[row])
            path = index.root / index.tar_shards[index.tar_shard[row]]
            stored = np.memmap(path, mode="r")[index.offset[row] :][: index.length[row]]
            assert stored.tobytes() == data

    def test_facts_are_in_label_order(self, dataset: Any, tmp_path: Path) -> None:
        importer = build_importer(dataset)
        index = import_dataset(importer, tmp_path / "out", processes=1)
        facts = importer.facts()
        assert facts is not None
        for split, sizes in facts.class_sizes.items():
            counts = np.bincount(index.label[index.rows(split)])
            assert tuple(counts[counts > 0].tolist()) == sizes
