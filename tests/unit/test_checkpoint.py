"""Checkpoints in one process: what is written, damaged ones, retention, what is refused."""

from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch

from dml_dist.errors import CheckpointError, RunError
from dml_dist.train.checkpoint_choice import best_checkpoint, load_model, select_checkpoint
from dml_dist.train.checkpoint_files import (
    checkpoint_folders,
    newest_checkpoint,
    read_manifest,
    verify_checkpoint,
)
from tests.training_setup import small_config, small_run, snapshot


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoint_folders(folder / "checkpoints")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with checkpoints at 3 and 6; copied by tests that change it."""
    folder = tmp_path_factory.mktemp("finished")
    small_run(folder, small_config(), scores={3: 0.5, 6: 0.4}).train()
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def test_what_a_checkpoint_holds(finished: Path) -> None:
    assert names(finished) == ["step_00000006-a1", "step_00000003-a1"]
    folder = finished / "checkpoints" / "step_00000006-a1"
    files = {path.name for path in folder.iterdir()}
    assert files == {"model.pt", "optim.pt", "proxies-0-7.pt", "manifest.json"}
    manifest = verify_checkpoint(folder)
    assert (manifest.step, manifest.epoch, manifest.samples_seen) == (6, 1, 55)
    assert (manifest.num_classes, manifest.num_images, manifest.world_size) == (7, 35, 1)
    assert json.loads((folder / "manifest.json").read_text())["config"]["seed"] == 3
    assert not list((finished / "checkpoints").glob(".*"))


def test_best_and_last(finished: Path) -> None:
    checkpoints = finished / "checkpoints"
    best = best_checkpoint(checkpoints)
    assert best is not None
    assert (best.folder, best.step, best.map_at_r) == ("step_00000003-a1", 3, 0.5)
    assert select_checkpoint(checkpoints, "best").name == "step_00000003-a1"
    assert select_checkpoint(checkpoints, "last").name == "step_00000006-a1"
    assert select_checkpoint(checkpoints, "step_00000006-a1").name == "step_00000006-a1"
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step_9'; give best, last or one of"):
        select_checkpoint(checkpoints, "step_9")


def test_the_network_of_a_checkpoint(finished: Path) -> None:
    config = small_config()
    folder = finished / "checkpoints" / "step_00000006-a1"
    model = load_model(folder, config.model, seed=0)
    assert not model.training
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"does not hold the network of the configuration"):
        load_model(folder, config.model.model_copy(update={"embedding_size": 9}), seed=0)


@pytest.mark.parametrize("damage", ["cut in half", "flipped byte", "missing file", "no manifest"])
@pytest.mark.parametrize("name", ["model.pt", "proxies-0-7.pt"])
def test_damaged_checkpoint_is_skipped(
    run: Path, damage: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run / "checkpoints" / "step_00000006-a1"
    path = folder / name
    data = bytearray(path.read_bytes())
    match damage:
        case "cut in half":
            path.write_bytes(data[: len(data) // 2])
        case "flipped byte":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "missing file":
            path.unlink()
        case _:
            (folder / "manifest.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(run / "checkpoints")
    assert found is not None
    assert found[1].step == 3
    (record,) = caplog.records
    assert str(folder) in record.getMessage()
    assert "step_00000003-a1 is used" in record.getMessage()


def test_run_resumes_from_the_checkpoint_before_a_damaged_one(run: Path) -> None:
    path = run / "checkpoints" / "step_00000006-a1" / "optim.pt"
    path.write_bytes(path.read_bytes()[:100])
    again = small_run(run, small_config(), attempt=2, scores={3: 0.5, 6: 0.4})
    result = again.train(resume=True)
    assert result.start_step == 3
    assert result.last.name == "step_00000006-a2"
    assert newest_checkpoint(run / "checkpoints") == (result.last, read_manifest(result.last))
    whole = small_run(run.parent / "whole", small_config()).train()
    one, two = snapshot(result.state), snapshot(whole.state)
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_all_checkpoints_damaged(run: Path) -> None:
    for folder in checkpoint_folders(run / "checkpoints"):
        (folder / "manifest.json").write_text(json.dumps({"format_version": 99}))
    with pytest.raises(CheckpointError, match=r"all 2 checkpoints in .* are damaged: .*format 99"):
        small_run(run, small_config(), attempt=2).train(resume=True)


def test_damaged_best_checkpoint_is_replaced_by_a_later_one(run: Path) -> None:
    path = run / "checkpoints" / "step_00000003-a1" / "model.pt"
    path.write_bytes(b"")
    config = small_config(train__steps=9)
    result = small_run(run, config, attempt=2, scores={9: 0.1}).train(resume=True)
    assert result.best is not None
    assert (result.best.step, result.best.map_at_r) == (9, 0.1)


def test_a_resumed_run_remembers_the_best_validation(run: Path) -> None:
    """0.5 at step 3 stays the best: 0.45 at step 9 is better than the last one alone."""
    longer = small_config(train__steps=9)
    result = small_run(run, longer, attempt=2, scores={9: 0.45}).train(resume=True)
    assert (result.start_step, result.state.step) == (6, 9)
    assert result.best is not None
    assert (result.best.folder, result.best.map_at_r) == ("step_00000003-a1", 0.5)
    assert best_checkpoint(run / "checkpoints") == result.best
    assert select_checkpoint(run / "checkpoints", "best").name == "step_00000003-a1"
    assert read_manifest(result.last).best == result.best
    again = small_run(run, longer, attempt=3).train(resume=True)
    assert again.best == result.best


def test_the_best_validation_is_that_of_the_checkpoint_resumed_from(tmp_path: Path) -> None:
    """Step 6 was the best, but is lost: 0.4 at step 3 is to be exceeded, and not 0.9."""
    small_run(tmp_path, small_config(), scores={3: 0.4, 6: 0.9}).train()
    checkpoints = tmp_path / "checkpoints"
    (checkpoints / "step_00000006-a1" / "optim.pt").write_bytes(b"")
    cut = small_run(tmp_path, small_config(), attempt=2, fail_at=4)
    with pytest.raises(KeyboardInterrupt):
        cut.train(resume=True)
    best_before = best_checkpoint(checkpoints)
    assert best_before is not None
    assert (best_before.folder, best_before.map_at_r) == ("step_00000003-a1", 0.4)
    for attempt, score, best in ((3, 0.3, "step_00000003-a1"), (4, 0.45, "step_00000006-a4")):
        again = small_run(tmp_path, small_config(), attempt=attempt, scores={6: score})
        result = again.train(resume=True)
        assert result.start_step == 3
        assert result.best is not None
        assert (result.best.folder, result.best.map_at_r) == (best, max(score, 0.4))
        assert best_checkpoint(checkpoints) == result.best
        (result.last / "optim.pt").write_bytes(b"")


@pytest.mark.parametrize(
    ("every", "save_every", "test_every", "validated", "tested", "saved"),
    [
        ("null", "null", "null", [4, 8, 10], [], [4, 8, 10]),
        (3, "null", "null", [3, 6, 9, 10], [], [3, 6, 9, 10]),
        (3, 4, "null", [3, 6, 9, 10], [], [3, 4, 8, 10]),
        ("null", 100, 5, [4, 8, 10], [5, 10], [4, 10]),
        (5, 10, "null", [5, 10], [], [5, 10]),
    ],
)
def test_when_a_run_validates_tests_and_saves(
    tmp_path: Path,
    every: int | str,
    save_every: int | str,
    test_every: int | str,
    validated: list[int],
    tested: list[int],
    saved: list[int],
) -> None:
    """10 steps of 4 an epoch; the first validation is the best, and is saved for that."""
    config = small_config(
        train__steps=10,
        evaluation__every_steps=every,
        evaluation__evaluate_test_every=test_every,
        checkpoint__every_steps=save_every,
        checkpoint__keep=10,
    )
    run = small_run(tmp_path, config, scores={step: 1 - step / 100 for step in range(11)})
    result = run.train()
    splits = {
        split: [s for name, s in run.evaluated if name == split] for split, _ in run.evaluated
    }
    assert splits == {"validation": validated} | ({"test": tested} if tested else {})
    assert names(tmp_path) == [f"step_{step:08d}-a1" for step in reversed(saved)]
    assert result.best is not None
    assert result.best.step == validated[0]


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    config = small_config(
        train__steps=8, checkpoint__every_steps=1, checkpoint__keep=2, evaluation__every_steps=2
    )
    small_run(tmp_path, config, scores={2: 0.1, 4: 0.9, 6: 0.9, 8: 0.3}).train()
    assert names(tmp_path) == ["step_00000008-a1", "step_00000007-a1", "step_00000004-a1"]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    def attempt(number: int, steps: int) -> None:
        config = small_config(checkpoint__every_steps=1, checkpoint__keep=2, train__steps=steps)
        run = small_run(tmp_path, config, attempt=number, validation=False)
        run.train(resume=True)

    attempt(1, 3)
    newest = tmp_path / "checkpoints" / "step_00000003-a1"
    (newest / "model.pt").write_bytes(b"")
    attempt(2, 3)
    assert names(tmp_path) == ["step_00000003-a2", "step_00000003-a1", "step_00000002-a1"]
    attempt(3, 4)
    assert names(tmp_path) == ["step_00000004-a3", "step_00000003-a2"]


def test_an_older_damaged_checkpoint_does_not_count_either(tmp_path: Path) -> None:
    keep = {"checkpoint__every_steps": 1, "checkpoint__keep": 3}
    small_run(tmp_path, small_config(**keep, train__steps=3), validation=False).train()
    path = tmp_path / "checkpoints" / "step_00000002-a1" / "optim.pt"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    longer = small_config(**keep, train__steps=4)
    small_run(tmp_path, longer, attempt=2, validation=False).train(resume=True)
    assert names(tmp_path) == [
        "step_00000004-a2",
        "step_00000003-a1",
        "step_00000002-a1",
        "step_00000001-a1",
    ]


def test_without_validation_the_last_is_the_result(tmp_path: Path) -> None:
    config = small_config(checkpoint__every_steps="null")
    result = small_run(tmp_path, config, validation=False).train()
    assert result.best is None
    assert names(tmp_path) == ["step_00000006-a1", "step_00000004-a1"]
    assert select_checkpoint(tmp_path / "checkpoints", "best") == result.last


def test_resume_without_checkpoint_starts_from_scratch(tmp_path: Path) -> None:
    result = small_run(tmp_path, small_config()).train(resume=True)
    assert (result.start_step, result.state.step) == (0, 6)


def test_a_finished_run_has_nothing_left_to_do(run: Path) -> None:
    again = small_run(run, small_config(), attempt=2)
    result = again.train(resume=True)
    assert (result.start_step, result.last.name) == (6, "step_00000006-a1")
    assert not again.seen


def test_resumable_changes_are_reported_and_others_refused(run: Path) -> None:
    longer = small_config(train__steps=8, checkpoint__keep=1, data__prefetch=2)
    result = small_run(run, longer, attempt=2).train(resume=True)
    changed = [change.path for change in result.changes]
    assert sorted(changed) == ["checkpoint.keep", "data.prefetch", "train.steps"]
    other = small_config(optim__lr=0.5, model__pooling="max", train__steps=9)
    with pytest.raises(CheckpointError) as caught:
        small_run(run, other, attempt=3).train(resume=True)
    assert "2 fields differ" in str(caught.value)
    assert "optim.lr: 0.01 -> 0.5" in str(caught.value)
    assert "model.pooling" in str(caught.value)
    assert "train.steps" not in str(caught.value)


def test_more_steps_under_a_cosine_are_refused(tmp_path: Path) -> None:
    cosine = {"schedule__name": "cosine", "schedule__warmup_steps": 1}
    small_run(tmp_path, small_config(**cosine)).train()
    longer = small_config(**cosine, train__steps=9)
    with pytest.raises(
        CheckpointError, match=r"has 6 steps in all, not 9.*schedule cosine depends"
    ):
        small_run(tmp_path, longer, attempt=2).train(resume=True)


def test_fewer_steps_than_already_made_are_refused(run: Path) -> None:
    shorter = small_config(train__steps=4)
    with pytest.raises(CheckpointError, match=r"-a1 has made 6 steps already, more than the 4"):
        small_run(run, shorter, attempt=2).train(resume=True)


def test_other_data_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.training_setup.NUM_CLASSES", 8)
    with pytest.raises(CheckpointError, match=r"35 images of 7 classes.*now has 40 images of 8"):
        small_run(run, small_config(), attempt=2).train(resume=True)


def test_weights_that_are_not_finite_are_neither_measured_nor_saved(tmp_path: Path) -> None:
    """A gradient can overflow where the loss is finite; only the weights tell."""
    config = small_config(
        optim__lr=1e39, optim__proxy_lr=0.1, checkpoint__every_steps=1, evaluation__every_steps=1
    )
    run = small_run(tmp_path, config)
    with pytest.raises(RunError, match=r"Weights in backbone\.0\.weight are not finite at step 1"):
        run.train()
    assert run.events[-1].loss is not None
    assert math.isfinite(run.events[-1].loss)
    assert run.evaluated == []
    assert names(tmp_path) == []


def test_files_of_a_killed_writer_are_removed(run: Path) -> None:
    stale = run / "checkpoints" / ".step_00000009-a1.tmp"
    stale.mkdir()
    (stale / "model.pt").write_bytes(b"half")
    small_run(run, small_config(train__steps=9), attempt=2).train(resume=True)
    assert not stale.exists()
    assert names(run)[0] == "step_00000009-a2"
