"""The main job under a real Ray cluster: training, a killed worker, final errors."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from dml_dist.data.index import read_index
from tests.e2e.conftest import REPOSITORY
from tests.faults.forked import command, forked
from tests.faults.runs import act, assert_same_end

Cli = Callable[..., tuple[int, str]]


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("blank_figures")
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
    [(2, 0), (2, 40), (2, 100), (2, 140), (3, 0), (3, 30), (3, 60), (3, 90)],
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
    config = act(config_file, mark=mark, action="kill", after=after)
    code, output = cli(
        *("train", config, "--launcher", "ray", "--workers", num_workers),
        *("--run-dir", "under-ray"),
    )
    assert code == 0, output
    assert mark.exists()
    attempts = json.loads((tmp_path / "under-ray/run.json").read_text())["attempts"]
    assert [attempt["attempt"] for attempt in attempts] == [1, 2]

    arguments = ("train", str(config), "--run-dir", "uninterrupted")
    done = forked(command, *arguments, folder=tmp_path, world_size=num_workers)
    assert not any(done.codes), done.output
    assert_same_end(tmp_path / "under-ray", tmp_path / "uninterrupted")
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
