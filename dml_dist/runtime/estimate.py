"""The plan of a dry run before the data is imported, from counts that the data set knows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dml_dist.config.data import DatasetConfig, FolderConfig, OfficialSection, TableConfig
from dml_dist.config.schema import ClassesValidationConfig, RunConfig, ValidationConfig
from dml_dist.data.classes import split_classes
from dml_dist.data.datasets import build_importer
from dml_dist.data.index import INDEX_NAME, Index
from dml_dist.data.sample import DatasetFacts
from dml_dist.errors import DataError
from dml_dist.runtime.context import check_test_split
from dml_dist.train.run_plan import RunPlan, resolve


def check_before_import(config: RunConfig, world_size: int) -> None:
    """Raise what a run's plan would after the import, if the data set knows its exact counts.

    Raises:
        DmlDistError: Whatever does not fit.
    """
    dataset = config.data.dataset
    if dataset is None or (Path(config.data.path) / INDEX_NAME).exists():
        return
    facts = build_importer(dataset).facts()
    if facts is not None and facts.exact:
        estimate_plan(config, world_size)


def estimate_plan(config: RunConfig, world_size: int) -> tuple[RunPlan, str]:
    """Return the plan of a run without its data, and where the counts come from.

    Raises:
        DataError: If there is neither an index nor a data set that knows its counts.
        DmlDistError: Whatever does not fit, as with the data.
    """
    if config.data.dataset is None:
        raise DataError(
            f"data.path {config.data.path} has no index, and data.dataset is not set; correct "
            "data.path, or set data.dataset"
        )
    facts = build_importer(config.data.dataset).facts()
    if facts is None:
        raise DataError(
            f"data.dataset {config.data.dataset.name} does not know its counts before its import; "
            "import it with `dml-dist data import`, then repeat the dry run"
        )
    index = _index_without_images(facts, Path(config.data.path))
    check_test_split(config)
    index.rows(config.data.test_split)  # Raises when there is no such split.
    validation = _with_known_names(config.validation, index, config.data.train_split)
    split = split_classes(index, config.data, validation, config.seed)
    sizes = [
        np.unique(index.label[rows], return_counts=True)[1].tolist()
        for rows in (split.train_rows, split.validation_rows)
    ]
    plan = resolve(
        config,
        train_class_sizes=sizes[0],
        validation_class_sizes=sizes[1],
        world_size=world_size,
    )
    return plan, f"not imported yet: {_origin(config.data.dataset, facts)}"


def _origin(dataset: DatasetConfig, facts: DatasetFacts) -> str:
    if facts.exact:
        return "counts as the data set lists them"
    if isinstance(dataset, OfficialSection):
        return "published totals, class sizes estimated"
    if isinstance(dataset, FolderConfig | TableConfig):
        return "totals of data.dataset.expected, class sizes estimated; there is no source"
    return "counts estimated by the data set"


def _index_without_images(facts: DatasetFacts, root: Path) -> Index:
    """Return an index of the right counts without images: classes are named by split and number."""
    sizes = [size for split in facts.class_sizes.values() for size in split]
    splits = [split for split, of_split in facts.class_sizes.items() for _ in of_split]
    names = [
        f"{split} {i}" for split, counts in facts.class_sizes.items() for i in range(len(counts))
    ]
    labels = np.repeat(np.arange(len(sizes), dtype=np.int64), sizes)
    num_rows = len(labels)
    text = np.full(num_rows, "", dtype=object)
    number = np.zeros(num_rows, dtype=np.int64)
    return Index(
        root=root,
        tar_shards=("",),
        keys=text,
        tar_shard=number.astype(np.int32),
        offset=number,
        length=number,
        crc32=number.astype(np.uint32),
        extension=text,
        width=number.astype(np.int32),
        height=number.astype(np.int32),
        label=labels,
        class_names=tuple(names),
        super_class=text,
        split=np.repeat(np.array(splits, dtype=object), sizes),
        role=np.full(num_rows, "both", dtype=object),
    )


def _with_known_names(validation: ValidationConfig, index: Index, split: str) -> ValidationConfig:
    """Replace named classes by as many of the index, whose classes have no names yet."""
    if not isinstance(validation, ClassesValidationConfig):
        return validation
    labels = np.unique(index.label[index.rows(split)])[: len(validation.classes)]
    return ClassesValidationConfig(classes=tuple(index.class_names[label] for label in labels))
