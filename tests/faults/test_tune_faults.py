"""Faults of a search: killed drivers and trials, signals, distributed trials that are pruned."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState

from dml_dist.config.load import dump_config, load_config
from dml_dist.runs.artifacts import read_metrics
from dml_dist.runs.tuning import trial_configs
from tests.e2e.test_tune import (
    assert_cluster_is_free,
    process_of,
    ray_cluster,
    search_file,
    status_of,
    trials_of,
    validated,
)
from tests.faults.runs import attempts, descendants, running, started, wait_for
from tests.nodes import ray_nodes

__all__ = ["ray_cluster"]

Cli = Callable[..., tuple[int, str]]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

RATES = [1e-2, 2e-2, 3e-3, 5e-3, 7e-3, 1e-3]


@pytest.fixture
def search(config_file: Path, tmp_path: Path) -> Path:
    """Six trials, all trained to their end, two at a time."""
    space = {"optim.lr": {"type": "categorical", "choices": RATES}}
    return search_file(
        config_file, tmp_path, trials=len(RATES), pruner={"name": "none"}, space=space
    )


def assert_equal_to_plain_training(
    config: Path, folder: Path, number: int, cli: Cli, tmp_path: Path
) -> None:
    """A trial that was killed and continued has the metrics of its configuration alone."""
    trial = trials_of(folder)[number]
    (alone,) = trial_configs(load_config(config), f"trial-{number}", trial.params)
    path = tmp_path / "alone.yaml"
    path.write_text(dump_config(alone))
    code, output = cli("train", path, "--run-dir", f"alone-{number}")
    assert code == 0, output
    expected = read_metrics(tmp_path / f"alone-{number}" / "metrics.json")["validation"]
    found = read_metrics(folder / "runs" / f"trial-{number}" / "metrics.json")["validation"]
    assert found == expected
    assert trial.value == expected["map_at_r"]


def test_killed_driver_and_killed_trial(search: Path, cli: Cli, tmp_path: Path) -> None:
    """The same command again continues all trials; none is lost, none starts from its beginning."""
    folder = tmp_path / "runs/search"
    with started("tune", search, cwd=tmp_path) as driver:
        wait_for(
            lambda: validated(folder / "runs/trial-1"), seconds=240, what="a validation of trial 1"
        )
        children = descendants(driver.pid)
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    # Ray's processes outlive the driver for a moment, in which a trial may still finish.
    wait_for(lambda: not any(map(running, children)), seconds=120, what="the end of Ray")
    killed_with_driver = [
        number
        for number in range(len(RATES))
        if (folder / f"runs/trial-{number}/run.json").is_file()
        and status_of(folder / f"runs/trial-{number}")["state"] == "running"
    ]
    assert {trial.state for trial in trials_of(folder)} >= {TrialState.RUNNING}

    with started("tune", search, cwd=tmp_path, name="second") as driver:
        wait_for(
            lambda: validated(folder / "runs/trial-3"), seconds=240, what="a validation of trial 3"
        )
        os.kill(process_of(folder / "runs/trial-3"), signal.SIGKILL)
        assert driver.wait(300) == 0, (tmp_path / "second").read_text()
    trials = trials_of(folder)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * len(RATES)
    assert [trial.params["optim.lr"] for trial in trials] == RATES
    starts = [len(attempts(folder / "runs" / f"trial-{number}")) for number in range(len(RATES))]
    expected = [1 + (number in killed_with_driver) + (number == 3) for number in range(len(RATES))]
    assert starts == expected
    assert killed_with_driver
    for number in (killed_with_driver[0], 3):
        assert_equal_to_plain_training(search, folder, number, cli, tmp_path)
    assert not (folder / ".ray").exists()
    print(f"starts per trial: {starts}")


def test_stop_by_signal_continues(search: Path, tmp_path: Path) -> None:
    """SIGTERM: checkpoints, exit code 1, the last line is the command that continues."""
    folder = tmp_path / "runs/search"
    with started("tune", search, cwd=tmp_path) as driver:
        wait_for(
            lambda: validated(folder / "runs/trial-1"), seconds=240, what="a validation of trial 1"
        )
        start = time.monotonic()
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(120) == 1
        print(f"stopped {time.monotonic() - start:.1f} s after the signal")
    output = (tmp_path / "output").read_text()
    assert output.splitlines()[-1].startswith("continue with: ")
    assert status_of(folder / "runs/trial-1")["reason"] == "SIGTERM"
    with started("tune", search, cwd=tmp_path, name="second") as driver:
        assert driver.wait(300) == 0, (tmp_path / "second").read_text()
    assert {trial.state for trial in trials_of(folder)} == {TrialState.COMPLETE}


def test_distributed_trials_that_are_pruned(
    config_file: Path, cli: Cli, tmp_path: Path, ray_cluster: None
) -> None:
    """Pruned trials of two ranks give everything back, and none waits for another's ranks."""
    config = search_file(config_file, tmp_path, trials=6, parallel=2)
    plain = yaml.safe_load(config.read_text())
    rates = [1e-2, *(number * 1e-12 for number in range(1, 6))]
    plain["tune"]["space"]["optim.lr"]["choices"] = rates
    plain["data"]["transform"]["options"]["pause"] = 0.03
    plain["launch"] |= {"launcher": "ray", "num_workers": 2}
    config.write_text(yaml.safe_dump(plain))
    start = time.monotonic()
    code, output = cli("tune", config)
    assert code == 0, output
    print(output, f"{time.monotonic() - start:.0f} s")
    folder = tmp_path / "runs/search"
    trials = trials_of(folder)
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert pruned
    assert {trial.state for trial in trials} == {TrialState.PRUNED, TrialState.COMPLETE}
    for trial in pruned:
        run = folder / "runs" / f"trial-{trial.number}"
        assert status_of(run)["state"] == "stopped"
        assert not (run / ".ray").exists()
        info = json.loads((run / "run.json").read_text())
        assert info["attempts"][0]["world_size"] == 2
    assert_cluster_is_free()
    assert not (folder / ".ray").exists()


def test_two_drivers(search: Path, cli: Cli, tmp_path: Path) -> None:
    """A second command on a search that is in progress is refused."""
    folder = tmp_path / "runs/search"
    with started("tune", search, cwd=tmp_path):
        wait_for(lambda: (folder / "tune.yaml").is_file(), seconds=120, what="the study")
        code, output = cli("tune", search)
        assert code == 2
        assert "another command works on" in output


def test_killed_node(search: Path, tmp_path: Path) -> None:
    """The trial of a node that is killed continues from its checkpoint on another node."""
    folder = tmp_path / "runs/search"
    with ray_nodes(2) as nodes:
        address = f"launch.address={nodes.address}"
        with nodes.command("tune", search, "--set", address, cwd=tmp_path) as driver:
            try:
                wait_for(
                    lambda: all(validated(folder / f"runs/trial-{number}") for number in (0, 1)),
                    seconds=300,
                    what="a validation on both nodes",
                )
                nodes.nodes[1].kill()
                assert driver.wait(400) == 0, (tmp_path / "output").read_text()
            finally:
                driver.kill()
    assert {trial.state for trial in trials_of(folder)} == {TrialState.COMPLETE}
    starts = [len(attempts(folder / "runs" / f"trial-{number}")) for number in range(len(RATES))]
    assert sorted(starts[:2]) == [1, 2]
    assert starts[2:] == [1] * (len(RATES) - 2)
