"""Real images through the commands: import, train, evaluate, by the shipped configurations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import REPOSITORY

Cli = Callable[..., tuple[int, str]]


@pytest.mark.parametrize(
    ("source", "config", "num_images", "num_queries", "steps", "gain"),
    [
        # Forty steps are few, yet on characters they beat the untrained network clearly.
        ("omniglot_small", "omniglot", 4840, 2420, 40, 1.2),
        # Photographs take longer to learn: here the way is tested, greyscale images included.
        ("tiny_imagenet_50", "tiny_imagenet", 5000, 2500, 10, 0.0),
    ],
)
def test_import_train_evaluate(
    source: str,
    config: str,
    num_images: int,
    num_queries: int,
    steps: int,
    gain: float,
    real_images: Path,
    cli: Cli,
    tmp_path: Path,
) -> None:
    folder = next((real_images / source).iterdir())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / source).symlink_to(folder)
    code, output = cli(
        *("data", "import", "folder", "--source", f"data/{source}", "--out", f"data/{config}"),
        *("--split", "train=0.5", "--by", "class"),
    )
    assert code == 0, output
    assert f"{num_images:,} images" in output
    changes = {
        "train.steps": steps,
        "schedule.warmup_steps": 5,
        "evaluation.every_steps": steps,
        "model.backbone.width": 32,
    }
    code, output = cli(
        *("train", REPOSITORY / "configs" / f"{config}.yaml", "--launcher", "inprocess"),
        *("--run-dir", "run"),
        *(part for path, value in changes.items() for part in ("--set", f"{path}={value}")),
    )
    assert code == 0, output
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["trained"]["num_queries"] == num_queries
    assert metrics["trained"]["map_at_r"] > gain * metrics["untrained"]["map_at_r"]
    code, output = cli("evaluate", "run")
    assert code == 0, output
    again = json.loads((tmp_path / "run/metrics-test-best.json").read_text())
    assert again["trained"] == metrics["trained"]
