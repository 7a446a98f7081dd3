"""Resumed runs against uninterrupted ones: bit for bit on equal ranks, exact on others."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dml_dist.config.schema import RunConfig
from dml_dist.errors import CheckpointError
from dml_dist.parallel.comm import Comm
from dml_dist.runs.records import read_records
from dml_dist.topology import Topology
from dml_dist.train.checkpoint import load_checkpoint
from dml_dist.train.checkpoint_files import checkpoint_folders, verify_checkpoint
from dml_dist.train.state import build_state
from tests.ranks import run_ranks
from tests.training_setup import SmallRun, small_config, snapshot, whole_snapshot

TOLERANCE = {"float32": 1e-6, "float64": 1e-10}
AT_THREE = "step_00000003-a1"


class DropoutBackbone(nn.Module):
    """A custom backbone that draws random numbers, with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 8
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """Return the names in which two snapshots differ in any bit."""
    assert one.keys() == two.keys()
    return [name for name in one if not torch.equal(one[name], two[name])]


def interrupted(run: SmallRun) -> dict[str, Tensor]:
    """Train until step 5, resume from the checkpoint of step 3, and return the final snapshot."""
    run.fail_at = 5
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.comm.barrier()
    run.fail_at, run.attempt = None, 2
    result = run.train(resume=True)
    assert result.start_step == 3
    return snapshot(result.state)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    return [(r["step"], r["loss"], r["lr"]) for r in read_records(folder / "steps.jsonl")]


def unexpected(run: SmallRun) -> list[str]:
    """Return what differs from steps and learning rates worked by hand, on the main rank.

    8 steps, validated and saved every 3 and at the end; logged every 2 and at each pause; 3 steps
    of warm-up, whose factors are 1/3, 2/3 and 1.
    """
    lr = run.config.optim.lr
    records = [(step, rate / lr) for step, _, rate in losses(run.folder)]
    saved = {path.name[:13] for path in checkpoint_folders(run.folder / "checkpoints")}
    found = {
        "validations": run.evaluated == [("validation", step) for step in (3, 6, 8)],
        "records": np.allclose(records, [(2, 2 / 3), (3, 1), (4, 1), (6, 1), (8, 1)]),
        "checkpoints": saved == {"step_00000003", "step_00000006", "step_00000008"},
    }
    return [f"{name} are not as worked by hand" for name, fits in found.items() if not fits]


def repeat_exactly(topology: Topology, root: str) -> list[str]:
    """Compare an interrupted run with an uninterrupted one; return what differs on this rank."""
    comm = Comm.from_default_group()
    problems = []
    for name, changes in {
        "adam": {},
        "sgd": {"optim": "{name: sgd, lr: 0.05, weight_decay: 0.01}"},
        "dropout": {
            "model__backbone": "{name: custom, target: 'tests.distributed.test_resume:"
            "DropoutBackbone'}",
            "train__backbone_warmup_epochs": 1,
        },
    }.items():
        config = small_config(train__steps=8, **changes)
        folder = Path(root) / f"{name}-{topology.world_size}"
        run = SmallRun(topology, comm, config, folder / "whole")
        whole = run.train()
        if topology.is_main:
            problems += [f"{name}: {text}" for text in unexpected(run)]
        cut = interrupted(SmallRun(topology, comm, config, folder / "cut"))
        problems += [f"{name}: {tensor}" for tensor in same(snapshot(whole.state), cut)]
        if topology.is_main and losses(folder / "whole") != losses(folder / "cut"):
            problems.append(f"{name}: records")
    return problems


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resume_on_equal_ranks_is_bit_for_bit(tmp_path: Path, world_size: int) -> None:
    if world_size == 1:
        assert repeat_exactly(Topology(), str(tmp_path)) == []
    else:
        found = run_ranks(repeat_exactly, world_size, str(tmp_path))
        assert found == [[]] * world_size


def _config(precision: str) -> RunConfig:
    """Four steps: in float32 with drawn negatives, in float64 with dynamic assignment.

    The latter counts, and revives proxies in step 4.
    """
    losses = {
        "float32": "{name: cosface, scale: 16, negatives_share: 0.4}",
        "float64": "{name: proxy_nca, assignment: dynamic, proxy_share: 2, dead_after_steps: 2, "
        "revive_dead: true}",
    }
    config = {"train__precision": precision, "train__steps": 4, "loss": losses[precision]}
    return small_config(**config)


def save_and_step(topology: Topology, root: str) -> dict[str, Any]:
    """Train 4 steps with a checkpoint at step 3; return what the ranks had at 3 and at 4."""
    comm = Comm.from_default_group()
    found: dict[str, Any] = {}
    for precision in TOLERANCE:
        config = _config(precision)
        run = SmallRun(topology, comm, config, Path(root) / f"{precision}-{topology.world_size}")
        result = run.train()
        at_three = build_state(config, num_classes=run.plan.num_classes, comm=comm)
        folder = run.folder / "checkpoints" / AT_THREE
        load_checkpoint(folder, verify_checkpoint(folder), at_three)
        found[precision] = (whole_snapshot(at_three), whole_snapshot(result.state), run.seen[3])
    return found


def load_and_step(topology: Topology, root: str, saved_by: int) -> dict[str, Any]:
    """Resume from another number of ranks' checkpoint of step 3 for one step."""
    comm = Comm.from_default_group()
    found: dict[str, Any] = {}
    for precision in TOLERANCE:
        config = _config(precision)
        folder = Path(root) / f"{precision}-{saved_by}-to-{topology.world_size}"
        if topology.is_main:
            source = Path(root) / f"{precision}-{saved_by}" / "checkpoints" / AT_THREE
            shutil.copytree(source, folder / "checkpoints" / AT_THREE)
        comm.barrier()
        run = SmallRun(topology, comm, config, folder, attempt=2)
        loaded = build_state(config, num_classes=run.plan.num_classes, comm=comm)
        checkpoint = folder / "checkpoints" / AT_THREE
        load_checkpoint(checkpoint, verify_checkpoint(checkpoint), loaded)
        result = run.train(resume=True)
        assert (result.start_step, result.state.step) == (3, 4)
        found[precision] = (whole_snapshot(loaded), whole_snapshot(result.state), run.seen[0])
    return found


def test_resume_on_another_number_of_ranks(tmp_path: Path) -> None:
    """2 -> 3 -> 1 in loading; each continues with the same batch to the same weights."""
    root = str(tmp_path)
    saved = {2: run_ranks(save_and_step, 2, root), 3: run_ranks(save_and_step, 3, root)}
    loaded = {
        2: run_ranks(load_and_step, 3, root, 2),
        3: [load_and_step(Topology(), root, 3)],
    }
    for saved_by, ranks in loaded.items():
        for found in ranks:
            for precision, tolerance in TOLERANCE.items():
                before, after, rows = saved[saved_by][0][precision]
                assert same(before, found[precision][0]) == []
                assert np.array_equal(rows, found[precision][2])
                for name, value in after.items():
                    difference = (value - found[precision][1][name]).abs().max()
                    assert float(difference) <= tolerance, (saved_by, precision, name)


def fail_to_load(topology: Topology, root: str) -> str:
    """Load a checkpoint that the last rank cannot unpickle; return this rank's error."""
    comm = Comm.from_default_group()
    run = SmallRun(topology, comm, small_config(train__steps=3), Path(root) / "run")
    run.train()
    folder = run.folder / "checkpoints" / AT_THREE
    manifest = verify_checkpoint(folder)
    if topology.rank == topology.world_size - 1:
        folder = Path(shutil.copytree(folder, Path(root) / "own"))
        (folder / "model.pt").write_bytes(b"not written by torch")
    loaded = build_state(run.config, num_classes=run.plan.num_classes, comm=comm)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, manifest, loaded)
    return str(caught.value)


def test_an_unreadable_checkpoint_on_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    for message in run_ranks(fail_to_load, 2, str(tmp_path), timeout=20.0):
        assert message.startswith("rank 1 of 2: ")
        assert "does not hold the state of this network" in message
        assert "UnpicklingError" in message
