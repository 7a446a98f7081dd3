"""The main job under a real Ray cluster: training, a killed worker, final errors."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from dml_dist.data.index import read_index
from dml_dist.train.checkpoint_files import checkpoint_folders
from tests.e2e.conftest import REPOSITORY, torchrun

Cli = Callable[..., tuple[int, str]]


def _weights(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint: network and proxies."""
    folder = max(checkpoint_folders(run / "checkpoints"), key=lambda path: path.name)
    tensors = {}
    for path in sorted(folder.glob("*.pt")):
        flat = torch.load(path, weights_only=True)
        stack = [(path.name, flat)]
        while stack:
            name, value = stack.pop()
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif isinstance(value, dict):
                stack.extend((f"{name}.{key}", item) for key, item in value.items())
            elif isinstance(value, list | tuple):
                stack.extend((f"{name}.{i}", item) for i, item in enumerate(value))
    return tensors


@pytest.mark.timeout(400)
def test_killed_worker_and_final_error(
    config_file: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rank 1 is killed at the sixth of twelve steps, after a checkpoint at the fourth.
    output = _equals_the_uninterrupted_run(2, 70, config_file, cli, tmp_path, monkeypatch)
    assert "continuing at step 4 of 12" in output
    assert "R@1" in output
    assert output.strip().splitlines()[-1].endswith("under-ray")

    config = yaml.safe_load(config_file.read_text())
    _damage_a_sample(Path(config["data"]["path"]), tmp_path / "damaged")
    code, output = cli(
        *("train", config_file, "--launcher", "ray", "--workers", 2, "--run-dir", "broken"),
        *("--set", f"data.path={tmp_path / 'damaged'}"),
    )
    assert code == 2, output
    assert "crc32" in output
    assert "Traceback" not in output
    attempts = json.loads((tmp_path / "broken/run.json").read_text())["attempts"]
    assert len(attempts) == 1  # bad data is final: the ranks were not started again


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("num_workers", "after"),
    [(2, 0), (2, 40), (2, 100), (2, 150), (3, 0), (3, 30), (3, 60), (3, 90)],
)
def test_killed_worker_again_and_again(
    num_workers: int,
    after: int,
    config_file: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _equals_the_uninterrupted_run(num_workers, after, config_file, cli, tmp_path, monkeypatch)


def _equals_the_uninterrupted_run(
    num_workers: int,
    after: int,
    config_file: Path,
    cli: Cli,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """Train under Ray with a SIGKILL to rank 1 after a number of its images, and compare."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    mark = tmp_path / "killed"
    config = yaml.safe_load(config_file.read_text())
    config["data"]["transform"] = {
        "name": "custom",
        "target": "tests.e2e.killer:KillOnce",
        "options": {"mark": str(mark), "after": after},
    }
    config_file.write_text(yaml.safe_dump(config))
    code, output = cli(
        *("train", config_file, "--launcher", "ray", "--workers", num_workers),
        *("--run-dir", "under-ray"),
    )
    assert code == 0, output
    assert mark.exists()
    attempts = json.loads((tmp_path / "under-ray/run.json").read_text())["attempts"]
    assert [attempt["attempt"] for attempt in attempts] == [1, 2]

    torchrun(num_workers, "train", config_file, "--run-dir", "uninterrupted", cwd=tmp_path)
    killed, whole = _weights(tmp_path / "under-ray"), _weights(tmp_path / "uninterrupted")
    assert killed.keys() == whole.keys()
    assert any("proxies" in name for name in whole)
    for name, tensor in whole.items():
        assert torch.equal(killed[name], tensor), name
    metrics = [
        json.loads((tmp_path / run / "metrics.json").read_text())["trained"]
        for run in ("under-ray", "uninterrupted")
    ]
    assert metrics[0] == metrics[1]
    return output


def _damage_a_sample(source: Path, target: Path) -> None:
    """Copy a data set and flip one byte in an image of the training split."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    index = read_index(target)
    for row in index.rows("train"):
        shard = target / index.tar_shards[index.tar_shard[row]]
        with shard.open("r+b") as file:
            file.seek(int(index.offset[row] + index.length[row] // 2))
            byte = file.read(1)[0]
            file.seek(-1, 1)
            file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("listens", [False, True])
def test_address_without_a_cluster(
    listens: bool, config_file: Path, cli: Cli, tmp_path: Path
) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:  # Something that is no Ray: it takes the connection and never says a word.
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        code, output = cli(
            *("train", config_file, "--launcher", "ray", "--run-dir", "nowhere"),
            *("--set", f"launch.address={address}"),
        )
    assert code == 1, output
    assert "no Ray cluster answers" in output
    assert address in output


@pytest.mark.timeout(300)
def test_quickstart_in_small(cli: Cli, tmp_path: Path) -> None:
    changes = {
        "data.dataset.num_classes": 60,
        "data.dataset.images_per_class": 6,
        "model.backbone.width": 16,
        "train.steps": 20,
        "schedule.warmup_steps": 2,
        "evaluation.every_steps": 10,
    }
    sets = [part for path, value in changes.items() for part in ("--set", f"{path}={value}")]
    code, output = cli("quickstart", *sets)
    assert code == 0, output
    assert "360 images of 60 classes" in output
    assert "on 2 ranks (ray)" in output
    assert "train: 20 of 20" in output
    run = next((tmp_path / "runs").glob("quickstart-*"))
    assert output.strip().splitlines()[-1] == f"results: {run}"
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["trained"]["num_queries"] == 180
    assert (run / "report/index.html").stat().st_size > 20_000
    assert os.environ["RAY_AUTH_MODE"] == "token"
    # Nothing of Ray's own talk reaches the user.
    assert not re.search(r"INFO|WARNING|ray::|raylet|PlacementGroup|Traceback", output), output
