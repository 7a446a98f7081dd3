"""Loggers: each library's own reader finds the records; none of their failures stops a run."""

from __future__ import annotations

import importlib.util
import logging
import struct
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dml_dist.config.load import dump_config, parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError
from dml_dist.orchestration.train import run_training
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import RecordWriter, read_records
from dml_dist.runtime import loggers as module
from dml_dist.runtime.loggers import Loggers, check_loggers, open_loggers


def config_with(*loggers: Mapping[str, Any]) -> RunConfig:
    return parse_config(
        {
            "name": "demo",
            "seed": 3,
            "data": {"path": "unused"},
            "train": {"steps": 4},
            "loggers": list(loggers),
        }
    )


def run_folder(path: Path, config: RunConfig) -> RunFolder:
    return RunFolder.create(path / "run", dump_config(config), name="demo", seed=3)


def write_attempt(
    config: RunConfig, folder: RunFolder, attempt: int, first: int, last: int
) -> None:
    """Write the records of steps first .. last, a validation, and the untrained result at last."""
    with (
        open_loggers(config, folder, attempt) as loggers,
        RecordWriter(folder.records("steps"), attempt, loggers.of("steps")) as steps,
        RecordWriter(
            folder.records("evaluations"), attempt, loggers.of("evaluations")
        ) as evaluations,
    ):
        for step in range(first, last + 1):
            steps.write(step, loss=step + attempt / 10, lr=0.5)
        evaluations.write(last, split="validation", protocol="validation", recall_at_1=0.25)
        evaluations.write(0, split="test", protocol="untrained", recall_at_1=0.125)


# ---------------------------------------------------------------- the libraries


def test_tensorboard_reads_every_record_and_the_last_attempt_of_a_step(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = config_with({"name": "tensorboard"})
    folder = run_folder(tmp_path, config)
    write_attempt(config, folder, 1, 1, 4)
    write_attempt(config, folder, 2, 3, 5)
    read = accumulators.EventAccumulator(str(folder.path / "loggers" / "tensorboard")).Reload()
    losses = [(event.step, round(event.value, 4)) for event in read.Scalars("train/loss")]
    assert losses == [(1, 1.1), (2, 2.1), (3, 3.2), (4, 4.2), (5, 5.2)]
    assert {event.value for event in read.Scalars("train/lr")} == {0.5}
    assert read.Scalars("validation/recall_at_1")[-1].value == 0.25
    assert [(event.step, event.value) for event in read.Scalars("untrained/recall_at_1")][-1] == (
        0,
        0.125,
    )
    (text,) = read.Tensors("config/text_summary")
    assert b"name: demo" in text.tensor_proto.string_val[0]


def test_mlflow_reads_every_record_and_one_run_for_all_attempts(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    config = config_with({"name": "mlflow", "experiment": "glyphs"})
    folder = run_folder(tmp_path, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own: of its dependencies and its file store
        write_attempt(config, folder, 1, 1, 2)
        write_attempt(config, folder, 2, 3, 3)
        from mlflow.tracking import MlflowClient

        client = MlflowClient((folder.loggers / "mlflow").as_uri())
        experiment = client.get_experiment_by_name("glyphs")
        (run,) = client.search_runs([experiment.experiment_id])
        losses = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(metric.step, metric.value) for metric in losses] == [(1, 1.1), (2, 2.1), (3, 3.2)]
    assert run.data.metrics["untrained/recall_at_1"] == 0.125
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "demo"
    assert (run.data.params["train.steps"], run.data.params["seed"]) == ("4", "3")
    assert (run.data.params["loggers.0.name"], run.data.params["loss.name"]) == (
        "mlflow",
        "proxy_nca",
    )


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    position, parts = 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # padding at the end of a block
            position += left
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.slow
def test_wandb_keeps_every_record_offline(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is None:
        pytest.skip("W&B is not installed (it starts a service process of some 100 MB)")
    config = config_with({"name": "wandb", "project": "glyphs"})
    folder = run_folder(tmp_path, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_attempt(config, folder, 1, 1, 3)
        from wandb.proto.wandb_internal_pb2 import Record
    (path,) = (folder.loggers / "wandb").glob("offline-run-*/*.wandb")
    history: list[dict[str, str]] = []
    for data in wandb_records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            items = record.history.item
            history.append(
                {"/".join(item.nested_key) or item.key: item.value_json for item in items}
            )
    losses = [float(row["train/loss"]) for row in history if "train/loss" in row]
    assert losses == [1.1, 2.1, 3.1]
    assert [float(row["step"]) for row in history] == [1, 2, 3, 3, 0]


# ---------------------------------------------------------------- faults


def test_a_missing_library_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_with({"name": "tensorboard"}, {"name": "wandb"})
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else object()
    )
    with pytest.raises(ConfigError, match=r"loggers\.1 .*wandb.*pip install wandb"):
        check_loggers(config.loggers)
    with pytest.raises(ConfigError, match="pip install wandb"):
        run_training(config, Console(quiet=True), run_dir=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


class Breaking:
    """A tracker that fails at its second record, and counts what it is given."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.closed: list[bool] = []

    def log(self, step: int, values: Mapping[str, float], *, training: bool) -> None:
        self.seen.append({"step": step, **values})
        if step == 2:
            raise OSError("disk full")

    def close(self, *, failed: bool) -> None:
        self.closed.append(failed)


def test_a_failing_logger_is_warned_of_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Breaking(), Breaking()
    second.log = lambda step, values, *, training: second.seen.append({"step": step, **values})  # type: ignore[method-assign]

    def refuse() -> Any:
        raise PermissionError("no key")

    def run() -> None:
        with (
            Loggers({"a": lambda: first, "b": lambda: second, "c": refuse}) as loggers,
            RecordWriter(tmp_path / "steps.jsonl", 1, loggers.of("steps")) as writer,
        ):
            for step in range(1, 5):
                writer.write(step, loss=float(step), note="text", good=True)
            raise KeyError

    with caplog.at_level(logging.WARNING, "dml_dist"), pytest.raises(KeyError):
        run()
    assert [record["loss"] for record in read_records(tmp_path / "steps.jsonl")] == [1, 2, 3, 4]
    assert [seen["step"] for seen in first.seen] == [1, 2]
    assert second.seen[-1] == {"step": 4, "train/loss": 4.0}
    assert (first.closed, second.closed) == ([], [True])
    messages = [record.message for record in caplog.records]
    assert [("logger a" in text, "logger c" in text) for text in messages] == [
        (False, True),
        (True, False),
    ]
    assert "disk full" in messages[1]


def test_no_library_is_imported_that_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_TensorBoard", "_MLflow", "_Wandb"):
        monkeypatch.setattr(module, name, None)
    config = config_with()
    with open_loggers(config, run_folder(tmp_path, config), 1) as loggers:
        loggers.of("steps")(1, {"loss": 1.0})
    assert not (tmp_path / "run" / "loggers").exists()


# ---------------------------------------------------------------- the configuration


@pytest.mark.parametrize(
    ("loggers", "message"),
    [
        ([{"name": "tensorbord"}], r"loggers\.0\.name.*did you mean tensorboard"),
        (
            [{"name": "wandb", "projet": "a"}],
            r"loggers\.0\.projet.*did you mean loggers\.0\.project",
        ),
        ([{"name": "wandb", "mode": "on"}], r"loggers\.0\.mode: must be one of offline, online"),
        ([{"name": "mlflow", "tracking_uri": "x"}], r"tracking_uri: must be a URI such as"),
        ([{"name": "wandb"}, {"name": "wandb"}], "loggers must have different names"),
    ],
)
def test_wrong_loggers_are_named(loggers: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_with(*loggers)


def test_the_configuration_with_loggers_reads_back(tmp_path: Path) -> None:
    from dml_dist.config.explain import explain
    from dml_dist.config.load import differing_paths, load_config

    config = config_with({"name": "tensorboard"}, {"name": "wandb"})
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    assert load_config(path) == config
    assert load_config(path, ["loggers.1.mode=online"]).loggers[1].mode == "online"  # type: ignore[union-attr]
    (difference,) = differing_paths(config, config_with())
    assert (difference.path, difference.resumable, difference.new) == ("loggers", True, [])
    assert "offline" in explain("loggers.wandb.mode")
