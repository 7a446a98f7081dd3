"""The commands in one process: train, resume, evaluate, report, and what they refuse."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from dml_dist.errors import RunError
from dml_dist.orchestration.evaluate import evaluation_config
from dml_dist.runs.folder import RunFolder
from dml_dist.train.checkpoint_files import checkpoint_folders
from tests.e2e.conftest import torchrun
from tests.faults.forked import command, forked

Cli = Callable[..., tuple[int, str]]


def test_train_evaluate_report(config_file: Path, cli: Cli, tmp_path: Path) -> None:
    code, output = cli("train", config_file)
    assert code == 0, output
    run = tmp_path / "runs/small"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["untrained"].keys() == metrics["trained"].keys()
    assert metrics["trained"]["num_queries"] == 240
    page = (run / "report/index.html").read_text()
    assert "small" in page
    assert page.count("data:image/") > 20  # the retrieval gallery
    assert output.strip().splitlines()[-1] == f"results: {run}"

    # The same checkpoint gives the same digits on any number of ranks.
    code, output = cli("evaluate", "runs/small")
    assert code == 0, output
    result = run / "metrics-test-best.json"
    alone = json.loads(result.read_text())["trained"]
    assert alone == metrics["trained"]
    classes = pq.read_table(run / "per_class.parquet")
    of_classes = run / "per_class-test-best.parquet"
    assert pq.read_table(of_classes).equals(classes)
    for num_ranks in (2, 3):
        result.unlink()
        of_classes.unlink()
        if num_ranks == 2:
            torchrun(num_ranks, "evaluate", "runs/small", cwd=tmp_path)
        else:  # The same without torchrun, whose ranks take seconds to import torch.
            done = forked(command, "evaluate", "runs/small", folder=tmp_path, world_size=num_ranks)
            assert not any(done.codes), done.output
        assert json.loads(result.read_text())["trained"] == alone, num_ranks
        assert pq.read_table(of_classes).equals(classes)

    code, output = cli("evaluate", "runs/small", "--split", "validation", "--checkpoint", "last")
    assert code == 0, output
    assert (run / "metrics-validation-last.json").exists()
    assert len(pq.read_table(run / "per_class-validation-last.parquet")) < len(classes)

    (run / "report/index.html").unlink()
    code, output = cli("report", run)
    assert code == 0, output
    assert (run / "report/index.html").exists()


@pytest.mark.usefixtures("blank_figures")
def test_resume_after_a_cut_checkpoint(config_file: Path, cli: Cli, tmp_path: Path) -> None:
    code, output = cli("train", config_file, "--set", "train.steps=8")
    assert code == 0, output
    run = tmp_path / "runs/small"
    newest = max(checkpoint_folders(run / "checkpoints"), key=lambda path: path.name)
    assert newest.name.startswith("step_00000008")
    file = newest / "model.pt"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    code, output = cli("train", config_file, "--resume")
    assert code == 0, output
    assert "continuing at step 4 of 12" in output
    assert re.search(f"warning: .*{newest.name}", output), output  # skipped, and reported
    attempts = json.loads((run / "run.json").read_text())["attempts"]
    assert attempts[1]["changes"] == ["train.steps: 8 -> 12"]

    code, output = cli("train", config_file, "--resume", "--set", "optim.lr=0.5")
    assert code == 2
    assert "optim.lr: 0.001 -> 0.5" in output

    code, output = cli("train", config_file)
    assert code == 2
    assert "--resume" in output
    assert str(run) in output


def _sets(changes: list[str]) -> list[str]:
    return [part for change in changes for part in ("--set", change)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["optim.ler=1e-3"], "optim.ler"),
        (["optim.lr=fast"], "must be a number"),
        (["optim.lr=-1"], "a number > 0"),
        (
            ["data.batches={name: balanced, classes_per_batch: 8, samples_per_class: 4}"],
            "= 32 must equal train.global_batch_size 26",
        ),
        (
            ["launch.launcher=ray", "launch.num_workers=30"],
            "must be at least launch.num_workers 30",
        ),
        (["launch.launcher=ray", "launch.num_workers=25"], "and 25 ranks"),
        (
            ["data.batches={name: balanced, classes_per_batch: 26, samples_per_class: 1}"],
            "classes_per_batch 26",
        ),
        (["data.path=nowhere"], "has no index.parquet"),
        (["data.train_split=training"], "split 'training'"),
        (["data.test_split=unseen"], "split 'unseen'"),
        (["data.test_split=train"], "training classes would be reported as test classes"),
        (["data.test_split=validation"], "validation classes select the checkpoint"),
        (
            ["train.global_batch_size=191", "model.backbone.norm=batch"],
            "needs at least 2 images, but there is only 1 image in a batch",
        ),
        (["model.backbone={name: resnet18, weights: none, norm: batch}"], "frozen batch"),
        (["model.backbone={name: resnet18, weights: gone.pth}"], "gone.pth"),
        (["launch.launcher=torchrun"], "torchrun --nproc-per-node"),
        (["launch.launcher=ray", "launch.use_gpu=yes", "launch.num_workers=2"], "needs 2 GPUs"),
        (["validation={name: fraction, fraction: 0.99}"], "at least 2 classes"),
        (["data.dataset={name: glyphs, num_classes: 40}"], "another data set"),
        (
            [
                "data={path: runs/new, dataset: {name: glyphs, num_classes: 40}}",
                "train.global_batch_size=3",
                "loss.assignment=dynamic",
            ],
            "shuffled batches of 3 of",
        ),
    ],
)
def test_bad_input_writes_nothing(
    config_file: Path, cli: Cli, tmp_path: Path, changes: list[str], expected: str
) -> None:
    code, output = cli("train", config_file, *_sets(changes))
    assert code == 2, output
    assert expected in " ".join(output.split()), output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("data.test_split=train", "training classes would be reported as test classes"),
        ("model.backbone={name: resnet18, weights: gone.pth}", "gone.pth"),
        ("model.backbone={name: resnet18, weights: small.yaml}", "cannot be read"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(
    config_file: Path, cli: Cli, change: str, expected: str
) -> None:
    code, output = cli("train", config_file, "--dry-run", "--set", change)
    assert code == 2, output
    assert expected in output


def test_a_launch_error_leaves_the_name_free(
    config_file: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails between the folder and the first step, the corrected command may run."""

    def fail(*_: object, **__: object) -> None:
        raise RunError("no Ray cluster answers")

    with monkeypatch.context() as patch:
        patch.setattr("dml_dist.orchestration.train.launch", fail)
        code, output = cli("train", config_file)
    assert code == 1, output
    code, output = cli("train", config_file, "--set", "train.steps=4")
    assert code == 0, output


def test_a_report_that_fails_leaves_the_run_finished(
    config_file: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings of one number have a page; one that cannot be written is a warning."""
    sets = ("--set", "train.steps=4", "--set", "model.embedding_size=1")
    code, output = cli("train", config_file, *sets)
    assert code == 0, output
    assert "failed:" not in (tmp_path / "runs/small/report/index.html").read_text()

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("dml_dist.report.page.write_page", fail)
    code, output = cli("train", config_file, *sets, "--run-dir", "other")
    assert code == 0, output
    assert "results: " in output


def test_a_folder_that_cannot_be_written(config_file: Path, cli: Cli, tmp_path: Path) -> None:
    code, output = cli("train", config_file, "--run-dir", config_file / "run")
    assert code == 1, output
    assert "Traceback" not in output
    assert str(config_file) in output


@pytest.mark.usefixtures("blank_figures")
def test_refused_resume_changes_nothing(config_file: Path, cli: Cli, tmp_path: Path) -> None:
    changes = ["schedule={name: cosine, warmup_steps: 1}", "train.steps=4"]
    code, output = cli("train", config_file, *_sets(changes))
    assert code == 0, output
    run = tmp_path / "runs/small"
    before = {name: (run / name).read_bytes() for name in ("config.yaml", "run.json")}
    code, output = cli("train", config_file, "--resume", *_sets([*changes, "train.steps=9"]))
    assert code == 2, output
    assert "cosine" in output
    assert {name: (run / name).read_bytes() for name in before} == before
    with RunFolder(run).lock():
        code, output = cli("train", config_file, "--resume", *_sets(changes))
    assert code == 2, output
    assert "another command is working on" in output


def test_dry_run_without_data(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "dry.yaml"
    config = {
        "name": "dry",
        "data": {"path": "none", "dataset": {"name": "glyphs", "num_classes": 40}},
        "train": {"global_batch_size": 32, "epochs": 2},
        "launch": {"launcher": "ray", "num_workers": 3},
    }
    path.write_text(yaml.safe_dump(config))
    code, output = cli("train", path, "--dry-run")
    assert code == 0, output
    assert "not imported yet" in output
    assert re.search(r"216 images of 18 classes", output), output  # 20 train, 2 held out
    assert "10, 11, 11" in output
    assert "6, 6, 6" in output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dry.yaml"]


def test_data_commands(cli: Cli, tmp_path: Path) -> None:
    code, output = cli(
        *("data", "import", "glyphs", "--out", "shards", "--classes", 6),
        *("--images-per-class", 3, "--image-size", 16),
    )
    assert code == 0, output
    assert "18 images of 6 classes" in output
    code, output = cli("data", "verify", "shards")
    assert code == 0, output
    code, output = cli("data", "import", "folder", "--out", "other", "--split", "train=half")
    assert code == 2
    assert "train=half" in output
    code, output = cli("data", "import", "glyphs", "--out", "other", "--source", "x")
    assert code == 2
    assert "source" in output

    (tmp_path / "shards/index.parquet").unlink()
    code, output = cli("data", "index", "shards")
    assert code == 0, output
    shard = next((tmp_path / "shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    code, output = cli("data", "verify", "shards")
    assert code == 2
    assert shard.name in output


def test_help_and_explain(cli: Cli) -> None:
    code, output = cli("--help")
    assert code == 0
    for name in ("quickstart", "data", "train", "evaluate", "report", "config"):
        assert name in output
    code, output = cli("config", "--explain", "optim.lr")
    assert code == 0
    assert "earning rate" in output
    code, output = cli("config", "--explain", "optim.ler")
    assert code == 2


def test_a_rank_ends_without_taking_the_interpreter_apart() -> None:
    """Threads of gloo abort a process whose interpreter ends while they hold tensors."""
    script = (
        "import atexit, os, sys; from dml_dist.cli import main; atexit.register(os.abort); "
        "sys.argv[1:] = {}; main()"
    )
    for arguments, code, text in ((["config", "--help"], 0, "Usage"), (["nothing"], 2, "nothing")):
        for rank, expected in (({}, -signal.SIGABRT), ({"TORCHELASTIC_RUN_ID": "x"}, code)):
            done = subprocess.run(
                [sys.executable, "-c", script.format(arguments)],
                env={**os.environ, **rank},
                capture_output=True,
                text=True,
            )
            assert done.returncode == expected
            assert not rank or text in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed=5", "seed: 0 -> 5"),
        ("name=other", "name: 'small' -> 'other'"),
        ("data.train_split=test", "data.train_split: 'train' -> 'test'"),
        ("data.test_split=train", "data.test_split: 'test' -> 'train'"),
        ("data.transform.size=16", "data.transform.size: 24 -> 16"),
        ("data.transform.mean=[0.5, 0.5, 0.5]", "data.transform.mean:"),
        ("model.embedding_size=3", "model.embedding_size: 16 -> 3"),
        ("model.backbone.width=8", "model.backbone.width: 16 -> 8"),
        ("loss.name=triplet", "loss.name: 'proxy_nca' -> 'triplet'"),
        ("optim.lr=0.5", "optim.lr: 0.001 -> 0.5"),
        ("train.precision=float64", "train.precision: 'auto' -> 'float64'"),
        ("train.global_batch_size=8", "train.global_batch_size: 26 -> 8"),
        ("validation.fraction=0.3", "validation.fraction: 0.2 -> 0.3"),
        ("nir={flow: {width: 9}}", "nir.flow.num_blocks: (absent) -> 5; "),
    ],
)
def test_an_evaluation_refuses_another_run(
    config_file: Path, cli: Cli, tmp_path: Path, change: str, named: str
) -> None:
    """Also beside changes that are allowed, which are not named."""
    folder = RunFolder.create(tmp_path / "run", config_file.read_text(), name="small", seed=0)
    before = sorted(folder.path.rglob("*"))
    allowed = ("--set", "evaluation.batch_size=16", "--set", "launch.threads_per_rank=2")
    code, output = cli("evaluate", folder.path, *allowed, "--set", change)
    text = " ".join(output.split())
    assert code == 2, output
    assert "is evaluated with its own configuration" in text
    assert f"not {named}" in text
    assert "leave these changes out" in text
    assert "batch_size: 256" not in text
    assert "threads_per_rank" not in text
    assert sorted(folder.path.rglob("*")) == before


def test_an_evaluation_takes_changes_that_leave_the_embeddings(
    config_file: Path, tmp_path: Path
) -> None:
    folder = RunFolder.create(tmp_path / "run", config_file.read_text(), name="small", seed=0)
    changes = [
        *("evaluation.batch_size=16", "evaluation.distance=euclidean", "evaluation.recall_at=[3]"),
        *("launch.num_workers=2", "launch.launcher=ray", "data.path=/elsewhere"),
        *("data.loader_workers=2", "loggers=[{name: tensorboard}]"),
    ]
    config = evaluation_config(folder, changes)
    assert (config.evaluation.batch_size, config.evaluation.distance) == (16, "euclidean")
    assert (config.evaluation.recall_at, config.data.path) == ((3,), "/elsewhere")
    assert (config.launch.num_workers, config.launch.launcher) == (2, "ray")
    assert (config.data.loader_workers, len(config.loggers)) == (2, 1)
    assert (config.seed, config.model.embedding_size) == (0, 16)
