"""What the runs of a comparison are: the configuration of each, and what tells two of them apart.

compare.yaml                 the resolved configuration of the comparison
references.yaml              published rows, as they were when it began
search/METHOD/trial-N/       the run of a trial; trial-N.json beside it: values and outcome
runs/METHOD-seed-S/          the run folders
report/                      the page, its figures, tables as CSV
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dml_dist.config.load import Difference, differing_paths, dump_config, parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.config.study import CompareConfig
from dml_dist.config.yaml_text import read_yaml
from dml_dist.errors import ConfigError
from dml_dist.files import read_json

# What may change while a comparison goes on: it says where and how fast, not what is computed.
_FREE = (
    *("launch", "loggers", "compare.parallel", "compare.references"),
    *("compare.bases", "compare.axis"),
    *("data.path", "data.cache", "data.dataset.source", "data.dataset.on_broken"),
    *("data.loader_workers", "data.prefetch", "data.decoded_cache_mb"),
    *("evaluation.backend", "evaluation.memory_mb"),
)
# What all methods share.
_SHARED = (
    *("name", "seed", "compare", "validation", "evaluation", "launch", "loggers"),
    *("data.path", "data.cache", "data.dataset", "data.train_split", "data.test_split"),
    *("train.steps", "train.epochs", "train.global_batch_size"),
)


@dataclass(frozen=True)
class ComparisonFolder:
    """Where the parts of a comparison are."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "compare.yaml"

    @property
    def references_path(self) -> Path:
        """The published rows."""
        return self.path / "references.yaml"

    @property
    def report_dir(self) -> Path:
        """The folder of the page, its figures and tables."""
        return self.path / "report"

    def run(self, method: str, seed: int) -> Path:
        """The folder of a run."""
        return self.path / "runs" / f"{method}-seed-{seed}"

    def trial(self, method: str, number: int) -> Path:
        """The folder of a trial's run; its outcome stands beside it, with the suffix .json."""
        return self.path / "search" / method / f"trial-{number}"

    def trials(self, method: str) -> list[dict[str, Any]]:
        """Return the outcomes of a method's trials, in order: values, map_at_r or problem."""
        files = sorted(
            (self.path / "search" / method).glob("trial-*.json"),
            key=lambda file: int(file.stem.rpartition("-")[2]),
        )
        return [read_json(file) for file in files]


def compare_section(config: RunConfig) -> CompareConfig:
    """Return the section `compare` of a configuration.

    Raises:
        ConfigError: If there is none.
    """
    if config.compare is None:
        raise ConfigError(
            f"required the section compare, with methods and seeds, got none in {config.name}; "
            "`dml-dist config --explain compare` describes it, `dml-dist train` makes a single run"
        )
    return config.compare


def method_config(config: RunConfig, method: str) -> RunConfig:
    """Return the configuration of a method: a run's, without the section `compare`.

    Raises:
        ConfigError: If its changes are not valid, or touch what all methods share.
    """
    section = compare_section(config)
    found = _changed(config, section.methods[method], f"method {method} of {config.name}")
    plain = config.model_copy(update={"compare": None})
    touched = [str(one) for one in differing_paths(plain, found) if _is_below(one.path, _SHARED)]
    if touched:
        raise ConfigError(
            f"compare.methods.{method}: data, splits, validation, evaluation, batch size and steps "
            f"must be the same for all methods, got {'; '.join(touched)}; change them for all"
        )
    return found


def run_config(
    config: RunConfig, method: str, seed: int, values: Mapping[str, float] | None = None
) -> RunConfig:
    """Return the configuration of one run.

    Args:
        config: The comparison's.
        method: One of its methods.
        seed: The run's seed.
        values: Path -> value that was found for the method.
    """
    found = _with_values(method_config(config, method), values or {}, method)
    return found.model_copy(update={"name": f"{method}-seed-{seed}", "seed": seed})


def trial_config(
    config: RunConfig, method: str, number: int, values: Mapping[str, float]
) -> RunConfig:
    """Return the configuration of a trial: what it is judged by are validation classes alone.

    Its test split is `validation`, so no test class is ever read. It runs on one process.
    """
    search = compare_section(config).search
    assert search is not None
    found = _with_values(method_config(config, method), values, method)
    return found.model_copy(
        update={
            "name": f"{method}-trial-{number}",
            "data": found.data.model_copy(update={"test_split": "validation"}),
            "train": found.train.model_copy(update={"steps": search.steps}),
            "evaluation": found.evaluation.model_copy(
                update={
                    "evaluate_test_every": None,
                    "metrics": (),
                    "definitions": (),
                    "save_embeddings": False,
                }
            ),
            "checkpoint": found.checkpoint.model_copy(update={"keep": 1}),
            "launch": found.launch.model_copy(update={"launcher": "inprocess"}),
            "loggers": (),
        }
    )


def searched_paths(config: RunConfig, method: str) -> list[str]:
    """Return the paths that are searched for a method."""
    search = compare_section(config).search
    if search is None:
        return []
    return [path for path in search.space if path not in search.without.get(method, ())]


def value_at(config: RunConfig, path: str) -> Any:
    """Return the plain value at a dotted path of a configuration; None where there is none."""
    value: Any = config
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def axis_values(config: RunConfig) -> dict[str, list[tuple[float, str]]]:
    """Return the lines of `compare.axis`: value of its field and method of each point, rising.

    Raises:
        ConfigError: If the field of a method is no number.
    """
    axis = compare_section(config).axis
    if axis is None:
        return {}
    lines = {}
    for line, methods in axis.lines.items():
        points = []
        for method in methods:
            value = value_at(method_config(config, method), axis.path)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(
                    f"compare.axis: required a number at {axis.path} in every method of a line, "
                    f"got {value} in {method}"
                )
            points.append((float(value), method))
        lines[line] = sorted(points)
    return lines


def digest(config: RunConfig) -> str:
    """Return what tells a run from others: a hash of all that decides on its result."""
    plain = read_yaml(dump_config(config), "the configuration").value
    kept = [pair for pair in _leaves(plain, "") if not _is_below(pair[0], _FREE)]
    return hashlib.sha256(json.dumps(kept).encode()).hexdigest()[:16]


def refused_differences(saved: RunConfig, config: RunConfig) -> list[Difference]:
    """Return in what a comparison may not go on differently, mappings cut to what differs."""
    result = []
    for one in differing_paths(saved, config):
        if _is_below(one.path, _FREE):
            continue
        if isinstance(one.old, dict) and isinstance(one.new, dict):
            for key in dict.fromkeys([*one.old, *one.new]):
                old, new = one.old.get(key), one.new.get(key)
                if old != new:
                    result.append(replace(one, path=f"{one.path}.{key}", old=old, new=new))
        else:
            result.append(one)
    return result


def _with_values(config: RunConfig, values: Mapping[str, float], method: str) -> RunConfig:
    # Seventeen digits read back as the same number.
    changes = [f"{path}={value!r}" for path, value in values.items()]
    return _changed(config, changes, f"method {method} with {', '.join(changes)}")


def _changed(config: RunConfig, changes: list[str] | tuple[str, ...], source: str) -> RunConfig:
    plain = read_yaml(dump_config(config), source).value
    return parse_config({**plain, "compare": None}, changes, source)


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _leaves(value[key], f"{path}.{key}" if path else key)
    else:
        yield path, value


def _is_below(path: str, places: tuple[str, ...]) -> bool:
    return any(path == place or path.startswith(f"{place}.") for place in places)
