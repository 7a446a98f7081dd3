"""Import, indexing and verification of data sets, for the command line and for runs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    SOPShapeConfig,
    StoredImagesSection,
    TableConfig,
)
from dml_dist.config.schema import RunConfig
from dml_dist.config.shape import is_resumable
from dml_dist.data.index import INDEX_NAME, Index, import_description
from dml_dist.errors import ConfigError, DataError
from dml_dist.runtime.progress import Display, phase
from dml_dist.terminal import say
from dml_dist.urls import has_secret, is_url, local_path, shown_url

if TYPE_CHECKING:
    from dml_dist.data.tar_shard import OnBroken

_SECTIONS: dict[str, type[Section]] = {
    "glyphs": GlyphsConfig,
    "sop_shape": SOPShapeConfig,
    "folder": FolderConfig,
    "table": TableConfig,
    "sop": SOPConfig,
    "cub200": CUB200Config,
    "cars196": Cars196Config,
    "inshop": InShopConfig,
}
# Field of SplitConfig -> command-line option.
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
            f"data import {name}: this data set has an official split, so the options for "
            f"{', '.join(sorted(set(rule) - {'seed'}))} have no effect; leave them out"
        )
    unknown = sorted(set(given) - set(known)) + (
        ["seed"] if seed is not None and not {"seed", "split"} & set(known) else []
    )
    if unknown:
        raise ConfigError(
            f"data import {name}: this data set has no option "
            f"{', '.join(dict.fromkeys(unknown))}; it has "
            f"{', '.join(sorted(set(known) - {'name'}))}"
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
    """Refuse split options that have no effect because of another option."""
    given = [option for field, option in _RULE_OPTIONS.items() if field in rule]
    if "file" in rule and given:
        raise ConfigError(
            f"data import {name}: --split-file sets the whole split and cannot be combined "
            f"with {', '.join(given)}; leave out one or the other"
        )
    if "seed" in rule and rule.get("order") != "seeded":
        raise ConfigError(
            f"data import {name}: --seed {rule['seed']} has no effect on a split in sorted order; "
            "give --order seeded too, or leave out --seed"
        )


def import_to(
    dataset: DatasetConfig, out: Path, console: Console, *, samples_per_shard: int = 1000
) -> Index:
    """Import a data set into tar shards and an index, with a progress bar."""
    from dml_dist.data.datasets import build_importer
    from dml_dist.data.write_shards import import_dataset

    if is_url(out):
        raise ConfigError(
            f"data import cannot write to the URL {shown_url(str(out))}; import into a local "
            "folder, then upload it"
        )
    start = time.monotonic()
    stored = dataset if isinstance(dataset, StoredImagesSection) else StoredImagesSection()
    with Display(console) as display:
        index = import_dataset(
            build_importer(dataset),
            out,
            samples_per_shard=samples_per_shard,
            max_side=stored.max_side,
            on_broken=stored.on_broken,
            description=describe(dataset),
            progress=lambda done, total: display(phase("write shards", done, total)),
        )
    _print_counts(index, console)
    console.print(
        f"{len(index):,} images of {len(index.class_names):,} classes in "
        f"{len(index.tar_shards)} tar shards, {time.monotonic() - start:.1f} s: {out}",
        highlight=False,
        soft_wrap=True,
    )
    return index


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe(dataset: DatasetConfig) -> str:
    """Return a description of a data set without its paths, to be kept with the tar shards."""
    fields = {
        name: value
        for name, value in dataset.model_dump(mode="json").items()
        if not is_resumable(type(dataset).model_fields[name])
        and not (name == "max_side" and value is None)  # Older imports have no such field.
    }
    return json.dumps(fields, sort_keys=True)


def warn_of_secrets(config: RunConfig, console: Console) -> None:
    """Warn of a password or token in a URL: the configuration keeps it."""
    places = {
        "data.path": config.data.path,
        **{
            f"loggers.{at}.tracking_uri": getattr(logger, "tracking_uri", None) or ""
            for at, logger in enumerate(config.loggers)
        },
    }
    for place, url in places.items():
        if has_secret(url):
            say(
                console,
                f"warning: {place} {shown_url(url)} holds a password or token, which config.yaml "
                "keeps, readable by you alone; give credentials by environment variables or the "
                "configuration files of fsspec, s3fs, gcsfs or MLflow instead",
            )


def require_same_dataset(config: DataConfig) -> None:
    """Refuse shards that were imported from another data set than the configured one.

    Raises:
        DataError: If they were; unknown for tar shards of other programs.
    """
    path = Path(config.path)
    imported = import_description(path)
    if config.dataset is not None and imported and imported != describe(config.dataset):
        raise DataError(
            f"data.path {path} holds another data set than data.dataset: {imported} was imported, "
            f"{describe(config.dataset)} is configured; use another data.path, or undo the change "
            "of data.dataset"
        )


def require_index(config: DataConfig) -> None:
    """Refuse a folder that nothing was imported into yet."""
    if not (Path(config.path) / INDEX_NAME).exists():
        raise DataError(
            f"data.path {config.path} has no {INDEX_NAME}, and ranks started by torchrun do not "
            "import data; import it first with `dml-dist data import`"
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
        advice = (
            f"index its {len(shards)} tar files with `dml-dist data index {path}`"
            if shards
            else "correct data.path, or set data.dataset to import one"
        )
        raise DataError(f"data.path {path} has no {INDEX_NAME}; {advice}")
    import_to(config.dataset, path, console)


def index_folder(
    location: str, split: str | None, console: Console, *, on_broken: OnBroken = "raise"
) -> None:
    """Index existing tar shards.

    Raises:
        ConfigError: If the location is a URL: nothing is written there.
    """
    from dml_dist.data.build_index import build_index

    folder = local_path(location)
    if folder is None:
        raise ConfigError(
            f"data index cannot write {INDEX_NAME} to the URL {shown_url(location)}; index the "
            f"tar shards in a local folder, then upload {INDEX_NAME}"
        )
    with Display(console) as display:
        index = build_index(
            folder,
            split,
            lambda name, done, total: display(phase(name, done, total)),
            on_broken=on_broken,
        )
    _print_counts(index, console)
    if len(splits := set(index.split.tolist())) == 1:
        _print(
            console,
            f"every image is in the split {splits.pop()!r}; training also evaluates "
            "data.test_split: put tar shards into folders train/, val/ and test/, or give `split` "
            "in the .json members",
        )
    console.print(
        f"{len(index):,} images of {len(index.class_names):,} classes indexed: "
        f"{folder / INDEX_NAME}",
        highlight=False,
        soft_wrap=True,
    )


def _print_counts(index: Index, console: Console) -> None:
    """Print the size of each split and the summary."""
    from dml_dist.data.import_summary import read_summary

    for split in sorted(set(index.split.tolist()), key=lambda name: (name != "train", name)):
        rows = index.rows(split)
        num_classes = len(np.unique(index.label[rows]))
        _print(console, f"{split}: {len(rows):,} images of {num_classes:,} classes")
    summary = read_summary(index.root)
    for line in [] if summary is None else summary.lines(index.root):
        _print(console, line)


def verify_folder(location: str, console: Console) -> bool:
    """Read every sample, print each problem, and return whether there was none.

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
    for line in result.notes:
        console.print(f"note: {line}", highlight=False, markup=False, soft_wrap=True)
    for problem in result.problems:
        console.print(f"problem: {problem}", highlight=False, markup=False, soft_wrap=True)
    verdict = (
        f"{len(result.problems)} problems" if result.problems else "all match the index and decode"
    )
    console.print(
        f"{result.num_samples:,} samples, {result.num_bytes / 2**20:,.1f} MiB: {verdict}: "
        f"{folder or shown_url(location)}",
        highlight=False,
        soft_wrap=True,
    )
    return not result.problems


def _with_bar(
    title: str, console: Console, work: Callable[[Callable[[int, int], None]], Any]
) -> Any:
    with Display(console) as display:
        return work(lambda done, total: display(phase(title, done, total)))
