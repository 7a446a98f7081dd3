"""What a study is on disk, and what tells its runs apart.

A study is a folder of runs. Each run's configuration differs from the study's in the *identity*
fields of the study's kind alone, and *free* fields may change while the study is in progress.

KIND.yaml                    the resolved configuration of the study
runs/NAME/                   the run folders
search/GROUP/trial-N/        the run of a trial; trial-N.json next to it: values and outcome
untrained/DIGEST.json        metrics of an untrained network, shared by the runs that begin with it
report/                      the page, its figures, tables as CSV
.lock                        held by the command that works on the study
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dml_dist.config.load import (
    Difference,
    differing_paths,
    dump_config,
    load_config,
    parse_config,
)
from dml_dist.config.schema import RunConfig
from dml_dist.config.search_space import DistributionConfig
from dml_dist.config.yaml_text import read_yaml
from dml_dist.errors import ConfigError, DataError
from dml_dist.files import lock_file, read_json, write_config_atomic, write_json_atomic


@dataclass(frozen=True)
class StudyKind:
    """What the configurations of one kind of study may differ in; a path includes all below it.

    Attributes:
        name: The section of the configuration, the command, and the name of the study's file.
        identity: Paths in which a run may differ from its study and from other runs.
        free: Paths that may change during the study: where and how fast. A path that is
            also below `identity` is not free.
    """

    name: str
    identity: tuple[str, ...]
    free: tuple[str, ...]

    def is_free(self, path: str) -> bool:
        """Whether a field may change without another result."""
        return is_below(path, self.free) and not is_below(path, self.identity)


FREE = (
    *("launch", "loggers", "train.micro_batch_size"),
    *("data.path", "data.cache", "data.dataset.source", "data.dataset.on_broken"),
    *("data.loader_workers", "data.prefetch", "data.decoded_cache_mb"),
    *("evaluation.backend", "evaluation.memory_mb"),
)
"""Fields that say where and how fast any run is made, not what it computes."""


METHOD = (
    *("model", "loss", "proxies", "nir", "projections", "optim", "schedule", "checkpoint"),
    *("data.batches", "data.transform"),
    *("train.backbone_warmup_epochs", "train.max_grad_norm"),
    *("train.precision", "train.log_every"),
)
"""Fields in which methods may differ: not data, validation, evaluation, batch size or steps."""


def digest(config: RunConfig, kind: StudyKind) -> str:
    """Return a hash of everything in a run's configuration that is not free."""
    return _hash([pair for pair in _fields(config) if not kind.is_free(pair[0])])


# The untrained network's metrics depend on these. Batches are not among them: they are drawn for
# training alone.
_UNTRAINED = (
    *("seed", "data", "model", "validation", "train.precision"),
    *("evaluation.recall_at", "evaluation.distance", "evaluation.batch_size"),
    *("evaluation.metrics", "evaluation.definitions"),
)


def untrained_digest(config: RunConfig, device: str, kind: str = "untrained") -> str:
    """Return a hash of everything that decides on the metrics of a run's untrained network.

    Args:
        config: The run's configuration.
        device: Type of the device, which decides on the precision.
        kind: What is measured of it.
    """
    without = (*FREE, "data.batches")
    kept = [
        pair
        for pair in _fields(config)
        if is_below(pair[0], _UNTRAINED) and not is_below(pair[0], without)
    ]
    return _hash([("kind", kind), ("device", device), *kept])


def check_identity(study: RunConfig, run: RunConfig, identity: Sequence[str], source: str) -> None:
    """Check that a run's configuration differs from its study's in identity fields alone.

    Args:
        study: The study's configuration, without the section of its kind.
        run: The run's configuration.
        identity: Paths in which they may differ.
        source: What errors call the run.

    Raises:
        ConfigError: If they differ in others.
    """
    shared = [str(one) for one in differing_paths(study, run) if not is_below(one.path, identity)]
    if shared:
        raise ConfigError(
            f"{source} changes fields that must be the same for all runs of {study.name}: "
            f"{'; '.join(shared)}; change them for the whole study, or let its runs differ in "
            f"{', '.join(identity)} only"
        )


def fixed_differences(saved: RunConfig, config: RunConfig, kind: StudyKind) -> list[Difference]:
    """Return the differences of fields that are not free, of mappings only the items that differ.

    A study, or a run of it, cannot be continued with any of them.
    """
    result = []
    for one in differing_paths(saved, config):
        if kind.is_free(one.path):
            continue
        if isinstance(one.old, dict) and isinstance(one.new, dict):
            for key in dict.fromkeys([*one.old, *one.new]):
                old, new = one.old.get(key), one.new.get(key)
                if old != new:
                    result.append(replace(one, path=f"{one.path}.{key}", old=old, new=new))
        else:
            result.append(one)
    return result


# ---------------------------------------------------------------- values


def with_changes(config: RunConfig, changes: Sequence[str], source: str) -> RunConfig:
    """Return a configuration with changes of the form `path=value`, as with --set.

    Args:
        config: The configuration.
        changes: The changes.
        source: What errors call the result.

    Raises:
        ConfigError: If the result is not valid.
    """
    return parse_config(read_yaml(dump_config(config), source).value, changes, source)


def with_values(config: RunConfig, values: Mapping[str, Any], source: str) -> RunConfig:
    """Return a configuration with values of a search space: path -> number, text, bool or None.

    Raises:
        ConfigError: If the result is not valid.
    """
    # JSON is YAML, except for pairs of \u escapes; its 17 digits read back as the same number.
    changes = [f"{path}={json.dumps(value, ensure_ascii=False)}" for path, value in values.items()]
    return with_changes(config, changes, f"{source} with {', '.join(changes)}")


def value_at(config: RunConfig, path: str) -> Any:
    """Return the plain value at a dotted path of a configuration; None where there is none."""
    value: Any = config
    for part in path.split("."):
        if isinstance(value, dict):  # Options of a custom member.
            value = value.get(part)
        elif isinstance(value, tuple):
            value = dict(enumerate(value)).get(int(part)) if part.isdecimal() else None
        else:
            value = getattr(value, part, None)
    return value


def own_values_in(
    space: Mapping[str, DistributionConfig], paths: Sequence[str], config: RunConfig
) -> dict[str, Any]:
    """Return a configuration's own values of some paths, where the space contains them."""
    values = {path: value_at(config, path) for path in paths}
    return {path: value for path, value in values.items() if space[path].contains(value)}


# ---------------------------------------------------------------- the folder


@dataclass(frozen=True)
class StudyFolder:
    """Where the parts of a study are; the only reader and writer of its own files.

    Attributes:
        path: The folder.
        kind: The kind of study.
    """

    path: Path
    kind: StudyKind

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / f"{self.kind.name}.yaml"

    @property
    def report_dir(self) -> Path:
        """The folder of the page, its figures and tables."""
        return self.path / "report"

    @property
    def untrained_dir(self) -> Path:
        """The folder of what untrained networks reach; see `read_untrained`."""
        return self.path / "untrained"

    def run(self, name: str) -> Path:
        """The folder of a run."""
        return self.path / "runs" / name

    def trial(self, group: str, number: int) -> Path:
        """The folder of a trial's run; its outcome is in the file next to it."""
        return self.path / "search" / group / f"trial-{number}"

    def outcome_path(self, group: str, number: int) -> Path:
        """The file of a trial's outcome."""
        return self.trial(group, number).with_name(f"trial-{number}.json")

    def outcome(self, group: str, number: int) -> dict[str, Any] | None:
        """Return the outcome of a trial; None while there is none."""
        path = self.outcome_path(group, number)
        return dict(read_json(path)) if path.is_file() else None

    def write_outcome(self, group: str, number: int, outcome: Mapping[str, Any]) -> None:
        """Write the outcome of a trial, at once or not at all."""
        path = self.outcome_path(group, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, outcome)

    def outcomes(self, group: str) -> list[dict[str, Any]]:
        """Return the outcomes of a group's trials, in order: values, map_at_r or problem."""
        files = (self.path / "search" / group).glob("trial-*.json")
        numbers = sorted(int(file.stem.rpartition("-")[2]) for file in files)
        found = [self.outcome(group, number) for number in numbers]
        return [outcome for outcome in found if outcome is not None]

    def config(self) -> RunConfig:
        """Read the study's configuration.

        Raises:
            ConfigError: If the folder holds no study of this kind, or the file is damaged.
        """
        if not self.config_path.is_file():
            raise ConfigError(
                f"{self.path} holds no {self.config_path.name}; give the folder that "
                f"`dml-dist {self.kind.name}` named in its last line"
            )
        return load_config(self.config_path)

    def write_config(self, config: RunConfig) -> None:
        """Write the study's configuration: from here on the folder is a study."""
        write_config_atomic(self.config_path, dump_config(config))

    def check(self, config: RunConfig, *, resume: bool) -> None:
        """Check that a study with this configuration can begin, or continue, in the folder.

        Args:
            config: The study's configuration, paths absolute.
            resume: Whether to continue the study in the folder.

        Raises:
            ConfigError: If the folder is used by something else or another study.
        """
        if not self.config_path.is_file():
            if resume:
                raise ConfigError(
                    f"--resume found no {self.config_path.name} in {self.path}; give the "
                    f"--run-dir of the study, or leave out --resume to begin one"
                )
            self.check_unused()
            return
        if not resume:
            raise ConfigError(
                f"{self.path} already holds a study; continue it with --resume, or give another "
                "--run-dir or name"
            )
        differences = fixed_differences(self.config(), config, self.kind)
        if differences:
            raise ConfigError(
                f"--resume cannot change these fields of the study in {self.path} "
                f"(study -> given): {'; '.join(map(str, differences))}; undo the changes, or give "
                "another --run-dir or name"
            )

    def check_unused(self) -> None:
        """Check that a new study can begin in the folder.

        Raises:
            ConfigError: If the folder has other content.
        """
        if self.path.exists() and (
            not self.path.is_dir() or any(one.name != ".lock" for one in self.path.iterdir())
        ):
            raise ConfigError(
                f"{self.path} is not empty and holds no {self.config_path.name}; a new study "
                "needs a new or empty folder, so give another --run-dir"
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Make the folder and keep other commands from the study; the lock ends with the process.

        Raises:
            ConfigError: If another command works on the study.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with lock_file(self.path / ".lock"):
                yield
        except BlockingIOError as error:
            raise ConfigError(
                f"another command works on {self.path} ({error.strerror}); wait until it ends, "
                "or give another --run-dir"
            ) from None


def read_untrained(folder: Path, digest: str) -> dict[str, Any] | None:
    """Return the metrics of an untrained network from a study's folder.

    None means that they must be measured: there is no file yet, or it is damaged.
    """
    try:
        return dict(read_json(folder / f"{digest}.json"))
    except (FileNotFoundError, DataError):
        return None


def write_untrained(folder: Path, digest: str, metrics: Mapping[str, Any]) -> None:
    """Write the metrics of an untrained network, at once or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json_atomic(folder / f"{digest}.json", metrics)


# ---------------------------------------------------------------- paths


def is_below(path: str, places: Sequence[str]) -> bool:
    """Whether a dotted path is one of the places, or below one."""
    return any(path == place or path.startswith(f"{place}.") for place in places)


def _fields(config: RunConfig) -> list[tuple[str, Any]]:
    return list(_leaves(read_yaml(dump_config(config), "the configuration").value, ""))


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield from _leaves(value[key], f"{path}.{key}" if path else key)
    else:
        yield path, value


def _hash(fields: Sequence[tuple[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(fields).encode()).hexdigest()[:16]
