"""Paths of a configuration that hold in every process, whatever folder it works in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dml_dist.config.schema import RunConfig
from dml_dist.urls import local_path


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with the paths of data, data set and weights made absolute."""
    cache = config.data.cache
    data: dict[str, Any] = {
        "path": _absolute(config.data.path),
        "cache": cache.model_copy(update={"folder": _absolute(cache.folder)}),
    }
    if (source := getattr(config.data.dataset, "source", None)) is not None:
        assert config.data.dataset is not None
        data["dataset"] = config.data.dataset.model_copy(update={"source": _absolute(source)})
    model = config.model
    weights = getattr(model.backbone, "weights", "none")
    if Path(weights).expanduser().is_file():  # Otherwise the name of weights of torchvision.
        backbone = model.backbone.model_copy(update={"weights": _absolute(weights)})
        model = model.model_copy(update={"backbone": backbone})
    return config.model_copy(update={"data": config.data.model_copy(update=data), "model": model})


def _absolute(path: str) -> str:
    """Return an absolute path; a URL stays as it is, unless it is that of a local path."""
    local = local_path(path)
    return path if local is None else str(local.absolute())
