"""Commands on data sets: import, index, verify."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError
from rich.console import Console

from dml_dist.config.base import Section
from dml_dist.config.data import (
    CacheConfig,
    Cars196Config,
    CUB200Config,
    DataConfig,
    DatasetConfig,
    FolderConfig,
    GlyphsConfig,
    InShopConfig,
    SOPConfig,
    StoredImagesSection,
    TableConfig,
)
from dml_dist.config.shape import is_resumable
from dml_dist.data.index import INDEX_NAME, Index, import_description
from dml_dist.errors import ConfigError, DataError
from dml_dist.runtime.progress import Display, phase
from dml_dist.urls import is_url, local_path

_SECTIONS: dict[str, type[Section]] = {
    "glyphs": GlyphsConfig,
    "folder": FolderConfig,
    "table": TableConfig,
    "sop": SOPConfig,
    "cub200": CUB200Config,
    "cars196": Cars196Config,
    "inshop": InShopConfig,
}
# Field of SplitConfig -> how it is given.
_RULE_OPTIONS = {"train": "--split", "by": "--by", "order": "--order", "seed": "--seed"}


def dataset_from_options(
    name: str, options: Mapping[str, Any], split: Mapping[str, Any]
) -> DatasetConfig:
    """Return the configuration of a data set from command-line options, None where not given.

    Raises:
        ConfigError: If an option is missing, does not belong to the data set or is out of range.
    """
    given = {key: value for key, value in options.items() if value is not None}
    rule = {key: value for key, value in split.items() if value is not None}
    known = _SECTIONS[name].model_fields
    seed = given.get("seed")
    if "split" in known:
        given.pop("seed", None)
        _check_rule(name, rule)
        if rule:
            given["split"] = rule
    elif set(rule) - {"seed"}:
        raise ConfigError(
            f"data import {name}: the split is part of the data set; got a rule for "
            f"{', '.join(sorted(set(rule) - {'seed'}))}; leave it out"
        )
    unknown = sorted(set(given) - set(known)) + (
        ["seed"] if seed is not None and not {"seed", "split"} & set(known) else []
    )
    if unknown:
        raise ConfigError(
            f"data import {name}: got {', '.join(dict.fromkeys(unknown))}, which this data set "
            f"does not have; it has {', '.join(sorted(set(known) - {'name'}))}"
        )
    try:
        adapter: TypeAdapter[DatasetConfig] = TypeAdapter(DatasetConfig)
        return adapter.validate_json(json.dumps({"name": name, **given}))
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(part) for part in item['loc'][1:])}: {item['msg']}"
            for item in error.errors()
        ]
        raise ConfigError(f"data import {name}: " + "; ".join(lines)) from None


def _check_rule(name: str, rule: Mapping[str, Any]) -> None:
    """Refuse options of a split that another one leaves without effect."""
    given = [option for field, option in _RULE_OPTIONS.items() if field in rule]
    if "file" in rule and given:
        raise ConfigError(
            f"data import {name}: --split-file decides on the split alone, got also "
            f"{', '.join(given)}; leave out one or the other"
        )
    if "seed" in rule and rule.get("order") != "seeded":
        raise ConfigError(
            f"data import {name}: --seed {rule['seed']} has no effect on a split in sorted order; "
            "give --order seeded too, or leave out --seed"
        )


def import_to(dataset: DatasetConfig, out: Path, console: Console) -> Index:
    """Import a data set into tar shards and an index, with a progress bar."""
    from dml_dist.data.datasets import build_importer
    from dml_dist.data.import_summary import read_summary
    from dml_dist.data.write_shards import import_dataset

    if is_url(out):
        raise ConfigError(
            f"data import writes into a folder of this machine, got the URL {out}; import into "
            "one, then upload it"
        )
    start = time.monotonic()
    stored = dataset if isinstance(dataset, StoredImagesSection) else StoredImagesSection()
    with Display(console) as display:
        index = import_dataset(
            build_importer(dataset),
            out,
            max_side=stored.max_side,
            on_broken=stored.on_broken,
            description=describe(dataset),
            progress=lambda done, total: display(phase("write shards", done, total)),
        )
    for split in sorted(set(index.split.tolist()), key=lambda name: (name != "train", name)):
        rows = index.rows(split)
        num_classes = len(np.unique(index.label[rows]))
        _say(console, f"{split}: {len(rows):,} images of {num_classes:,} classes")
    summary = read_summary(out)
    for line in [] if summary is None else summary.lines(out):
        _say(console, line)
    console.print(
        f"{len(index):,} images of {len(index.class_names):,} classes in "
        f"{len(index.tar_shards)} tar shards, {time.monotonic() - start:.1f} s: {out}",
        highlight=False,
        soft_wrap=True,
    )
    return index


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe(dataset: DatasetConfig) -> str:
    """Return the text by which shards tell which data set they were made from, paths left out."""
    fields = {
        name: value
        for name, value in dataset.model_dump(mode="json").items()
        if not is_resumable(type(dataset).model_fields[name])
        and not (name == "max_side" and value is None)  # imports without it have no such word
    }
    return json.dumps(fields, sort_keys=True)


def require_same_dataset(config: DataConfig) -> None:
    """Refuse shards that were imported from another data set than the configured one.

    Raises:
        DataError: If they were; shards that were indexed by hand do not tell.
    """
    path = Path(config.path)
    imported = import_description(path)
    if config.dataset is not None and imported and imported != describe(config.dataset):
        raise DataError(
            f"data.path {path} holds shards of another data set than data.dataset says: imported "
            f"{imported}, configured {describe(config.dataset)}; give another data.path, or take "
            "the change of data.dataset back"
        )


def require_index(config: DataConfig) -> None:
    """Refuse a folder that nothing was imported into yet."""
    if not (Path(config.path) / INDEX_NAME).exists():
        raise DataError(
            f"data.path needs {INDEX_NAME} before several ranks start under torchrun, "
            f"{config.path} has none; import first, with `dml-dist data import`"
        )


def ensure_imported(config: DataConfig, console: Console) -> None:
    """Import the configured data set where `data.path` has no index yet.

    Raises:
        DataError: If there is no index and no data set to import.
    """
    path = Path(config.path)
    if (path / INDEX_NAME).exists():
        require_same_dataset(config)
        return
    if config.dataset is None:
        shards = sorted(path.glob("*.tar")) if path.is_dir() else []
        cure = (
            f"index its {len(shards)} tar files with `dml-dist data index {path}`"
            if shards
            else "correct data.path, or say in data.dataset what is to be imported there"
        )
        raise DataError(f"data.path needs {INDEX_NAME}, {path} has none; {cure}")
    import_to(config.dataset, path, console)


def index_folder(location: str, split: str, console: Console) -> None:
    """Index tar shards that were made elsewhere.

    Raises:
        ConfigError: If the location is a URL: nothing is written there.
    """
    from dml_dist.data.index import build_index

    folder = local_path(location)
    if folder is None:
        raise ConfigError(
            f"data index writes {INDEX_NAME} beside the tar shards, got the URL {location}; index "
            f"them in a folder of this machine, then upload {INDEX_NAME} to the others"
        )
    index = _with_bar("index", console, lambda report: build_index(folder, split, report))
    console.print(
        f"{len(index):,} images of {len(index.class_names):,} classes indexed: "
        f"{folder / INDEX_NAME}",
        highlight=False,
        soft_wrap=True,
    )


def verify_folder(location: str, console: Console) -> bool:
    """Read every sample, print each problem, and tell whether there was none.

    Tar shards of a URL are copied into the cache of `data.cache`'s defaults, one by one.
    """
    from dml_dist.data.remote_shards import open_index
    from dml_dist.data.verify import verify, verify_remote

    folder = local_path(location)
    if folder is not None:
        result = _with_bar("verify", console, lambda report: verify(folder, report))
    else:
        index = open_index(location, CacheConfig())
        result = _with_bar("verify", console, lambda report: verify_remote(index, report))
    for problem in result.problems:
        console.print(f"problem: {problem}", highlight=False, markup=False, soft_wrap=True)
    verdict = f"{len(result.problems)} problems" if result.problems else "all as the index says"
    console.print(
        f"{result.num_samples:,} samples, {result.num_bytes / 2**20:,.1f} MiB: {verdict}: "
        f"{folder or location}",
        highlight=False,
        soft_wrap=True,
    )
    return not result.problems


def _with_bar(
    title: str, console: Console, work: Callable[[Callable[[int, int], None]], Any]
) -> Any:
    with Display(console) as display:
        return work(lambda done, total: display(phase(title, done, total)))
