"""What a scaling study is on disk, and how the runs of its points differ from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dml_dist.config.scale import ScaleConfig
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError
from dml_dist.runs.study import StudyFolder, StudyKind

SCALE = StudyKind(
    name="scale",
    identity=(
        *("name", "model", "proxies", "train", "evaluation", "checkpoint", "loggers"),
        *("data.path", "data.dataset", "data.test_split", "data.cache", "data.loader_workers"),
        *("launch.launcher", "launch.num_workers", "launch.min_workers", "launch.max_failures"),
    ),
    # Not what says where and how fast, as in other studies: that is what is measured.
    free=("data.dataset.source", "scale.max_load", "scale.tries", "launch.address"),
)


@dataclass(frozen=True)
class ScaleFolder(StudyFolder):
    """Where the parts of a scaling study are.

    points.parquet, points.csv   all points, one row each, of any status
    runs/NAME                    the run of a point, without checkpoints
    """

    kind: StudyKind = SCALE

    @property
    def points_path(self) -> Path:
        """The table of all points, without a suffix."""
        return self.path / "points"


def scale_section(config: RunConfig) -> ScaleConfig:
    """Return the section `scale` of a configuration.

    Raises:
        ConfigError: If there is none.
    """
    if config.scale is None:
        raise ConfigError(
            f"the configuration {config.name} has no section scale, with sweeps of sizes; "
            "`dml-dist config --explain scale` describes it, `dml-dist train` makes a single run"
        )
    return config.scale
