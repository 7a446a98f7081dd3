"""Training on 1, 2 and 3 ranks: the same weights, and errors that end all ranks."""

from __future__ import annotations

import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dml_dist.errors import DataError, RunError
from dml_dist.models.build_model import build_model
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.parallel.build_objective import build_objective
from dml_dist.parallel.comm import Comm
from dml_dist.runs.records import read_records
from dml_dist.topology import Topology
from dml_dist.train.checkpoint_files import checkpoint_folders
from dml_dist.train.state import distribute
from tests.ranks import RankFailure, run_ranks
from tests.training_setup import (
    IMAGES_PER_CLASS,
    NUM_CLASSES,
    SmallRun,
    global_rows,
    images_of,
    small_config,
    small_plan,
    snapshot,
    whole_snapshot,
)

HERE = "tests.distributed.test_training"


class HalfUsedBackbone(nn.Module):
    """A custom backbone with a layer that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 8
        self.used = nn.Conv2d(3, 8, 3, 2)
        self.unused = nn.Conv2d(3, 8, 3, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.used(images).relu()


class NormedBackbone(nn.Module):
    """A custom backbone with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 8
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def custom(name: str, more: str = "options: {}", module: str = HERE) -> str:
    return f"{{name: custom, target: '{module}:{name}', {more}}}"


CONFIGS: dict[str, dict[str, Any]] = {
    "adam": {"train__max_grad_norm": 0.3},
    "sgd": {
        "optim": "{name: sgd, lr: 0.05, head_lr: 0.1, bias_lr: 0.01, weight_decay: 0.01}",
        "train__backbone_warmup_epochs": 1,
        "model__pooling": "gem",
        "model__layer_norm": "true",
    },
    "half used": {"model__backbone": custom("HalfUsedBackbone"), "train__max_grad_norm": 0.3},
    "batch norm": {"model__backbone": custom("NormedBackbone")},
    # Positives are drawn, and steps 2 and 4 move dead proxies to images of the batch.
    "dynamic": {
        "model__normalize": "batch",
        "loss": "{name: proxy_nca, assignment: dynamic, proxy_share: 2, dead_after_steps: 2}",
    },
}


def train_all(topology: Topology, root: str) -> dict[str, Any]:
    """Train every configuration for 5 steps in float64; return the ranks' joined results."""
    comm = Comm.from_default_group()
    found: dict[str, Any] = {}
    for name, changes in CONFIGS.items():
        config = small_config(
            train__precision="float64", train__steps=5, train__log_every=1, **changes
        )
        folder = Path(root) / f"{name}-{topology.world_size}"
        result = SmallRun(topology, comm, config, folder).train()
        comm.barrier()
        records = [
            (r["step"], r["loss"], r.get("gradient_norm"))
            for r in read_records(folder / "steps.jsonl")
        ]
        found[name] = (whole_snapshot(result.state), records)
    return found


def test_weights_after_five_steps_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    expected = train_all(Topology(), str(tmp_path))
    norms = [norm for _, _, norm in expected["adam"][1]]
    assert min(norms) > 0.3  # clipping is at work
    unused = "model.backbone.unused.weight"
    initial = build_model(
        small_config(**CONFIGS["half used"]).model, seed=3, dtype=torch.float64
    ).state_dict()
    assert torch.equal(expected["half used"][0][unused], initial["backbone.unused.weight"])
    assert not any("unused" in name for name in expected["half used"][0] if "optim" in name)
    for world_size in (2, 3):
        for found in run_ranks(train_all, world_size, str(tmp_path)):
            for name, (tensors, records) in expected.items():
                assert found[name][0].keys() == tensors.keys()
                for key, value in tensors.items():
                    difference = float((found[name][0][key] - value).abs().max())
                    assert difference <= 1e-10, (world_size, name, key, difference)
                values = np.array(records, dtype=np.float64)
                np.testing.assert_allclose(
                    np.array(found[name][1], dtype=np.float64), values, rtol=1e-10
                )


def test_one_rank_trains_as_a_plain_loop(tmp_path: Path) -> None:
    """The formula written out: softmax cross-entropy over 2 s_x s_p cos, Adam, clipping."""
    config = small_config(train__precision="float64", train__steps=5)
    result = SmallRun(Topology(), Comm.single(), config, tmp_path).train()
    plan = small_plan(config, 1)
    model = build_model(config.model, seed=config.seed, dtype=torch.float64)
    proxies = build_objective(
        config.loss,
        num_classes=NUM_CLASSES,
        embedding_size=6,
        seed=config.seed,
        comm=Comm.single(),
        dtype=torch.float64,
    ).owned_parameters()["proxies"][0]
    optimizer = torch.optim.Adam(
        [{"params": [*model.parameters()]}, {"params": [proxies]}], fused=False
    )
    for step in range(5):
        rows = global_rows(step, plan)
        cosines = F.normalize(model(images_of(rows).double())) @ F.normalize(proxies).T
        loss = F.cross_entropy(2 * 3 * 3 * cosines, torch.from_numpy(rows // IMAGES_PER_CLASS))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([*model.parameters(), proxies], 1.0)
        for group, lr in zip(optimizer.param_groups, (0.01, 0.1), strict=True):
            group["lr"] = lr * min(1.0, (step + 1) / 3)
        optimizer.step()
    for name, value in result.state.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(result.state.owned["proxies"], proxies, rtol=0, atol=1e-6)


def troubles(topology: Topology, root: str) -> dict[str, Any]:
    """Meet a non-finite loss, a disk that is full on one rank, and unequal running statistics."""
    comm = Comm.from_default_group()
    found: dict[str, Any] = {}
    last = topology.world_size - 1

    run = SmallRun(topology, comm, small_config(train__steps=8), Path(root) / "loss")
    batches = run.batches

    def spoiled(start: int, end: int) -> Any:
        for batch in batches(start, end):
            if batch.step == 4 and topology.rank == last:
                batch.images[0, 0, 0, 0] = torch.nan
            yield batch

    run.batches = spoiled  # type: ignore[method-assign]
    with pytest.raises(RunError) as caught:
        run.train()
    found["loss"] = str(caught.value)

    run = SmallRun(topology, comm, small_config(), Path(root) / "disk")
    evaluate = run.evaluate

    def fill_disk(model: EmbeddingModel, split: Any, step: int) -> dict[str, float]:
        if step == 6 and topology.rank == last:
            resource.setrlimit(resource.RLIMIT_FSIZE, (400, resource.RLIM_INFINITY))
        return evaluate(model, split, step)

    run.evaluate = fill_disk  # type: ignore[method-assign]
    try:
        with pytest.raises(RunError) as caught:
            run.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    found["disk"] = str(caught.value)

    config = small_config(
        model__backbone=custom("NormedBackbone", "batch_norm: {statistics: per_rank}")
    )
    run = SmallRun(topology, comm, config, Path(root) / "norm")
    seen: list[list[Tensor]] = []

    def compare(model: EmbeddingModel, split: Any, step: int) -> dict[str, float]:
        seen.append([buffer.clone() for buffer in model.buffers()])
        return {"map_at_r": 0.5}

    run.evaluate = compare  # type: ignore[method-assign]
    run.train()
    found["norm"] = seen
    return found


@pytest.mark.parametrize("world_size", [1, 2])
def test_errors_end_all_ranks_and_keep_the_last_checkpoint(tmp_path: Path, world_size: int) -> None:
    root = str(tmp_path)
    ranks = (
        [troubles(Topology(), root)] if world_size == 1 else run_ranks(troubles, world_size, root)
    )
    for found in ranks:
        assert "not finite at step 5 (noticed at step 6)" in found["loss"]
        assert "step_00000003-a1 is kept" in found["loss"]
        assert "File too large" in found["disk"]
        assert "step_00000006-a1" in found["disk"]
        assert world_size == 1 or "rank 1 of 2" in found["disk"]
        for one, two in zip(found["norm"], ranks[0]["norm"], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    for name in ("loss", "disk"):
        checkpoints = tmp_path / name / "checkpoints"
        assert [path.name for path in checkpoint_folders(checkpoints)] == ["step_00000003-a1"]
        assert not list(checkpoints.glob(".*"))


def test_a_run_of_no_steps_keeps_the_network_as_it_is_given(tmp_path: Path) -> None:
    config = small_config(train__steps=0, schedule="{name: cosine, warmup_steps: 3}")
    for evaluated in ([("validation", 0)], []):  # The second finds the checkpoint of the first.
        run = SmallRun(Topology(), Comm.single(), config, tmp_path)
        result = run.train(resume=True)
        assert (result.state.step, result.last.name) == (0, "step_00000000-a1")
        assert run.evaluated == evaluated
    initial = build_model(config.model, seed=config.seed).state_dict()
    kept = result.state.model.state_dict()
    assert all(torch.equal(kept[name], value) for name, value in initial.items())


def test_reported_progress_and_records(tmp_path: Path) -> None:
    config = small_config(evaluation__evaluate_test_every=4, train__steps=5)
    run = SmallRun(Topology(), Comm.single(), config, tmp_path)
    run.train()
    assert run.evaluated == [("validation", 3), ("test", 4), ("validation", 5)]
    assert [(event.step, event.loss is None) for event in run.events] == [
        (0, True),
        (2, False),
        (3, False),
        (4, False),
        (5, False),
    ]
    records = read_records(tmp_path / "steps.jsonl")
    assert [record["step"] for record in records] == [2, 3, 4, 5]
    assert records[0]["lr"] == pytest.approx(0.01 * 2 / 3)
    assert (records[-1]["epoch"], records[-1]["samples_seen"]) == (1.25, 45)
    assert all(r["images_per_second"] > 0 and 0 <= r["data_share"] <= 1 for r in records)
    evaluations = read_records(tmp_path / "evaluations.jsonl")
    assert [(r["step"], r["split"], r["protocol"]) for r in evaluations] == [
        (3, "validation", "validation"),
        (4, "test", "literature"),
        (5, "validation", "validation"),
    ]


def test_nothing_is_measured_after_a_bad_loss(tmp_path: Path) -> None:
    config = small_config(
        train__log_every=100, evaluation__evaluate_test_every=3, checkpoint__every_steps=100
    )
    run = SmallRun(Topology(), Comm.single(), config, tmp_path, validation=False)
    batches = run.batches

    def spoiled(start: int, end: int) -> Any:
        for batch in batches(start, end):
            if batch.step == 1:
                batch.images[0] = torch.inf
            yield batch

    run.batches = spoiled  # type: ignore[method-assign]
    with pytest.raises(RunError, match=r"not finite at step 2 \(noticed at step 3\)") as caught:
        run.train()
    assert "loss nan" in str(caught.value)
    assert f"the worst sample is row {run.seen[1][0]}, " in str(caught.value)
    assert run.evaluated == []


def test_warm_up_leaves_the_backbone_as_it_is(tmp_path: Path) -> None:
    """Running statistics belong to it: 4 steps of warm-up, then one without."""
    config = small_config(
        model__backbone=custom("NormedBackbone"),
        train__backbone_warmup_epochs=1,
        train__steps=5,
        evaluation__every_steps=1,
    )
    run = SmallRun(Topology(), Comm.single(), config, tmp_path)
    seen: list[dict[str, Tensor]] = []

    def keep(model: EmbeddingModel, split: Any, step: int) -> dict[str, float]:
        seen.append({name: value.clone() for name, value in model.backbone.state_dict().items()})
        return {"map_at_r": 0.5}

    run.evaluate = keep  # type: ignore[method-assign]
    run.train()
    initial = build_model(config.model, seed=config.seed).backbone.state_dict()
    for found in seen[:4]:
        assert all(torch.equal(found[name], value) for name, value in initial.items())
    assert all(not torch.equal(seen[4][name], value) for name, value in initial.items())


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
@pytest.mark.parametrize("backbone", ["{name: conv4, width: 8}", custom("HalfUsedBackbone")])
def test_where_ddp_looks_for_parameters_without_a_gradient(
    device: str, backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever there may be some; DDP itself is not made, as there may be no GPU."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        "dml_dist.train.state.DistributedDataParallel", lambda _, **options: given.update(options)
    )
    model = build_model(small_config(model__backbone=backbone).model, seed=0)
    comm = SimpleNamespace(world_size=2, device=torch.device(device), group=None)
    distribute(model, cast(Comm, comm), any_may_be_unused="Half" in backbone)
    assert given["find_unused_parameters"] == ("Half" in backbone or device == "cpu")
    assert given["device_ids"] == (None if device == "cpu" else [torch.device(device)])


def lose_a_sample(topology: Topology, root: str) -> None:
    """Meet a damaged sample on rank 1 alone."""
    run = SmallRun(topology, Comm.from_default_group(), small_config(), Path(root))
    batches = run.batches

    def damaged(start: int, end: int) -> Any:
        for batch in batches(start, end):
            if batch.step == 2 and topology.rank == 1:
                raise DataError("train-000001.tar, sample 17: flipped byte")
            yield batch

    run.batches = damaged  # type: ignore[method-assign]
    run.train()


def test_a_damaged_sample_on_one_rank_ends_all_ranks(tmp_path: Path) -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(lose_a_sample, 2, str(tmp_path))
    message = str(caught.value)
    assert "DataError: train-000001.tar, sample 17: flipped byte" in message
    assert "PeerLostError: rank 0 of 2" in message


def test_lower_precision_is_for_the_backbone_alone(tmp_path: Path) -> None:
    run = SmallRun(Topology(), Comm.single(), small_config(train__precision="bf16"), tmp_path)
    state = run.train().state
    assert {value.dtype for value in snapshot(state).values()} == {torch.float32}
    SmallRun(Topology(), Comm.single(), small_config(), tmp_path / "full").train()
    low, full = (
        read_records(folder / "steps.jsonl")[0]["loss"] for folder in (tmp_path, tmp_path / "full")
    )
    assert low != full
    assert low == pytest.approx(full, rel=0.03)
