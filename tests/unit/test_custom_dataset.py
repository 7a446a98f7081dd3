"""A custom data set, from its configuration to readable shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dml_dist.config.data import CustomDatasetConfig
from dml_dist.data.datasets import build_importer
from dml_dist.data.decode import decode_image
from dml_dist.data.index import read_index
from dml_dist.data.reader import ShardReader
from dml_dist.data.sample import DatasetFacts, Importer, facts_of
from dml_dist.data.verify import verify
from dml_dist.data.write_shards import import_dataset
from dml_dist.errors import ConfigError
from tests.custom_examples import Stripes


def importer(target: str, **options: Any) -> Importer:
    return build_importer(CustomDatasetConfig(name="custom", target=target, options=options))


def test_custom_dataset_is_imported(tmp_path: Path) -> None:
    stripes = importer("tests.custom_examples:Stripes", num_classes=4, images_per_class=3)
    assert stripes.facts() is None  # it has none to give
    import_dataset(stripes, tmp_path, samples_per_shard=5, processes=2)
    assert verify(tmp_path, processes=1).problems == []
    index = read_index(tmp_path)
    assert index.class_names == ("period 2", "period 3", "period 4", "period 5")
    pairs = zip(index.keys, index.label, strict=True)
    assert {name: index.class_names[label] for name, label in pairs} == {
        f"stripes/{label}-{shift}": f"period {label + 2}"
        for label in range(4)
        for shift in range(3)
    }
    assert np.unique(index.label[index.rows("train")]).tolist() == [0, 2]
    reader = ShardReader(index)
    (row,) = np.flatnonzero(index.keys == "stripes/2-1")
    image = decode_image(reader.read(int(row)), "here")
    reader.close()
    assert image[0, 0, :8].tolist() == [255, 0, 0, 255, 255, 0, 0, 255]


class Counted(Stripes):
    """Stripes that know their sizes."""

    def facts(self) -> DatasetFacts:
        """Count the images of each class."""
        return facts_of(self.samples())


def test_custom_facts_are_used() -> None:
    facts = importer(f"{__name__}:Counted", num_classes=5).facts()
    assert facts == DatasetFacts({"test": (5, 5), "train": (5, 5, 5)}, exact=True)


def test_a_target_that_is_no_data_set_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"options must be arguments of .*Stripes, got \['sides'\]"
    ):
        importer("tests.custom_examples:Stripes", sides=3).samples()
    with pytest.raises(ConfigError, match=r"must give an object with samples\(\), .* gave \w+"):
        importer("tests.custom_examples:StripeSource", period=3, shift=0).samples()
