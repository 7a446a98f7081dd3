"""Networks as ONNX: the embeddings of torch, for any batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from dml_dist.config.model import BatchNormConfig, Conv4Config, ModelConfig, ResNetConfig
from dml_dist.errors import RunError
from dml_dist.export import onnx as onnx_export
from dml_dist.export.bundle import Embedder
from dml_dist.models.build_model import build_model
from tests.unit.test_torchvision_backbones import backbone_of

SIDE = 64


def check(backbone: Any, path: Path, **fields: Any) -> None:
    model = build_model(ModelConfig(backbone=backbone, embedding_size=8, **fields), seed=0).eval()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):  # else it would normalise by 0 and 1
            torch.nn.init.uniform_(layer.running_var, 0.5, 2.0)
            torch.nn.init.uniform_(layer.running_mean, -0.5, 0.5)
    embedder = Embedder(model, normalized=True).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, SIDE, SIDE, generator=generator)
    found = onnx_export.export_onnx(embedder, images, path)
    assert found["largest_difference"] <= found["tolerance"]
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.name == "images"
    assert given.shape[1:] == [3, SIDE, SIDE]
    for size in (1, 7):
        images = torch.randn(size, 3, SIDE, SIDE, generator=generator)
        with torch.no_grad():
            expected = embedder(images).numpy()
        (result,) = session.run(["embeddings"], {"images": images.numpy()})
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)
        np.testing.assert_allclose(np.linalg.norm(result, axis=1), 1.0, atol=1e-5)


def test_a_network_with_batch_norm(tmp_path: Path) -> None:
    backbone = ResNetConfig(batch_norm=BatchNormConfig(statistics="synchronized"))
    check(backbone, tmp_path / "model.onnx", layer_norm=True, channels_last=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["googlenet", "efficientnet_b0", "convnext_tiny", "swin_t", "swin_v2_t", "vit_b_32"]
)
def test_every_family(name: str, tmp_path: Path) -> None:
    fields = {"image_size": SIDE} if name.startswith("vit") else {}
    check(backbone_of(name, **fields), tmp_path / "model.onnx")


def test_other_embeddings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model(ModelConfig(backbone=Conv4Config(width=8)), seed=0).eval()
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(onnx_export, "_difference", lambda *_: 0.5)
    with pytest.raises(RunError, match=r"differ from torch's by 5\.00e-01"):
        onnx_export.export_onnx(Embedder(model, normalized=False), images, tmp_path / "model.onnx")
