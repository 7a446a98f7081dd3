"""Runs of losses with parameters of their own: equal for any ranks, clipped, resumed exactly."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dml_dist.errors import CheckpointError
from dml_dist.parallel.comm import Comm
from dml_dist.topology import Topology
from dml_dist.train.checkpoint import load_checkpoint
from dml_dist.train.checkpoint_files import verify_checkpoint
from dml_dist.train.state import build_state
from tests.distributed.test_resume import AT_THREE, interrupted, losses, same
from tests.ranks import run_ranks
from tests.training_setup import SmallRun, small_config, snapshot, whole_snapshot

FLOW = "flow: {num_blocks: 2, depth: 3, width: 16}"
RUNS = {
    "scalar": {"loss": "{name: margin, beta_form: scalar, nu: 0.5}"},
    "class": {"loss": "{name: margin, beta_form: class, nu: 0.5}"},
    "triplet": {"loss": "{name: triplet, margin: 0.3, mining: semi_hard}"},
    "flow": {
        "loss": "{name: proxy_anchor}",
        "nir": "{noise: 0.05, warmup_steps: 2, flow_weight: 0.1, " + FLOW + "}",
    },
    "exponential": {
        "loss": "{name: proxy_nca, proxies_per_class: 2}",
        "nir": "{link: exp, loss_weight: 0.3, " + FLOW + "}",
    },
    # More ranks could hold it than it has classes with images.
    "replicated": {
        "loss": "{name: normalized_softmax}",
        "proxies": "{placement: replicated, num_classes: 9}",
    },
}
CHANGES = {"optim__loss_lr": 0.05, "train__precision": "float64", "train__max_grad_norm": 0.05}


def betas(values: dict[str, Tensor]) -> Tensor:
    """Return what the loss learns, empty for one that learns nothing."""
    found = [v.reshape(-1) for k, v in values.items() if k.startswith(("replicated.", "owned."))]
    return torch.cat(found) if found else torch.empty(0)


def train_and_interrupt(topology: Topology, root: str) -> dict[str, dict[str, Tensor]]:
    """Train whole and interrupted; return the final snapshots, which must not differ."""
    comm = Comm.from_default_group()
    found = {}
    for name, changes in RUNS.items():
        config = small_config(train__steps=6, **changes, **CHANGES)
        folder = Path(root) / f"{name}-{topology.world_size}"
        whole = SmallRun(topology, comm, config, folder / "whole").train()
        cut = interrupted(SmallRun(topology, comm, config, folder / "cut"))
        assert same(snapshot(whole.state), cut) == [], name
        if topology.is_main:
            assert losses(folder / "whole") == losses(folder / "cut")
        found[name] = whole_snapshot(whole.state)
    return found


def go_on(topology: Topology, root: str, saved_by: int) -> dict[str, dict[str, Tensor]]:
    """Go on from another number of ranks' checkpoint of step 3; return the final snapshots."""
    comm = Comm.from_default_group()
    found = {}
    for name, changes in RUNS.items():
        config = small_config(train__steps=6, **changes, **CHANGES)
        folder = Path(root) / f"{name}-{saved_by}-to-{topology.world_size}"
        if topology.is_main:
            source = Path(root) / f"{name}-{saved_by}" / "whole" / "checkpoints" / AT_THREE
            shutil.copytree(source, folder / "checkpoints" / AT_THREE)
        comm.barrier()
        run = SmallRun(topology, comm, config, folder, attempt=2)
        result = run.train(resume=True)
        assert result.start_step == 3
        found[name] = whole_snapshot(result.state)
    return found


def test_any_ranks_and_any_resumption_give_the_same_weights(tmp_path: Path) -> None:
    """1, 2, 3 ranks, and 2 -> 3 and 3 -> 1 at step 3, end alike to 1e-10, betas and flows too."""
    root = str(tmp_path)
    alone = train_and_interrupt(Topology(), root)
    others = {
        "2": run_ranks(train_and_interrupt, 2, root),
        "3": run_ranks(train_and_interrupt, 3, root),
        "2 to 3": run_ranks(go_on, 3, root, 2),
        "3 to 1": [go_on(Topology(), root, 3)],
    }
    for what, ranks in others.items():
        for found in ranks:
            for name, values in found.items():
                for key, value in values.items():
                    difference = float((value - alone[name][key]).abs().max())
                    assert difference <= 1e-10, (what, name, key, difference)
    assert betas(alone["scalar"]).shape == (1,)
    assert len(betas(alone["class"])) == 7
    for name in ("scalar", "class"):
        assert float((betas(alone[name]) - 1.2).abs().max()) > 0.01
    for name in ("flow", "exponential"):
        assert any(key.startswith("replicated.flow.") for key in alone[name])


def test_another_loss_in_the_checkpoint_is_refused(tmp_path: Path) -> None:
    """A checkpoint without beta, or with one that the loss does not learn."""
    folders = {}
    for name in ("scalar", "triplet"):
        config = small_config(train__steps=3, **RUNS[name], **CHANGES)
        SmallRun(Topology(), Comm.single(), config, tmp_path / name).train()
        folders[name] = tmp_path / name / "checkpoints" / AT_THREE
    for name, other in (("scalar", "triplet"), ("triplet", "scalar")):
        config = small_config(**RUNS[name], **CHANGES)
        state = build_state(config, num_classes=7, comm=Comm.single())
        with pytest.raises(CheckpointError, match="use the loss the checkpoint was saved with"):
            load_checkpoint(folders[other], verify_checkpoint(folders[other]), state)
