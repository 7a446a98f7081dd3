"""A search of values from its command to its page, on a real Ray cluster."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest
import yaml
from optuna.trial import TrialState

from dml_dist.config.launch import LaunchConfig
from dml_dist.config.load import load_config
from dml_dist.orchestration.ray_launch import cluster
from dml_dist.runs.records import read_records
from dml_dist.runs.tuning import TuningFolder
from dml_dist.studies.storage import load_study
from dml_dist.train.checkpoint_files import checkpoint_folders, is_whole
from tests.e2e.conftest import REPOSITORY
from tests.faults.runs import act, attempts, wait_for

Cli = Callable[..., tuple[int, str]]

STEPS, EVERY = 24, 6
TRAINS, DOES_NOT = 1e-2, 1e-12


def search_file(config_file: Path, tmp_path: Path, **tune: object) -> Path:
    """Write a search over learning rates, of which all but the first do not train anything.

    Steps take so long that a trial can be stopped between two validations.
    """
    plain = yaml.safe_load(act(config_file, mark=tmp_path / "none", pause=0.006).read_text())
    plain["name"] = "search"
    plain["train"] |= {"steps": STEPS, "log_every": 1}
    plain["evaluation"] |= {"every_steps": EVERY, "metrics": []}
    plain["checkpoint"] = {"every_steps": STEPS}
    rates = [TRAINS, DOES_NOT, 2 * DOES_NOT, 3 * DOES_NOT]
    plain["tune"] = {
        "trials": 4,
        "parallel": 2,
        "sampler": {"name": "grid"},
        "pruner": {"name": "asha", "grace_steps": EVERY, "reduction": 2},
        "space": {"optim.lr": {"type": "categorical", "choices": rates}},
        **tune,
    }
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cluster that outlives the command, so that what a search leaves in it can be seen."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    with cluster(LaunchConfig(num_workers=5)):
        yield


def assert_cluster_is_free() -> None:
    """No actor, placement group or resource is in use."""
    import ray

    groups = ray.util.placement_group_table().values()
    assert {group["state"] for group in groups} <= {"REMOVED"}
    assert ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"]


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return load_study(TuningFolder(folder)).get_trials(deepcopy=False)


def status_of(run: Path) -> dict[str, object]:
    status: dict[str, object] = json.loads((run / "run.json").read_text())["status"]
    return status


def process_of(run: Path) -> int:
    """The process that holds the lock of a run."""
    found = re.search(r"process (\d+) on", (run / ".lock").read_text())
    assert found is not None
    return int(found[1])


def validated(run: Path) -> bool:
    """Whether a run has a validation and goes on."""
    path = run / "records/evaluations.jsonl"
    return path.is_file() and path.stat().st_size > 0 and status_of(run)["state"] == "running"


def kill_when_validated(run: Path) -> None:
    wait_for(lambda: validated(run), seconds=120, what="a validation")
    os.kill(process_of(run), signal.SIGKILL)


@pytest.mark.timeout(400)
def test_search_and_what_follows(
    config_file: Path, cli: Cli, tmp_path: Path, ray_cluster: None
) -> None:
    config = search_file(config_file, tmp_path)
    folder = tmp_path / "runs/search"
    killer = threading.Thread(target=kill_when_validated, args=(folder / "runs/trial-0",))
    killer.start()
    code, output = cli("tune", config)
    killer.join()
    assert code == 0, output
    assert "\u250f" not in output  # Quiet without a terminal: no table, a line for each trial.
    trials = trials_of(folder)
    assert [trial.params["optim.lr"] for trial in trials] == [
        TRAINS,
        DOES_NOT,
        2 * DOES_NOT,
        3 * DOES_NOT,
    ]
    assert "trial-0: its process died and continues" in output
    assert "Traceback" not in output
    # The process of the first trial was killed: it went on from its checkpoint.
    assert trials[0].state == TrialState.COMPLETE
    starts = [len(attempts(folder / f"runs/trial-{number}")) for number in range(4)]
    assert starts == [2, 1, 1, 1]
    pruned = [trial for trial in trials if trial.state == TrialState.PRUNED]
    assert pruned
    for trial in trials:
        run = folder / "runs" / f"trial-{trial.number}"
        recorded = {
            record["step"]: record["map_at_r"]
            for record in read_records(run / "records/evaluations.jsonl")
        }
        # The run goes on until it is asked to stop; later values no longer count.
        end = trial.user_attrs.get("pruned_at", STEPS)
        kept = {step: value for step, value in recorded.items() if step <= end}
        assert trial.intermediate_values == kept
        if trial in pruned:
            status = status_of(run)
            assert status["state"] == "stopped"
            assert max(recorded) <= int(str(status["step"])) < STEPS
            assert any(is_whole(one) for one in checkpoint_folders(run / "checkpoints"))
        else:
            assert trial.value == max(recorded.values())
            assert status_of(run)["state"] == "finished"
    assert_cluster_is_free()
    assert not (folder / ".ray").exists()
    assert (folder / "report/index.html").is_file()

    # The best configuration is one that `train` takes.
    best = load_config(folder / "best.yaml")
    assert best.optim.lr == TRAINS
    assert best.tune is None

    # A pruned trial goes on from its checkpoint, in its own run folder.
    number = pruned[0].number
    code, output = cli("tune", config, "--continue-trial", number)
    assert code == 0, output
    run = folder / "runs" / f"trial-{number}"
    assert status_of(run)["state"] == "finished"
    assert len(attempts(run)) == 2
    last = trials_of(folder)[-1]
    assert last.state == TrialState.COMPLETE
    assert last.params == pruned[0].params
    assert trials_of(folder)[number].state == TrialState.PRUNED

    # What is no continuation of this search is refused before anything starts.
    for arguments, message in (
        (("--set", "optim.weight_decay=0.5"), "optim.weight_decay"),
        (("--continue-trial", 0), "--continue-trial 0 is no pruned trial"),
        (
            ("--run-dir", "other", "--set", "tune.objectives=[{metric: density}]"),
            "do not record density",
        ),
    ):
        code, output = cli("tune", config, *arguments)
        assert code == 2
        assert message in output

    # The same command again finds nothing to do.
    code, output = cli("tune", config)
    assert code == 0, output
    assert len(trials_of(folder)) == 5
    assert_cluster_is_free()
