"""A run under a real Ray cluster that grows when room comes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dml_dist.config.launch import LaunchConfig
from dml_dist.orchestration import ray_train
from dml_dist.orchestration.ray_launch import cluster
from dml_dist.runs.records import read_records
from tests.e2e.conftest import REPOSITORY
from tests.faults.forked import command, forked
from tests.faults.runs import act, assert_nothing_left, attempts, samples, wait_for

Cli = Callable[..., tuple[int, str]]


@pytest.mark.timeout(400)
def test_a_run_grows_when_there_is_room(
    config_file: Path, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.setattr(ray_train, "_SECONDS_BEFORE_GROWING", 0.0)
    config = act(config_file, mark=tmp_path / "free", pause=0.01)
    run = tmp_path / "run"
    sets = ("train.steps=24", "train.log_every=1", "evaluation.final=metrics")
    options = [word for one in sets for word in ("--set", one)]
    with cluster(LaunchConfig(launcher="ray", num_workers=2)):
        from ray.util import placement_group, placement_group_table, remove_placement_group

        other = placement_group([{"CPU": 1}])
        assert other.wait(60)

        def free() -> None:
            wait_for(lambda: read_records(run / "records/steps.jsonl"), seconds=200, what="a step")
            (tmp_path / "free").touch()  # The next attempt makes no pauses.
            remove_placement_group(other)

        thread = threading.Thread(target=free)
        thread.start()
        code, output = cli(
            *("train", config, "--launcher", "ray", "--run-dir", run, *options),
            *("--set", "launch.num_workers={min: 1, max: 2}"),
        )
        thread.join()
        left = [group["state"] for group in placement_group_table().values()]
    assert code == 0, output
    assert set(left) == {"REMOVED"}
    one, two = attempts(run)
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["reason"] == "room for more: from 1 to 2 ranks"
    assert f"continuing at step {two['first_step']} of 24" in output
    assert 1 <= two["first_step"] < 24
    # Nothing is repeated: the first attempt ended with a checkpoint of its last step.
    lines = (run / "records/steps.jsonl").read_text().splitlines()
    assert len(lines) == 24
    assert_nothing_left(run)

    whole = ("train", str(config), "--run-dir", "whole", *options)
    done = forked(command, *whole, folder=tmp_path, world_size=1)
    assert not any(done.codes), done.output
    # The same images in the same batches; sums in another order alone make a difference.
    found, expected = samples(run), samples(tmp_path / "whole")
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert all(abs(a[2] - b[2]) < 1e-3 for a, b in zip(found, expected, strict=True))
