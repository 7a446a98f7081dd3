"""Points of a scaling study: sweeps multiplied out, their steps, runs and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dml_dist.config.load import differing_paths
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError
from dml_dist.runs.scaling import SCALE
from dml_dist.runs.study import is_below
from dml_dist.studies.scale import plan as plan_module
from dml_dist.studies.scale.grid import course_of, point_config, sizes_of
from dml_dist.studies.scale.plan import PlannedPoint, plan_points
from dml_dist.studies.scale.study import dry_run_scaling
from tests.scaling import scale_config

CLASSES = 8
"""Training classes of the small study: 10 without two for validation."""


def by_name(config: RunConfig) -> dict[str, PlannedPoint]:
    return {one.point.name: one for one in plan_points(config)}


def test_sweeps_multiply_out_and_meet(tmp_path: Path) -> None:
    config = scale_config(
        tmp_path,
        ranks={"world_size": [1, 2], "classes": [16]},
        weak={"world_size": [1, 2, 4], "scaling": "weak", "classes": [16]},
        classes={"classes": [16, 40], "proxies": ["replicated", "sharded"]},
        data={"loader_workers": [3], "tar_shards": [2], "data": ["local", "remote"]},
    )
    found = sizes_of(config, CLASSES)
    assert list(found) == [
        "w1-c8-workers3-shards2",
        "w1-c8-workers3-shards2-remote",
        "w1-c16",
        "w1-c40",
        "w1-c16-replicated",
        "w1-c40-replicated",
        "w2-c16",
        "w2-c16-b16",
        "w4-c16-b32",
    ]
    assert found["w4-c16-b32"].global_batch_size == 32
    assert found["w1-c8-workers3-shards2-remote"].remote


def test_all_points_see_equally_many_images(tmp_path: Path) -> None:
    config = scale_config(tmp_path)
    images = set()
    for batch in (4, 8, 16):
        course = course_of(config, batch)
        assert (course.warmup * batch, course.steps * batch) == (16, 32)
        assert course.warmup % course.log_every == course.steps % course.log_every == 0
        images.add(course.total * batch)
    assert images == {80}
    with pytest.raises(ConfigError, match=r"scale.warmup_steps 2 .* batches of 12.* multiple of 3"):
        course_of(config, 12)


def test_runs_differ_in_sizes_alone(tmp_path: Path) -> None:
    config = scale_config(
        tmp_path,
        'scale.backbones={wide: ["model.backbone.width=16"]}',
        sweep={"world_size": [2], "classes": [40], "backbone": ["wide"], "proxies": ["replicated"]},
    )
    (name, sizes), *_ = sizes_of(config, CLASSES).items()
    run = point_config(config, name, sizes, {"path": "/elsewhere"})
    assert run.model.backbone.width == 16
    assert (run.proxies.num_classes, run.proxies.placement) == (40, "replicated")
    assert (run.launch.launcher, run.launch.num_workers, run.data.path) == ("ray", 2, "/elsewhere")
    assert run.train.record_spans
    assert run.train.record_machine
    plain = config.model_copy(update={"scale": None})
    changed = [one.path for one in differing_paths(plain, run)]
    assert [path for path in changed if not is_below(path, SCALE.identity)] == []


def test_what_cannot_run_is_refused_and_the_rest_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = scale_config(
        tmp_path,
        few={"world_size": [8], "classes": [8]},
        below={"classes": [4]},
        many={"world_size": [1, 16], "classes": [8], "global_batch_size": [16]},
        large={"classes": [10_000_000]},
    )
    monkeypatch.setattr(
        plan_module.os, "sysconf", lambda key: {"SC_PAGE_SIZE": 4096}.get(key, 2**18)
    )
    found = by_name(config)
    problems = {name: one.point.problem for name, one in found.items()}
    assert {name for name, one in found.items() if one.point.status == "waiting"} == {
        "w1-c8-b16",
        "w8-c8",
    }
    assert "8 training classes and 16 ranks" in problems["w16-c8-b16"]
    assert "proxies.num_classes is 4, but there are 8" in problems["w1-c4"]
    # 10 M rows of 8 floats, with gradient and two moments, and a machine of 1 GiB.
    assert "need at least 1.2 GiB" in problems["w1-c10000000"]
    assert "this machine has 1.0 GiB" in problems["w1-c10000000"]
    console = Console(width=100)
    with console.capture() as capture:
        dry_run_scaling(config, console)
    text = capture.get()
    assert "2 of 5 points to measure" in text
    assert "w1-c4: refused: proxies.num_classes is 4" in text
    assert list(tmp_path.iterdir()) == []


def test_predictions_of_points(tmp_path: Path) -> None:
    config = scale_config(
        tmp_path, all={"world_size": [1, 2], "classes": [40], "proxies": ["sharded", "replicated"]}
    )
    found = {name: one.point for name, one in by_name(config).items()}
    assert found["w1-c40"].sent_predicted == 0
    sharded, replicated = found["w2-c40"], found["w2-c40-replicated"]
    assert (sharded.owned_rows, replicated.owned_rows) == (20, 40)
    gradients = sharded.gradient_bytes
    # Labels and embeddings of 4 rows; maxima and sums of statistics of 8 rows; the gradient of 8
    # rows, which gloo reduces on all ranks: twice the bytes of a ring.
    gathered = 4 * 8 + 4 * 8 * 4
    assert sharded.sent_predicted > gradients + gathered + 8 * 8 * 4
    # Labels, the loss, and the table's gradients.
    assert replicated.sent_predicted == gradients + 4 * 8 + 4 + 40 * 8 * 4
    assert replicated.memory_predicted > sharded.memory_predicted


@pytest.mark.parametrize(
    ("overrides", "sweep", "message"),
    [
        ((), {"world_size": [1, 1]}, r"world_size must have different values, got \[1, 1\]"),
        ((), {"backbone": ["wide"]}, "sweeps name the backbones wide, known are: there are none"),
        (("launch.launcher=inprocess",), {"world_size": [2]}, r"points of 2 ranks.*set it to ray"),
        (("validation={name: none}",), {}, "scale measures recall on validation classes"),
        (("compare={methods: {a: []}}", "train.steps=1"), {}, "are different studies"),
        (("data.dataset=null",), {"tar_shards": [2]}, "data.dataset is not set"),
        (("data.path=http://host/x", "data.dataset=null"), {}, "give a local folder"),
    ],
)
def test_bad_studies(
    tmp_path: Path, overrides: tuple[str, ...], sweep: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_points(scale_config(tmp_path, *overrides, one=sweep))
