"""Commands that would end, or write, without a word: custom targets, outputs, test classes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from dml_dist.cli import app
from dml_dist.config.custom import call_target
from dml_dist.config.data import CustomDatasetConfig, CustomTransformConfig
from dml_dist.config.load import parse_config
from dml_dist.config.model import CustomBackboneConfig
from dml_dist.config.objective import CustomLossConfig
from dml_dist.config.schema import RunConfig
from dml_dist.data.datasets.custom import CustomImporter
from dml_dist.data.transforms import build_transform
from dml_dist.errors import ConfigError, DmlDistError, RunError
from dml_dist.losses.build_loss import build_loss
from dml_dist.models.backbones import build_custom
from dml_dist.orchestration.check_loss import check_loss
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.train.optim import build_optimizer

CONFIG = {
    "name": "small",
    "data": {"path": "shards"},
    "train": {"steps": 2, "global_batch_size": 4},
}


def config_of(*changes: str) -> RunConfig:
    return parse_config(CONFIG, changes)


# ---------------------------------------------------------------- targets that end the process


@pytest.mark.parametrize("target", ["sys:exit", "builtins:quit", "builtins:exit"])
@pytest.mark.parametrize(
    "build",
    [
        lambda target: build_loss(CustomLossConfig(target=target), num_classes=3),
        lambda target: build_custom(CustomBackboneConfig(target=target)),
        lambda target: build_transform(CustomTransformConfig(target=target)),
        lambda target: CustomImporter(CustomDatasetConfig(target=target)).samples(),
        lambda target: build_optimizer(
            config_of("optim.name=custom", f"optim.target={target}").optim,
            [{"params": [torch.zeros(1)]}],
        ),
    ],
    ids=["loss", "backbone", "transform", "dataset", "optimizer"],
)
def test_a_target_that_ends_the_process(target: str, build: Callable[[str], object]) -> None:
    with pytest.raises(ConfigError, match=f"target '{target}' ended the process when"):
        build(target)


def test_options_reach_the_target() -> None:
    assert call_target("builtins:dict", [("a", 1)], options={"b": 2}) == {"a": 1, "b": 2}


class EndsInTheBatch(nn.Module):
    """A loss that ends the process when it is called."""

    def forward(self, *_: torch.Tensor) -> torch.Tensor:
        sys.exit(0)


def test_code_that_ends_the_process_later_is_an_error_of_the_command() -> None:
    target = f"{__name__}:EndsInTheBatch"
    found = CliRunner().invoke(app, ["check-loss", target])
    assert isinstance(found.exception, RunError)
    assert "ended the process with exit code 0 before the command was done" in str(found.exception)


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["data", "--help"]])
def test_commands_still_end_by_themselves(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, ["train"]).exit_code == 2
    assert issubclass(typer.Exit, RuntimeError)  # Not SystemExit.


class Rows(nn.Module):
    """No mean over the batch."""

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return embeddings.sum(dim=1)


class Number(nn.Module):
    """No tensor."""

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("target", "given"),
    [
        (f"{__name__}:Rows", r"a tensor of shape \(4,\)"),
        (f"{__name__}:Number", "float"),
    ],
)
def test_a_loss_that_returns_no_number(target: str, given: str) -> None:
    config = CustomLossConfig(target=target)
    objective = build_objective(
        config, num_classes=2, embedding_size=3, seed=0, comm=Comm.single(), dtype=torch.float32
    )
    with pytest.raises(ConfigError, match=f"returned {given} for a batch, but must return a 0-d"):
        objective(torch.randn(4, 3, requires_grad=True), torch.tensor([0, 0, 1, 1]), [4])


@pytest.mark.parametrize(
    "target", ["builtins:print", "builtins:object", "os:getpid", "torch.nn:Identity", "math:pi"]
)
def test_check_loss_refuses_what_is_no_loss(target: str) -> None:
    with pytest.raises(ConfigError):
        check_loss(target, [], None)  # type: ignore[arg-type]


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    "command",
    [
        ["export", "run", "--out"],
        ["search", "bundle", "a.png", "--out"],
        ["train", "a.yaml", "--run-dir"],
        ["compare", "a.yaml", "--run-dir"],
        ["tune", "a.yaml", "--run-dir"],
        ["quickstart", "--run-dir"],
        ["data", "import", "glyphs", "--out"],
        ["data", "show", "shards", "--out"],
    ],
)
@pytest.mark.parametrize(
    ("out", "text"),
    [
        ("", "path of an output is empty"),
        (" ", "path of an output is empty"),
        ("s3://bucket/x", "not to the URL s3://bucket/x"),
        ("https://me:secret@host/x", "not to the URL https://host/x"),
    ],
)
def test_outputs_are_paths(
    command: list[str], out: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = CliRunner().invoke(app, [*command, out])
    assert isinstance(found.exception, ConfigError), found.output
    assert text in str(found.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_folder_of_shards_is_refused(path: str) -> None:
    with pytest.raises(DmlDistError, match="path is empty, which would mean the current folder"):
        config_of(f"data.path='{path}'")
