"""What the runs of a comparison are: methods, seeds, and the trials of its search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dml_dist.config.schema import RunConfig
from dml_dist.config.study import CompareConfig
from dml_dist.errors import ConfigError
from dml_dist.runs.study import (
    FREE,
    METHOD,
    StudyFolder,
    StudyKind,
    check_identity,
    value_at,
    with_changes,
    with_values,
)

COMPARE = StudyKind(
    name="compare",
    identity=("name", "seed", *METHOD),
    free=(*FREE, *(f"compare.{key}" for key in ("parallel", "references", "bases", "axis"))),
)


@dataclass(frozen=True)
class ComparisonFolder(StudyFolder):
    """Where the parts of a comparison are: a study's, and the published results."""

    kind: StudyKind = COMPARE

    @property
    def references_path(self) -> Path:
        """The published results, as they were when the comparison began."""
        return self.path / "references.yaml"


def compare_section(config: RunConfig) -> CompareConfig:
    """Return the section `compare` of a configuration.

    Raises:
        ConfigError: If there is none.
    """
    if config.compare is None:
        raise ConfigError(
            f"the configuration {config.name} has no section compare, with methods and seeds; "
            "`dml-dist config --explain compare` describes it, `dml-dist train` makes a single run"
        )
    return config.compare


def run_name(method: str, seed: int) -> str:
    """Return the name of a run, which is also its folder's."""
    return f"{method}-seed-{seed}"


def method_config(
    config: RunConfig, method: str, values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return the configuration of a method: a run's, without the section `compare`.

    Args:
        config: The comparison's.
        method: One of its methods.
        values: Path -> value of searched fields.

    Raises:
        ConfigError: If its changes or values are not valid, or change what methods share.
    """
    plain = config.model_copy(update={"compare": None})
    changes = compare_section(config).methods[method]
    found = with_changes(plain, changes, f"method {method} of {config.name}")
    check_identity(plain, found, METHOD, f"compare.methods.{method}")
    if values:
        found = with_values(found, values, f"method {method}")
        check_identity(plain, found, METHOD, f"compare.search.space ({', '.join(values)})")
    return found


def run_config(
    config: RunConfig, method: str, seed: int, values: Mapping[str, Any] | None = None
) -> RunConfig:
    """Return the configuration of one run.

    Args:
        config: The comparison's.
        method: One of its methods.
        seed: The run's seed.
        values: Path -> value that was found for the method.
    """
    found = method_config(config, method, values)
    return found.model_copy(update={"name": run_name(method, seed), "seed": seed})


def trial_config(
    config: RunConfig, method: str, number: int, values: Mapping[str, Any]
) -> RunConfig:
    """Return the configuration of a trial: it is judged by validation classes alone.

    Its test split is `validation`, so no test class is ever read. It runs on one process and
    evaluates nothing at its end: its value is that of its best validation.
    """
    search = compare_section(config).search
    assert search is not None
    found = method_config(config, method, values)
    evaluation = {"evaluate_test_every": None, "final": "none"}
    return found.model_copy(
        update={
            "name": f"{method}-trial-{number}",
            "data": found.data.model_copy(update={"test_split": "validation"}),
            "train": found.train.model_copy(update={"steps": search.steps}),
            "evaluation": found.evaluation.model_copy(update=evaluation),
            "checkpoint": found.checkpoint.model_copy(update={"keep": 1}),
            "launch": found.launch.model_copy(update={"launcher": "inprocess"}),
            "loggers": (),
        }
    )


def searched_paths(config: RunConfig, method: str) -> list[str]:
    """Return the paths that are searched for a method."""
    search = compare_section(config).search
    return search.paths_of(method) if search is not None else []


def axis_values(config: RunConfig) -> dict[str, list[tuple[float, str]]]:
    """Return the lines of `compare.axis`: value of its field and method of each point, rising.

    Raises:
        ConfigError: If the field is not a number in some method.
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
                    f"compare.axis.path: {axis.path} must be a number in every method of a line, "
                    f"but it is {value} in {method}; give the path of a number, or leave out the "
                    "method"
                )
            points.append((float(value), method))
        lines[line] = sorted(points)
    return lines
