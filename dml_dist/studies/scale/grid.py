"""The points of a scaling study: its sweeps multiplied out, and the configuration of each run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Literal

from dml_dist.config.load import dump_config, parse_config
from dml_dist.config.scale import SweepConfig
from dml_dist.config.schema import RunConfig
from dml_dist.config.yaml_text import read_yaml
from dml_dist.errors import ConfigError
from dml_dist.runs.scaling import scale_section
from dml_dist.runs.study import check_identity, with_changes


@dataclass(frozen=True)
class Sizes:
    """What tells the points of a study apart.

    Attributes:
        world_size: W.
        num_classes: C.
        embedding_size: D.
        global_batch_size: B.
        backbone: Name of one of `scale.backbones`; empty: the configuration's.
        proxies: Placement of the proxies.
        loader_workers: Loader processes of a rank.
        tar_shards: Tar shards of the training images; 0: as in data.path.
        remote: Whether they are read from a web server.
    """

    world_size: int
    proxies: Literal["sharded", "replicated"]
    num_classes: int
    embedding_size: int
    global_batch_size: int
    backbone: str
    loader_workers: int
    tar_shards: int
    remote: bool


def sizes_of(config: RunConfig, num_classes: int) -> dict[str, Sizes]:
    """Return the points of a study by name, in the order in which they are measured.

    A name has W and C, and other sizes that are not the configuration's own.

    Args:
        config: The study's configuration.
        num_classes: Training classes, C where a sweep has no others.
    """
    sweeps = scale_section(config).sweeps.values()
    unique = {one for sweep in sweeps for one in _product(sweep, config, num_classes)}
    # Of one rank first, whose losses the others are compared with.
    found = sorted(unique, key=lambda one: (one.world_size, one.proxies != "sharded", astuple(one)))
    own = next(_product(SweepConfig(), config, num_classes))
    return {_name(one, own): one for one in found}


def _name(sizes: Sizes, own: Sizes) -> str:
    labels = {
        "embedding_size": f"d{sizes.embedding_size}",
        "global_batch_size": f"b{sizes.global_batch_size}",
        "backbone": sizes.backbone,
        "proxies": sizes.proxies,
        "loader_workers": f"workers{sizes.loader_workers}",
        "tar_shards": f"shards{sizes.tar_shards}",
        "remote": "remote",
    }
    others = [text for key, text in labels.items() if getattr(sizes, key) != getattr(own, key)]
    return "-".join([f"w{sizes.world_size}", f"c{sizes.num_classes}", *others])


def _product(sweep: SweepConfig, config: RunConfig, num_classes: int) -> Iterator[Sizes]:
    launch = config.launch
    ranks = launch.num_workers if launch.launcher == "ray" else 1
    axes: list[tuple[Any, ...]] = [
        sweep.world_size or (ranks,),
        sweep.proxies or (config.proxies.placement,),
        sweep.classes or (config.proxies.num_classes or num_classes,),
        sweep.embedding_size or (config.model.embedding_size,),
        sweep.global_batch_size or (config.train.global_batch_size,),
        sweep.backbone or ("",),
        sweep.loader_workers or (config.data.loader_workers,),
        sweep.tar_shards or (0,),
        tuple(one == "remote" for one in sweep.data) or (False,),
    ]
    for world_size, proxies, classes, width, batch, *rest in itertools.product(*axes):
        total = batch * world_size if sweep.scaling == "weak" else batch
        yield Sizes(world_size, proxies, classes, width, total, *rest)


@dataclass(frozen=True)
class Course:
    """Steps of a point: warm-up, then repetitions.

    Attributes:
        warmup: Steps before the first repetition.
        steps: Steps of a repetition.
        repetitions: Repetitions.
    """

    warmup: int
    steps: int
    repetitions: int

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.warmup + self.steps * self.repetitions

    @property
    def log_every(self) -> int:
        """Steps between records: both the warm-up and each repetition end with one."""
        return math.gcd(self.warmup, self.steps)


def course_of(config: RunConfig, global_batch_size: int) -> Course:
    """Return the steps of a point, which make as many images as those of the other points.

    Raises:
        ConfigError: If no number of steps does.
    """
    section, base = scale_section(config), config.train.global_batch_size
    images = {"warmup_steps": section.warmup_steps * base, "steps": section.steps * base}
    for key, count in images.items():
        if count % global_batch_size:
            raise ConfigError(
                f"scale.{key} {count // base} of train.global_batch_size {base} are {count} "
                f"images, but a point has batches of {global_batch_size}, and all points see "
                f"equally many images; make scale.{key} a multiple of "
                f"{global_batch_size // math.gcd(global_batch_size, base)}"
            )
    warmup, steps = (count // global_batch_size for count in images.values())
    return Course(warmup, steps, section.repetitions)


def point_config(config: RunConfig, name: str, sizes: Sizes, data: dict[str, Any]) -> RunConfig:
    """Return the configuration of a point's run.

    It has one validation, at its end, reads no test class, and is not restarted when it fails.

    Args:
        config: The study's, paths absolute.
        name: Name of the point.
        sizes: Its sizes.
        data: Fields of the section `data` that differ: where the tar shards are.

    Raises:
        ConfigError: If the sizes do not fit each other, the data or the configuration.
    """
    course = course_of(config, sizes.global_batch_size)
    plain = config.model_copy(update={"scale": None})
    if sizes.backbone:
        changes = scale_section(config).backbones[sizes.backbone]
        changed = with_changes(plain, changes, f"backbone {sizes.backbone} of {config.name}")
        check_identity(plain, changed, ("model",), f"scale.backbones.{sizes.backbone}")
        plain = changed
    of_launch = {"launcher": "ray" if sizes.world_size > 1 else "inprocess", "min_workers": None}
    update: dict[str, Any] = {
        "name": name,
        "data": {"test_split": "validation", "loader_workers": sizes.loader_workers, **data},
        "model": {"embedding_size": sizes.embedding_size},
        "proxies": {
            "placement": sizes.proxies,
            "num_classes": sizes.num_classes,
        },
        "train": {
            "global_batch_size": sizes.global_batch_size,
            "steps": course.total,
            "epochs": None,
            "log_every": course.log_every,
            "record_spans": True,
            "record_machine": True,
        },
        "evaluation": {
            "every_steps": course.total,
            "evaluate_test_every": None,
            "final": "none",
        },
        "checkpoint": {"every_steps": None, "every_minutes": None, "keep": 1},
        "launch": {**of_launch, "num_workers": sizes.world_size, "max_failures": 0},
        "loggers": [],
    }
    return _updated(plain, update, f"point {name} of {config.name}")


def shards_folder(config: RunConfig, sizes: Sizes) -> Path:
    """Return the folder of a point's tar shards on this machine."""
    path = Path(config.data.path)
    if not sizes.tar_shards:
        return path
    return path.with_name(f"{path.name}-{sizes.tar_shards}-tar-shards")


def _updated(config: RunConfig, update: dict[str, Any], source: str) -> RunConfig:
    """Return a configuration with other values, checked as one that is read from a file."""
    plain = read_yaml(dump_config(config), source).value
    for key, value in update.items():
        plain[key] = {**plain[key], **value} if isinstance(value, dict) else value
    return parse_config(plain, (), source)
