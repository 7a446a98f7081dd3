"""Configuration of experiment trackers, which get a copy of a run's records."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dml_dist.config.base import URI, Section, resumable


class TensorBoardConfig(Section):
    """Event files for TensorBoard, in loggers/tensorboard of the run's folder."""

    name: Literal["tensorboard"] = "tensorboard"


class MLflowConfig(Section):
    """An MLflow run: parameters, metrics and config.yaml."""

    name: Literal["mlflow"] = "mlflow"

    tracking_uri: Annotated[str, Field(pattern=URI)] | None = resumable(None)
    """Where MLflow keeps runs; null is loggers/mlflow in the run's folder. Credentials come from
    MLflow's environment variables."""

    experiment: str = resumable("dml_dist")
    """Name of the MLflow experiment."""


class WandbConfig(Section):
    """A Weights & Biases run, stored locally unless `mode` is online."""

    name: Literal["wandb"] = "wandb"

    project: str = resumable("dml_dist")
    """Name of the W&B project."""

    entity: str | None = resumable(None)
    """User or team that owns the project; null is the account's default."""

    mode: Literal["offline", "online"] = resumable("offline")
    """Offline writes to loggers/wandb in the run's folder, for `wandb sync` later; online sends at
    once, with the key of `wandb login` or of the environment."""


LoggerConfig = Annotated[
    TensorBoardConfig | MLflowConfig | WandbConfig, Field(discriminator="name")
]
