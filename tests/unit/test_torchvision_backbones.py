"""Every network that torchvision builds for us: features, names of weights, switches, the plan."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from dml_dist.config import shape
from dml_dist.config.load import parse_config
from dml_dist.config.model import (
    BatchNormConfig,
    ModelConfig,
    TorchvisionConfig,
    ViTConfig,
)
from dml_dist.errors import ConfigError
from dml_dist.models import backbones
from dml_dist.models.backbones import check_weights
from dml_dist.models.build_model import build_model, describe_network

FAMILIES = ("resnet", "googlenet", "convnext", "vit", "efficientnet", "swin")
NAMES = list(shape.tagged(TorchvisionConfig))
SMALL = ["resnet34", "googlenet", "efficientnet_b0", "convnext_tiny", "swin_t", "vit_b_32"]
SLOW = ["resnet101", "efficientnet_v2_s", "convnext_small", "swin_v2_t", "vit_b_16", "swin_v2_s"]


def backbone_of(name: str, **fields: Any) -> Any:
    section = shape.tagged(TorchvisionConfig)[name]
    if "batch_norm" in section.model_fields and "weights" not in fields:
        fields.setdefault("batch_norm", BatchNormConfig(statistics="synchronized"))
    return section(name=name, **fields)


def config_of(name: str, **fields: Any) -> ModelConfig:
    return ModelConfig(backbone=backbone_of(name, **fields), embedding_size=5)


def run_config(*overrides: str) -> Any:
    plain = {"name": "x", "data": {"path": "p"}, "train": {"steps": 1}}
    return parse_config(plain, overrides)


def test_names_are_those_of_torchvision() -> None:
    known = torchvision.models.list_models(module=torchvision.models)
    assert sorted(NAMES) == sorted(name for name in known if name.startswith(FAMILIES))
    assert len(NAMES) == sum(
        len(get_args(section.model_fields["name"].annotation))
        for section in get_args(TorchvisionConfig)
    )


def parameters_by_torchvision(name: str, num_features: int) -> int:
    """Return the parameters that torchvision states for the network, less its classifier's."""
    entries = list(torchvision.models.get_model_weights(name))
    if name.startswith("vit"):  # the table of positions depends on the size of images
        entries = [entry for entry in entries if entry.meta["min_size"] == (224, 224)]
    layer_norm = 2 * num_features if name.startswith("convnext") else 0
    stated: int = entries[0].meta["num_params"]
    return stated - 1000 * (num_features + 1) - layer_norm


@pytest.mark.parametrize("section", get_args(TorchvisionConfig))
def test_every_network_is_built(section: Any) -> None:
    for name in shape.tags(section):
        with torch.device("meta"):
            model = build_model(config_of(name), seed=0)
        found = sum(parameter.numel() for parameter in model.backbone.parameters())
        assert found == parameters_by_torchvision(name, model.head.in_features), name


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_network_gives_its_features(name: str) -> None:
    with torch.device("meta"):
        model = build_model(config_of(name), seed=0)
        features = model.backbone(torch.empty(2, 3, 224, 224))
    assert features.shape[:2] == (2, model.head.in_features)
    assert features.ndim == (2 if name.startswith("vit") else 4)


def reference_features(whole: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the input of torchvision's classifier, captured by a hook."""
    last = [m for m in whole.modules() if isinstance(m, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    whole(images)
    return seen[0]


def check_network(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load torchvision's weights: the pooled features are what its classifier sees."""
    side = 64 if name.startswith(("resnet", "vit")) else 32
    fields: dict[str, Any] = {"image_size": side} if name.startswith("vit") else {}
    arguments = dict(fields)
    if name == "googlenet":
        arguments |= {"init_weights": True, "aux_logits": True, "transform_input": True}
    torch.manual_seed(0)
    whole = torchvision.models.get_model(name, weights=None, **arguments).eval()
    monkeypatch.setattr(backbones, "_read_weights", lambda config: whole.state_dict())
    config = config_of(name, weights="a file", **fields)
    model = build_model(config, seed=0).eval()
    images = torch.randn(2, 3, side, side)
    with torch.no_grad():
        features = model.backbone(images)
        pooled = features if features.ndim == 2 else model.pool(features)
        if name.startswith("convnext"):  # its classifier begins with a LayerNorm
            pooled = whole.classifier[0](pooled[:, :, None, None]).flatten(1)
        torch.testing.assert_close(pooled, reference_features(whole, images), rtol=1e-4, atol=1e-5)
    model.train()
    model(images).square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert not model.has_changing_buffers


@pytest.mark.parametrize("name", SMALL)
def test_features_equal_the_input_of_the_classifier(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_network(name, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_features_equal_the_input_of_the_classifier_in_all_families(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_network(name, monkeypatch)


def test_batch_norm_switches() -> None:
    build = {
        mode: build_model(
            config_of("resnet18", batch_norm=BatchNormConfig(statistics=mode)), seed=0
        )
        for mode in ("synchronized", "per_rank")
    }
    assert [model.has_changing_buffers for model in build.values()] == [False, True]
    config = config_of("resnet18", weights="IMAGENET1K_V1", batch_norm=BatchNormConfig())
    frozen = build_model(config, seed=0, pretrained=False)
    assert not frozen.has_changing_buffers
    assert frozen.backbone.bn1.weight.requires_grad
    assert not frozen.backbone.bn1.training
    config = config_of(
        "resnet18",
        weights="IMAGENET1K_V1",
        batch_norm=BatchNormConfig(statistics="synchronized", affine="frozen"),
    )
    model = build_model(config, seed=0, pretrained=False)
    assert model.backbone.bn1.training
    assert not model.backbone.bn1.weight.requires_grad
    assert model.backbone.conv1.weight.requires_grad
    assert describe_network(model) == (
        (
            "batch normalisation",
            "20 layers, affine frozen, statistics of the global batch",
        ),
    )


def test_random_layers_are_described_and_can_be_disabled() -> None:
    for name in ("convnext_tiny", "swin_t", "efficientnet_b0"):
        with torch.device("meta"):
            drawing = build_model(config_of(name), seed=0)
            steady = build_model(config_of(name, stochastic_depth=False), seed=0)
        row = ("random layers", "stochastic depth; each rank for its own images")
        assert row in describe_network(drawing)
        assert row not in describe_network(steady)
        assert all(m.p == 0 for m in steady.modules() if isinstance(m, StochasticDepth))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.backbone={name: convnext_tinny}"], "did you mean convnext_tiny"),
        (["model.backbone={name: googlenet}"], "set batch_norm.statistics: synchronized, or w"),
        (
            ["model.backbone={name: resnet50, batch_norm: {statistics: synchronised}}"],
            "did you mean synchronized",
        ),
        (
            [
                "model.backbone={name: resnet50, batch_norm: "
                "{statistics: synchronized, affine: frozen}}"
            ],
            "frozen affine parameters of batch normalisation need trained weights",
        ),
        (
            ["model.backbone={name: resnet50, norm: group, batch_norm: {affine: frozen}}"],
            "leave batch_norm out",
        ),
        (["model.backbone={name: vit_b_16, image_size: 100}"], "must be a multiple of 16"),
        (["model.backbone={name: vit_b_16}", "model.pooling=gem"], "leave pooling out"),
        (
            ["model.backbone={name: vit_b_16}", "data.transform.size=64"],
            "data.transform.size must equal the image_size 224 of model.backbone vit_b_16, got 64",
        ),
    ],
)
def test_wrong_configurations(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        run_config(*overrides)


def test_image_sizes_of_a_vision_transformer() -> None:
    run_config("model.backbone={name: vit_b_32, image_size: 64}", "data.transform.size=64")
    transform = "{name: custom, target: 'a:b'}"
    run_config("model.backbone={name: vit_b_32}", f"data.transform={transform}")
    with torch.device("meta"):
        model = build_model(config_of("vit_b_32", image_size=64), seed=0)
        with pytest.raises(ConfigError, match=r"image_size is 64, but .* 32 x 64 pixels"):
            model(torch.empty(1, 3, 32, 64))
    with pytest.raises(ConfigError, match=r"IMAGENET1K_SWAG_E2E\w* of .* need 384"):
        check_weights(ViTConfig(weights="IMAGENET1K_SWAG_E2E_V1"))
    check_weights(ViTConfig(weights="IMAGENET1K_SWAG_E2E_V1", image_size=384))


def test_every_weight_name_is_accepted() -> None:
    for name in NAMES:
        for entry in torchvision.models.get_model_weights(name):
            fields = {"weights": entry.name}
            if name.startswith("vit"):
                fields["image_size"] = entry.meta["min_size"][0]
            check_weights(backbone_of(name, **fields))
