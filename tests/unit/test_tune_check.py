"""What is known of a search before it starts: what it costs, and what is refused."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dml_dist.config.load import parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError, TopologyError
from dml_dist.orchestration import launch
from dml_dist.studies.tune_check import check_search, dry_run_tuning

EPOCHS = "train={global_batch_size: 16, epochs: 3}"
NOT_PRUNED = {"pruner": {"name": "none"}}


def floats(low: float, high: float, **rest: Any) -> dict[str, Any]:
    return {"type": "float", "low": low, "high": high, **rest}


def integers(low: int, high: int, **rest: Any) -> dict[str, Any]:
    return {"type": "int", "low": low, "high": high, **rest}


LR = {"optim.lr": floats(1e-4, 1e-1, log=True)}


def search(*changes: str, **section: Any) -> RunConfig:
    """A search on 20 of 40 glyphs with 4 images each, 2 of them held out: 72 images."""
    return parse_config(
        {
            "name": "demo",
            "data": {
                "path": "nowhere/shards",
                "dataset": {"name": "glyphs", "num_classes": 40, "images_per_class": 4},
            },
            "train": {"global_batch_size": 16, "steps": 90},
            "evaluation": {"every_steps": 10, "recall_at": [1, 5]},
            "launch": {"use_gpu": "no"},
            "tune": {"space": LR, **section},
        },
        list(changes),
    )


METHODS = {
    "nca": [],
    "nir": ["nir={flow: {num_blocks: 1, depth: 2, width: 8}}"],
    "triplet": [
        "loss.name=triplet",
        "projections={lead_steps: 12, steps_per_problem: 30}",
        "data.batches={name: balanced, classes_per_batch: 4, samples_per_class: 4}",
    ],
}
SPACE = {
    **LR,
    "optim.proxy_lr": floats(1e-3, 1.0, log=True),
    "optim.loss_lr": floats(1e-3, 1.0, log=True),
    "nir.flow_weight": floats(0.01, 1.0),
    "projections.proximal_weight": floats(0.0, 1.0),
}
WITHOUT = {
    "nca": ["optim.loss_lr", "nir.flow_weight", "projections.proximal_weight"],
    "nir": ["projections.proximal_weight"],
    "triplet": ["optim.proxy_lr", "optim.loss_lr", "nir.flow_weight"],
}


def refused(config: RunConfig) -> str:
    with pytest.raises(ConfigError) as error:
        check_search(config)
    return str(error.value)


# ---------------------------------------------------------------- what a search will do


def test_a_trial_is_one_run_with_its_validations() -> None:
    plan = check_search(search(start=[{"optim.lr": 0.01}]))
    assert (plan.steps, plan.images, plan.world_size, plan.num_starts) == (90, 90 * 16, 1, 2)
    assert plan.validations == (10, 20, 30, 40, 50, 60, 70, 80, 90)
    assert plan.rungs == (10, 30)  # 90 is the end.
    assert "not imported yet" in plan.source
    assert list(plan.plans) == [None]
    assert plan.grid_size is None


def test_a_trial_with_folds_is_a_run_for_each() -> None:
    plan = check_search(search("evaluation.every_steps=40", folds=3))
    assert plan.steps == 270
    assert plan.validations == (40, 80, 90, 130, 170, 180, 220, 260, 270)
    assert plan.rungs == (40, 90)  # At steps 30 and 90.
    runs = plan.plans[None]
    assert [run.num_classes + run.num_validation_classes for run in runs] == [20, 20, 20]
    assert sum(run.num_validation_classes for run in runs) == 20


@pytest.mark.parametrize(
    ("pruner", "every", "rungs"),
    [
        ({"name": "asha", "grace_steps": 20, "reduction": 2}, 10, (20, 40, 80)),
        ({"name": "asha", "grace_steps": 25, "reduction": 2}, 10, (30, 50)),
        ({"name": "asha", "grace_steps": 2, "reduction": 2}, 40, (40, 40, 40, 40, 40, 80)),
        ({"name": "median"}, 10, ()),
        ({"name": "none"}, 100, ()),
    ],
)
def test_rungs_are_decided_at_the_next_validation(
    pruner: dict[str, Any], every: int, rungs: tuple[int, ...]
) -> None:
    config = search(f"evaluation.every_steps={every}", pruner=pruner)
    assert check_search(config).rungs == rungs


def test_validations_are_at_the_ends_of_epochs_by_default() -> None:
    plan = check_search(search("evaluation.every_steps=null", EPOCHS))
    assert plan.plans[None][0].steps_per_epoch == 4  # 72 images, the last 8 are dropped
    assert (plan.steps, plan.validations) == (12, (4, 8, 12))


def test_methods_have_their_own_plans_and_spaces() -> None:
    plan = check_search(search(space=SPACE, methods=METHODS, without=WITHOUT))
    assert list(plan.plans) == ["nca", "nir", "triplet"]
    assert [sum(runs[0].proxy_rows) for runs in plan.plans.values()] == [18, 18, 0]
    assert plan.num_starts == 3


def test_the_grid_is_counted_method_by_method() -> None:
    space = {"optim.lr": floats(0.1, 0.5, step=0.1), "optim.proxy_lr": floats(1, 3, step=1)}
    grid = {"sampler": {"name": "grid"}, "space": space}
    without = {"triplet": ["optim.proxy_lr"]}
    methods = {"nca": [], "triplet": ["loss.name=triplet"]}
    config = search("tune.trials=20", **grid, methods=methods, without=without)
    assert check_search(config).grid_size == 5 * 3 + 5
    message = refused(search("tune.trials=16", **grid))
    assert "tune.trials is 16, but the grid of tune.space has only 15 points" in message


# ---------------------------------------------------------------- the space


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("optim.lrr", "did you mean optim.lr?"),
        ("optimm.lr", "the configuration has no field optimm.lr; did you mean optim.lr?"),
        ("proxy_lr", "the configuration has no field proxy_lr; did you mean optim.proxy_lr?"),
        ("warmup", "no field warmup; did you mean nir.warmup_steps or schedule.warmup_steps?"),
        ("zzzz", "has no field zzzz; search fields below model, loss"),
        ("optim", "must be a section"),
        ("loss.scale", "it is a key with name: proxy_anchor"),
        ("train.steps", "tune.space cannot search train.steps: all trials share"),
        ("data.decoded_cache_mb", "tune.space cannot search data.decoded_cache_mb"),
        ("launch.num_workers", "tune.space cannot search launch.num_workers"),
        ("seed", "tune.space cannot search seed"),
    ],
)
def test_paths_that_cannot_be_searched(path: str, message: str) -> None:
    assert message in refused(search(space={**LR, path: integers(1, 2)}))


@pytest.mark.parametrize(
    ("path", "values", "message"),
    [
        ("loss.margin", floats(0.1, 4.5), "demo cannot take loss.margin = 0.1 of 0.1 to 4.5"),
        ("optim.lr", floats(0.0, 0.1), "optim.lr = 0 of 0 to 0.1; correct the range, or remove"),
        ("loss.label_smoothing", floats(0.0, 1.0), "must be a number >= 0 and < 1, got 1"),
        ("model.embedding_size", floats(8, 16), "must be an integer"),
        ("schedule.warmup_steps", {"type": "categorical", "choices": [5, "ten"]}, "'ten'"),
        # What only the plan knows.
        (
            "model.backbone.weights",
            {"type": "categorical", "choices": ["IMAGENET1K_V1", "IMAGENET1K_V9"]},
            "but 'IMAGENET1K_V9' is neither a name of resnet18 nor a file",
        ),
        ("train.global_batch_size", integers(2, 128), "global_batch_size = 128 of 2 to 128"),
        ("train.backbone_warmup_epochs", integers(0, 30), "the backbone would never be trained"),
    ],
)
def test_ranges_that_the_configuration_refuses(
    path: str, values: dict[str, Any], message: str
) -> None:
    backbone = "model.backbone={name: resnet18, weights: IMAGENET1K_V1}"
    changes = [backbone] if path == "model.backbone.weights" else []
    assert message in refused(search(*changes, space={**LR, path: values}))


def test_a_method_that_refuses_a_range_is_named() -> None:
    wide = {**SPACE, "projections.proximal_weight": floats(-1.0, 1.0)}
    message = refused(search(space=wide, methods=METHODS, without=WITHOUT))
    assert "triplet cannot take projections.proximal_weight = -1 of -1 to 1" in message
    assert "tune.without.triplet" in message


@pytest.mark.parametrize(
    ("method", "path", "message"),
    [
        ("triplet", "optim.proxy_lr", "whose loss triplet has no proxies"),
        ("nca", "optim.loss_lr", "whose loss proxy_nca has no parameters other than proxies"),
        ("nca", "nir.flow_weight", "would switch on nir, which is null in method nca"),
        ("nir", "projections.proximal_weight", "would switch on projections, which is null"),
    ],
)
def test_values_without_effect_are_refused(method: str, path: str, message: str) -> None:
    rest = [one for one in WITHOUT[method] if one != path]
    text = refused(search(space=SPACE, methods=METHODS, without={**WITHOUT, method: rest}))
    assert message in text
    assert f"name the path in tune.without.{method}" in text
    alone = refused(search(*METHODS[method], space={path: SPACE[path]}))
    assert f"tune.space: {path} " in alone
    assert "remove the path" in alone


def test_a_section_inside_a_section_is_not_switched_on() -> None:
    space = {**LR, "projections.mining.neighbors_per_class": integers(1, 3)}
    message = refused(search(*METHODS["triplet"], space=space))
    assert "would switch on projections.mining, which is null" in message


def test_methods_and_starting_points_must_be_possible() -> None:
    config = search(methods={"nca": [], "wide": ["train.global_batch_size=128"]})
    assert "method wide" in refused(config)
    config = search(methods={"nca": [], "long": ["train.steps=100"]})
    assert "tune.methods.long changes fields that must be the same" in refused(config)
    space = {"loss.denominator": {"type": "categorical", "choices": ["all", "negatives"]}}
    space["loss.label_smoothing"] = floats(0.0, 0.5)
    start = [{}, {"loss.denominator": "negatives", "loss.label_smoothing": 0.1}]
    message = refused(search(space=space, start=start))
    assert message.startswith("tune.start.1 makes no valid trial:")
    assert "label_smoothing 0.1 needs denominator: all" in message


def test_all_trials_have_the_same_number_of_steps() -> None:
    space = {"train.global_batch_size": integers(8, 16, step=8)}
    assert check_search(search(space=space)).steps == 90
    message = refused(search(EPOCHS, space=space))
    assert "train.global_batch_size = 8" in message
    assert "set train.steps instead of train.epochs" in message
    folds = "train={global_batch_size: 8, epochs: 3}"  # 6 or 7 steps of 52 or 56 images
    message = refused(search(folds, "tune.folds=3", **NOT_PRUNED))
    assert re.search(r"runs of 21 and of 18 \(fold [12] of demo\)", message)


# ---------------------------------------------------------------- objectives, pruner, devices


@pytest.mark.parametrize("metric", ["map_at_r", "r_precision", "recall_at_5"])
def test_metrics_that_validations_record(metric: str) -> None:
    check_search(search(objectives=[{"metric": metric}]))


@pytest.mark.parametrize("metric", ["recall_at_2", "nmi", "density", "loss", "num_queries"])
def test_metrics_that_no_validation_records(metric: str) -> None:
    message = refused(search(objectives=[{"metric": metric}]))
    assert f"do not record {metric}; they record map_at_r, r_precision, recall_at_1, recall" in (
        message
    )


def test_structure_is_recorded_with_nir_in_all_methods() -> None:
    section: dict[str, Any] = {"objectives": [{"metric": "uniformity", "direction": "minimize"}]}
    assert check_search(search(*METHODS["nir"], **section)).steps == 90
    methods = {"nir": METHODS["nir"], "nca": []}
    assert "validations of method nca do not record" in refused(search(methods=methods, **section))


def test_pruning_needs_values_during_a_trial() -> None:
    seconds: dict[str, Any] = {"metric": "train_seconds", "direction": "minimize"}
    message = refused(search(objectives=[seconds]))
    assert "train_seconds is known only at their end" in message
    check_search(search(objectives=[seconds], **NOT_PRUNED))
    check_search(search(objectives=[{"metric": "map_at_r"}, seconds], **NOT_PRUNED))


@pytest.mark.parametrize("name", ["asha", "median"])
def test_pruning_needs_a_validation_before_the_end(name: str) -> None:
    pruner = {"name": name, "grace_steps": 90}
    assert "grace_steps 90 must be below the 90 steps of a trial" in refused(search(pruner=pruner))
    pruner["grace_steps"] = 81
    message = refused(search(pruner=pruner))
    assert "from step 81 on, but a trial of 90 steps has none between" in message
    assert "evaluation.every_steps is 10" in message
    pruner["grace_steps"] = 80
    check_search(search(pruner=pruner))
    once = "evaluation.every_steps=90"
    assert "evaluation.every_steps is 90" in refused(search(once))
    check_search(search(once, folds=2))  # The end of the first fold.
    check_search(search(once, **NOT_PRUNED))


def test_more_gpus_than_this_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "available_gpus", lambda: 2)
    ray = ("launch.launcher=ray", "launch.num_workers=3", "launch.use_gpu=yes")
    with pytest.raises(TopologyError, match="needs 3 GPUs on this machine, it has 2"):
        check_search(search(*ray))
    assert check_search(search(*ray, "launch.address=elsewhere:6379")).world_size == 3


# ---------------------------------------------------------------- dry run


def test_a_dry_run_says_what_will_be_done_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    config = search("tune.trials=27", "optim.lr=0.5", space=SPACE, methods=METHODS, without=WITHOUT)
    dry_run_tuning(config, Console(file=out, width=120))
    text = out.getvalue()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    rows = {row[0]: row[1:] for row in cells if row and row[0]}
    assert rows["optim.lr"] == ["0.0001 to 0.1 (log)", "0.5 (outside)", "nca"]
    assert rows["nir.flow_weight"] == ["0.01 to 1", "1", "nir"]
    assert rows["optim.proxy_lr"] == ["0.001 to 1 (log)", "null (outside)", "nca"]
    assert rows["objective"] == ["maximize map_at_r on validation classes"]
    assert rows["trials"] == ["27, the first 2 with own values"]  # Method nca has none
    assert rows["steps of a trial"] == ["90, 9 validations"]
    assert "step 10: reached by about 27 trials" in text
    assert "step 30: reached by about 9 trials" in text
    assert "the end: about 3 trials" in text
    # 27 x 10 + 9 x 20 + 3 x 60
    assert rows["steps in all"] == ["about 630 of 2,430 without pruning"]
    assert rows["images in all"] == [f"at most {2430 * 16:,}"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "pruner", "steps"),
    [
        ("none", "none: every trial is trained to its end", "2,880"),
        ("median", "median, from step 10 on", "at most 2,880"),
    ],
)
def test_a_dry_run_of_other_pruners(name: str, pruner: str, steps: str) -> None:
    out = io.StringIO()
    config = search(pruner={"name": name}, start=[{"optim.lr": 0.01}], parallel=3)
    dry_run_tuning(config, Console(file=out, width=120))
    assert f"│ {pruner}" in out.getvalue()
    assert f"│ {steps}" in out.getvalue()
    assert "│ 32, the first 2 with own values or those of tune.start" in out.getvalue()
    assert "│ trials at a time │ 3 " in out.getvalue()
