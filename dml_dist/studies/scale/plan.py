"""What a scaling study will measure: points with their predictions, and those that are refused."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from dml_dist.config.schema import RunConfig
from dml_dist.data.index import INDEX_NAME, read_index
from dml_dist.errors import ConfigError, DmlDistError
from dml_dist.orchestration.launch import uses_gpu
from dml_dist.orchestration.train import plan_without_data
from dml_dist.runs.scaling import scale_section
from dml_dist.runtime.datasets import ensure_imported, import_to
from dml_dist.studies.scale.estimate import Method, backbone_flops, backbone_name, estimate
from dml_dist.studies.scale.grid import (
    Course,
    Sizes,
    course_of,
    point_config,
    shards_folder,
    sizes_of,
)
from dml_dist.studies.scale.measure import sent_on
from dml_dist.studies.scale.points import ScalePoint
from dml_dist.train.run_plan import RunPlan
from dml_dist.urls import local_path

_SECONDS_OF_A_START = {False: 4.0, True: 10.0}
"""Until the first step, and after the last one: of one process, and of ranks under Ray."""


@dataclass(frozen=True)
class PlannedPoint:
    """A point before it is measured.

    Attributes:
        sizes: Its sizes.
        course: Its steps.
        point: With its predictions; refused if it cannot run.
        seconds: Estimated time of its run; NaN if it is refused.
    """

    sizes: Sizes
    course: Course
    point: ScalePoint
    seconds: float


def plan_points(config: RunConfig) -> list[PlannedPoint]:
    """Return all points of a study in the order in which they are measured.

    Args:
        config: The study's configuration, paths absolute.

    Raises:
        DmlDistError: If no point of the study could run.
    """
    if local_path(config.data.path) is None:
        raise ConfigError(
            f"scale reads data.path {config.data.path} from this machine, and serves remote points "
            "itself; give a local folder"
        )
    has_shards = any(sweep.tar_shards for sweep in scale_section(config).sweeps.values())
    if config.data.dataset is None and has_shards:
        raise ConfigError(
            "scale.sweeps has tar_shards, for which the data set is imported again, but "
            "data.dataset is not set; set it, or leave out tar_shards"
        )
    own = plan_without_data(config.model_copy(update={"scale": None}))[0]
    images = own.num_images + own.num_validation_images
    method = Method.of(config)
    return [
        _planned(config, name, sizes, images, method)
        for name, sizes in sizes_of(config, own.num_classes).items()
    ]


def prepare_shards(
    config: RunConfig, planned: Sequence[PlannedPoint], console: Console
) -> list[PlannedPoint]:
    """Import the data set once for each number of tar shards; return the points with the numbers.

    Raises:
        DataError: If it cannot be imported.
    """
    folders: dict[int, Path] = {}
    result = []
    for one in planned:
        wanted = one.sizes.tar_shards
        folder = folders[wanted] = shards_folder(config, one.sizes)
        if not wanted:
            ensure_imported(config.data, console)
        elif not (folder / INDEX_NAME).exists():
            assert config.data.dataset is not None
            images = len(read_index(_with_own(config, console)).rows(config.data.train_split))
            size = math.ceil(images / wanted)
            import_to(config.data.dataset, folder, console, samples_per_shard=size)
        index = read_index(folder)
        rows = index.rows(config.data.train_split)
        tar_shards = len(np.unique(index.tar_shard[rows]))
        result.append(replace(one, point=replace(one.point, tar_shards=tar_shards)))
    return result


def _with_own(config: RunConfig, console: Console) -> Path:
    ensure_imported(config.data, console)
    return Path(config.data.path)


def _planned(
    config: RunConfig, name: str, sizes: Sizes, images: int, method: Method
) -> PlannedPoint:
    course = course_of(config, sizes.global_batch_size)
    processors = len(os.sched_getaffinity(0))
    point = ScalePoint(
        name=name,
        world_size=sizes.world_size,
        num_classes=sizes.num_classes,
        embedding_size=sizes.embedding_size,
        global_batch_size=sizes.global_batch_size,
        backbone=sizes.backbone or backbone_name(config.model.backbone),
        image_size=getattr(config.data.transform, "size", 0),
        proxies=sizes.proxies,
        loader_workers=sizes.loader_workers,
        tar_shards=sizes.tar_shards or math.ceil(images / 1000),
        remote=sizes.remote,
        processors=processors,
        threads=config.launch.threads_per_rank or max(1, processors // sizes.world_size),
    )
    try:
        run = point_config(config, name, sizes, {})
        # Where the data is changes no number, and a plan without data knows no other test split.
        plan, _ = plan_without_data(run.model_copy(update={"data": config.data}))
        device = _device(run, sizes.world_size)
        point = replace(
            point,
            backbone=backbone_name(run.model.backbone),
            device=device,
            oversubscribed=device == "cpu" and sizes.world_size > point.processors,
            sent_predicted=float(sum(sent_on(one, device) for one in plan.traffic.values())),
            gradient_bytes=float(gradient_bytes(plan, run)),
            owned_rows=max(plan.proxy_rows),
        )
        costs = estimate(point, method, backbone_flops(run.model, point.image_size))
    except DmlDistError as error:
        return PlannedPoint(
            sizes, course, replace(point, status="refused", problem=str(error)), math.nan
        )
    point = replace(point, memory_predicted=float(costs.memory_bytes))
    if problem := _lacks_memory(point, costs.memory_bytes + costs.network_bytes):
        return PlannedPoint(
            sizes, course, replace(point, status="refused", problem=problem), math.nan
        )
    start = _SECONDS_OF_A_START[sizes.world_size > 1]
    return PlannedPoint(sizes, course, point, start + course.total * costs.seconds_guess)


def gradient_bytes(plan: RunPlan, config: RunConfig) -> int:
    """Return the bytes of the network's gradients."""
    size = 8 if config.train.precision == "float64" else 4
    return (plan.num_backbone_parameters + plan.num_head_parameters) * size


def _device(config: RunConfig, world_size: int) -> str:
    """Return the name of the device that ranks will compute on, as far as this machine tells."""
    if not uses_gpu(config.launch, world_size):
        return "cpu"
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "gpu"


def _lacks_memory(point: ScalePoint, needed: int) -> str:
    """Return why a point's ranks do not fit into memory; empty if they do."""
    if point.device == "cpu":
        needed *= point.world_size
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        who, where = f"its {point.world_size} ranks together need", "this machine has"
    elif torch.cuda.is_available():
        limit = torch.cuda.get_device_properties(0).total_memory
        who, where = "a rank needs", "a GPU has"
    else:
        return ""
    if needed <= limit:
        return ""
    return (
        f"{who} at least {needed / 2**30:,.1f} GiB without activations, but {where} "
        f"{limit / 2**30:,.1f} GiB; use fewer classes, a smaller embedding or more machines"
    )
