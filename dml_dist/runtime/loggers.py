"""Experiment trackers: a copy of a run's configuration and records, behind `open_loggers`.

The run's folder remains the reference. A tracker's library is imported only if the configuration
names it; a tracker that fails during a run is disabled with one warning.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Protocol, assert_never

from dml_dist.config.load import dump_config
from dml_dist.config.loggers import LoggerConfig, MLflowConfig, TensorBoardConfig, WandbConfig
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError
from dml_dist.files import write_text_atomic
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import Observer
from dml_dist.urls import shown_url

_log = logging.getLogger(__name__)

# Name of a logger -> the module it imports, and the package of that module.
_LIBRARIES = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "wandb": ("wandb", "wandb"),
}


class Tracker(Protocol):
    """Interface of an experiment tracker."""

    def log(self, step: int, values: Mapping[str, float], *, training: bool) -> None:
        """Log the numbers of one record, of a training step or of an evaluation."""
        ...

    def close(self, *, failed: bool) -> None:
        """Flush and close; `failed` is the status of the attempt."""
        ...


class Loggers:
    """The trackers of a run, on rank 0; a failure of a tracker never stops the run."""

    def __init__(self, trackers: Mapping[str, Callable[[], Tracker]]) -> None:
        """Open trackers.

        Args:
            trackers: Name -> function that opens the tracker.
        """
        self._trackers: dict[str, Tracker] = {}
        for name, opener in trackers.items():
            if (tracker := self._guarded(name, opener)) is not None:
                self._trackers[name] = tracker

    def of(self, kind: str) -> Observer:
        """Return the observer that forwards records of a kind.

        Args:
            kind: "steps", whose values become train/..., or "evaluations", whose values become
                validation/..., final/... and so on, by protocol.
        """

        def observe(step: int, values: Mapping[str, Any]) -> None:
            training = kind == "steps"
            group = "train" if training else values.get("protocol") or values.get("split", kind)
            numbers = {
                f"{group}/{name}": float(value)
                for name, value in values.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            for name, tracker in list(self._trackers.items()):
                self._guarded(name, partial(tracker.log, step, numbers, training=training))

        return observe

    def close(self, *, failed: bool = False) -> None:
        """Flush and close all trackers."""
        for name, tracker in list(self._trackers.items()):
            self._guarded(name, partial(tracker.close, failed=failed))
        self._trackers.clear()

    def _guarded(self, name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        # Servers and disks of trackers fail in many ways; none may end the run.
        except Exception as error:
            self._trackers.pop(name, None)
            _log.warning(
                "logger %s failed (%s: %s) and is disabled; training continues, and the run's "
                "folder keeps every record",
                name,
                type(error).__name__,
                error,
            )
            return None

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)


def check_loggers(loggers: Sequence[LoggerConfig]) -> None:
    """Check that the libraries of loggers are installed.

    Raises:
        ConfigError: If one is not; the message names the package.
    """
    for number, logger in enumerate(loggers):
        module, package = _LIBRARIES[logger.name]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"loggers.{number} (name: {logger.name}) needs the package {package}, which is not "
                f'installed; run `pip install {package}` (or `pip install "dml-dist[loggers]"` '
                "for all of them), or leave the logger out"
            )


def open_loggers(config: RunConfig, folder: RunFolder, attempt: int) -> Loggers:
    """Open the loggers that a configuration names; rank 0 alone calls this.

    Args:
        config: The run's configuration, which is logged as well.
        folder: The run's folder; trackers write to loggers/ by default.
        attempt: Number of this attempt; later attempts continue the tracker's run of the first.
    """

    def opener(logger: LoggerConfig) -> Callable[[], Tracker]:
        match logger:
            case TensorBoardConfig():
                return lambda: _TensorBoard(config, folder, attempt)
            case MLflowConfig():
                return lambda: _MLflow(logger, config, folder)
            case WandbConfig():
                return lambda: _Wandb(logger, config, folder)
            case _:
                assert_never(logger)

    return Loggers({logger.name: opener(logger) for logger in config.loggers})


class _TensorBoard:
    def __init__(self, config: RunConfig, folder: RunFolder, attempt: int) -> None:
        self._path = folder.loggers / "tensorboard"
        self._text = f"```yaml\n{shown_url(dump_config(config))}```"
        self._attempt = attempt
        self._writer: Any = None

    def log(self, step: int, values: Mapping[str, float], *, training: bool) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run repeats steps: their earlier values are hidden.
            purge = step if training and self._attempt > 1 else None
            self._writer = SummaryWriter(str(self._path), purge_step=purge)
            if self._attempt == 1:
                self._writer.add_text("config", self._text, 0)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        if self._writer is not None:
            self._writer.close()


class _MLflow:
    def __init__(self, logger: MLflowConfig, config: RunConfig, folder: RunFolder) -> None:
        if logger.tracking_uri is None:
            # MLflow needs this to store runs as plain files.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow
        from mlflow.tracking import MlflowClient

        uri = logger.tracking_uri or (folder.loggers / logger.name).as_uri()
        folder.loggers.mkdir(exist_ok=True)
        self._client = MlflowClient(tracking_uri=uri)
        self._metric = mlflow.entities.Metric
        marker = folder.loggers / "mlflow-run-id.txt"
        if marker.is_file():
            self._run = marker.read_text("utf-8").strip()
            self._client.update_run(self._run, status="RUNNING")
            return
        known = self._client.get_experiment_by_name(logger.experiment)
        experiment = (
            known.experiment_id
            if known is not None
            else self._client.create_experiment(logger.experiment)
        )
        run = self._client.create_run(experiment, run_name=config.name)
        self._run = run.info.run_id
        write_text_atomic(marker, self._run + "\n")
        for name, value in _flat(shown_url(config.model_dump(mode="json"))).items():
            self._client.log_param(self._run, name, value)
        self._client.log_text(self._run, shown_url(dump_config(config)), "config.yaml")

    def log(self, step: int, values: Mapping[str, float], *, training: bool) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, status="FAILED" if failed else "FINISHED")


class _Wandb:
    def __init__(self, logger: WandbConfig, config: RunConfig, folder: RunFolder) -> None:
        import wandb

        folder.loggers.mkdir(exist_ok=True)
        marker = folder.loggers / "wandb-run-id.txt"
        if not marker.is_file():
            write_text_atomic(marker, secrets.token_hex(4) + "\n")
        # Offline, W&B cannot find an earlier attempt: attempts share their id, and `wandb sync`
        # joins them.
        online = logger.mode == "online"
        self._run = wandb.init(
            project=logger.project,
            entity=logger.entity,
            name=config.name,
            id=marker.read_text("utf-8").strip(),
            resume="allow" if online else None,
            mode=logger.mode,
            dir=str(folder.loggers),
            config=shown_url(config.model_dump(mode="json")),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # W&B's own step counter only increases, but evaluations of an earlier step may follow.
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float], *, training: bool) -> None:
        self._run.log({"step": step, **values})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the plain values of nested mappings and lists by their dotted paths."""
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, Mapping | list) for item in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {
        path: leaf
        for key, item in items
        for path, leaf in _flat(item, f"{prefix}.{key}" if prefix else str(key)).items()
    }
