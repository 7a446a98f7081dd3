"""Networks: shapes, dtypes, seeded weights, pooling, weight files, frozen normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from pydantic import ValidationError
from torch import nn

from dml_dist.config.model import (
    BackboneConfig,
    BatchNormConfig,
    Conv4Config,
    CustomBackboneConfig,
    ModelConfig,
    ResNetConfig,
)
from dml_dist.errors import ConfigError
from dml_dist.models.backbones import check_weights, describe_weights, require_weights
from dml_dist.models.build_model import batch_norm_channels, build_model
from dml_dist.models.embedding import PooledFeatures, parameter_kinds
from dml_dist.models.pooling import build_pooling


class FlatBackbone(nn.Module):
    """A custom backbone that gives vectors instead of feature maps."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.num_features = width
        self.layer = nn.Linear(3, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layer(images.mean(dim=(2, 3)))


def no_features() -> nn.Module:
    """A custom backbone that forgot to say how many features it gives."""
    return nn.Conv2d(3, 4, 1)


def no_module() -> int:
    """A target that is no backbone at all."""
    return 3


def custom(name: str, **options: Any) -> ModelConfig:
    backbone = CustomBackboneConfig(target=f"{__name__}:{name}", options=options)
    return ModelConfig(backbone=backbone, embedding_size=5)


@pytest.mark.parametrize(
    "backbone",
    [
        Conv4Config(width=8),
        Conv4Config(width=8, norm="batch"),
        ResNetConfig(norm="group"),
        ResNetConfig(name="resnet50", norm="group"),
        ResNetConfig(batch_norm=BatchNormConfig(statistics="synchronized")),
        CustomBackboneConfig(target=f"{__name__}:FlatBackbone", options={"width": 7}),
    ],
    ids=["conv4", "conv4-batch", "resnet18-group", "resnet50-group", "resnet18-batch", "custom"],
)
def test_every_backbone_gives_embeddings(backbone: BackboneConfig) -> None:
    model = build_model(ModelConfig(backbone=backbone, embedding_size=6, layer_norm=True), seed=1)
    images = torch.randn(3, 3, 40, 32, generator=torch.Generator().manual_seed(0))
    embeddings = model(images)
    assert embeddings.shape == (3, 6)
    assert embeddings.dtype == torch.float32
    lengths = embeddings.norm(dim=1)
    assert not torch.allclose(lengths, torch.ones(3), atol=1e-3)
    embeddings.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_conv4_halves_three_times() -> None:
    model = build_model(ModelConfig(backbone=Conv4Config(width=16)), seed=0)
    assert model.backbone(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 4, 4)


def test_conv4_with_batch_norm() -> None:
    config = ModelConfig(backbone=Conv4Config(width=8, norm="batch"))
    model = build_model(config, seed=0)
    assert model.batch_norm == "synchronized"
    images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    alone, beside = model(images[:3])[0], model(images)[0]
    assert not torch.allclose(alone, beside, atol=1e-3)
    for settings in ({"statistics": "frozen"}, {"affine": "frozen"}):
        with pytest.raises(ValidationError, match=r"trained weights, which conv4 does not have"):
            Conv4Config(norm="batch", batch_norm=settings)
    with pytest.raises(ValidationError, match=r"needs norm: batch, got norm: group"):
        Conv4Config(batch_norm={"statistics": "per_rank"})


def test_embeddings_normalised_by_the_batch() -> None:
    """Each dimension has mean 0 and variance 1 over the batch, without weights of its own."""
    plain = ModelConfig(backbone=Conv4Config(width=8), embedding_size=5)
    images = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model, narrow = (
        build_model(plain.model_copy(update={"normalize": name}), seed=0)
        for name in ("batch", "none")
    )
    lost = dict(narrow.named_parameters()).keys() - dict(model.named_parameters()).keys()
    assert lost == {"head.bias"}
    embeddings = model(images)
    x = narrow(images)
    expected = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(embeddings, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.eval()(images), expected, atol=0.1)  # running statistics
    model.train().freeze_backbone(True)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "statistics", "changes"),
    [
        (Conv4Config(width=8), "synchronized", False),
        (ResNetConfig(batch_norm=BatchNormConfig(statistics="per_rank")), "per_rank", True),
        (ResNetConfig(weights="IMAGENET1K_V1"), "synchronized", False),
    ],
)
def test_statistics_of_embeddings_follow_the_backbone(
    backbone: BackboneConfig, statistics: str, changes: bool
) -> None:
    config = ModelConfig(backbone=backbone, embedding_size=5, normalize="batch")
    with torch.device("meta"):
        model = build_model(config, seed=0, pretrained=False)
    assert model.normalize_statistics == statistics
    assert model.has_changing_buffers == changes
    assert batch_norm_channels(model, model.normalize_statistics)[-1] == 5


def test_weights_depend_on_the_seed_alone() -> None:
    config = ModelConfig(backbone=Conv4Config(width=8))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(config, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = build_model(config, seed=3).state_dict()
    other = build_model(config, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_pooling_values() -> None:
    features = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0)) + 0.1
    mean, largest = features.mean(dim=(2, 3)), features.amax(dim=(2, 3))
    assert torch.allclose(build_pooling("avg", 3.0)(features), mean)
    assert torch.equal(build_pooling("max", 3.0)(features), largest)
    assert torch.allclose(build_pooling("avg+max", 3.0)(features), mean + largest)
    assert torch.allclose(build_pooling("gem", 1.0)(features), mean)
    expected = features.double().pow(3).mean(dim=(2, 3)).pow(1 / 3).float()
    assert torch.allclose(build_pooling("gem", 3.0)(features), expected)


@pytest.mark.parametrize("power", [1.0, 3.0, 64.0])
def test_gem_is_finite_at_zero_and_for_large_features(power: float) -> None:
    pool = build_pooling("gem", power)
    features = torch.cat([torch.zeros(1, 2, 3, 3), torch.full((1, 2, 3, 3), 1e4)])
    features.requires_grad_()
    pooled = pool(features)
    pooled.sum().backward()
    assert torch.allclose(pooled[1], torch.tensor(1e4))
    assert pooled.isfinite().all()
    assert features.grad is not None
    assert features.grad.isfinite().all()
    assert pool.power.grad.isfinite()


def test_gem_gradients() -> None:
    pool = build_pooling("gem", 2.5).double()
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(2, 2, 3, 3, generator=generator, dtype=torch.float64) + 0.1
    features.requires_grad_()

    def pooled(features: torch.Tensor, power: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(pool, {"power": power}, (features,))

    assert torch.autograd.gradcheck(pooled, (features, pool.power))


def test_float32_after_bf16_and_float64_all_the_way() -> None:
    config = ModelConfig(backbone=Conv4Config(width=8), pooling="gem")
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = build_model(config, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(images)
    full = model(images)
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    assert torch.allclose(low, full, atol=0.05)
    exact = build_model(config, seed=0, dtype=torch.float64)(images.double())
    assert exact.dtype == torch.float64
    assert torch.allclose(exact.float(), full, atol=1e-5)


def test_channels_last_changes_nothing_but_the_layout() -> None:
    plain = ModelConfig(backbone=Conv4Config(width=8))
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = build_model(plain.model_copy(update={"channels_last": True}), seed=0)
    assert model.backbone[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(model(images), build_model(plain, seed=0)(images), atol=1e-5)


def test_a_frozen_backbone_has_no_backward_pass() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = build_model(ModelConfig(backbone=Conv4Config(width=8)), seed=0)
    model(images).square().sum().backward()
    expected = model.head.weight.grad.clone()
    model.zero_grad(set_to_none=True)
    model.freeze_backbone(True)
    assert not model.features(images).requires_grad
    model(images).square().sum().backward()
    assert torch.equal(model.head.weight.grad, expected)
    assert all(parameter.grad is None for parameter in model.backbone.parameters())
    model.freeze_backbone(False)
    assert model.features(images).requires_grad


def test_a_network_without_a_head_gives_its_pooled_features() -> None:
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    config = ModelConfig(backbone=Conv4Config(width=8), head="none", embedding_size=8)
    model = build_model(config, seed=0)
    whole = build_model(ModelConfig(backbone=Conv4Config(width=8)), seed=0)
    expected = model.backbone(images).mean(dim=(2, 3))
    assert torch.equal(model(images), expected)
    assert torch.equal(PooledFeatures(whole)(images), expected)
    spread = build_model(config.model_copy(update={"normalize": "batch"}), seed=0)
    deviations = expected - expected.mean(0)
    standardized = deviations / (deviations.square().mean(0) + 1e-5).sqrt()
    torch.testing.assert_close(spread(images), standardized)
    with pytest.raises(ConfigError, match=r"8 features the embedding; set embedding_size: 8"):
        build_model(config.model_copy(update={"embedding_size": 5}), seed=0)


def test_parameter_kinds() -> None:
    config = ModelConfig(backbone=Conv4Config(width=8), pooling="gem")
    kinds = parameter_kinds(build_model(config, seed=0))
    assert (kinds["backbone.0.weight"].part, kinds["backbone.0.weight"].norm) == ("backbone", False)
    assert kinds["backbone.1.weight"].norm
    assert not kinds["backbone.1.weight"].bias
    assert kinds["backbone.1.bias"].bias
    assert kinds["pool.power"].part == "head"
    assert kinds["pool.power"].norm
    assert (kinds["head.weight"].part, kinds["head.bias"].bias) == ("head", True)


def _weight_file(path: Path) -> dict[str, torch.Tensor]:
    network = torchvision.models.resnet18(weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
    torch.save(network.state_dict(), path)
    return network.state_dict()


def test_weights_from_a_file_and_frozen_batch_norm(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    state = _weight_file(path)
    config = ModelConfig(backbone=ResNetConfig(weights=str(path)), embedding_size=4)
    model = build_model(config, seed=0)
    assert torch.equal(model.backbone.conv1.weight, state["conv1.weight"])
    assert not model.has_changing_buffers
    model.eval()
    model.train()
    assert model.training
    assert not model.backbone.bn1.training
    before = model.backbone.bn1.running_mean.clone()
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert torch.equal(model.backbone.bn1.running_mean, before)
    assert torch.equal(before, state["bn1.running_mean"])
    assert model.backbone.bn1.weight.grad is not None


def test_weights_are_not_loaded_before_a_checkpoint(tmp_path: Path) -> None:
    config = ModelConfig(backbone=ResNetConfig(weights=str(tmp_path / "gone.pth")))
    build_model(config, seed=0, pretrained=False)
    with pytest.raises(ConfigError, match=r"neither a name of resnet18 nor a file"):
        build_model(config, seed=0)


def test_weights_are_checked_without_a_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_nothing(**_: Any) -> None:
        raise AssertionError("a network was built")

    monkeypatch.setattr(torchvision.models, "get_model", build_nothing)
    for backbone in (
        Conv4Config(),
        ResNetConfig(norm="group"),
        ResNetConfig(weights="IMAGENET1K_V1"),
        ResNetConfig(name="resnet50", weights="IMAGENET1K_V2"),
        CustomBackboneConfig(target="nowhere:nothing"),
    ):
        check_weights(backbone)
    for wrong in ("IMAGENET1K_V2", str(tmp_path / "gone.pth"), str(tmp_path)):
        with pytest.raises(
            ConfigError, match=r"one of \['DEFAULT', 'IMAGENET1K_V1'\].*of resnet18 nor a"
        ):
            check_weights(ResNetConfig(weights=wrong))


def test_wrong_weight_files(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    config = ModelConfig(backbone=ResNetConfig(weights=str(path)))

    def check(message: str) -> None:
        """Both find it: a dry run, and the model of a run."""
        with pytest.raises(ConfigError, match=message):
            check_weights(config.backbone)
        with pytest.raises(ConfigError, match=message):
            build_model(config, seed=0)

    torch.save(torchvision.models.resnet34(weights=None).state_dict(), path)
    check(
        r"fit the network: the network has no place for 80 of its 180 "
        r"\(first layer1\.2\.conv1\.weight\)\. Use weights of the same architecture"
    )
    torch.save([1, 2], path)
    check(r"not a state dict \(names to tensors\)")
    path.write_bytes(b"not a checkpoint")
    check(r"cannot be read")
    path.write_bytes(b"")
    check(r"cannot be read")
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    check_weights(config.backbone)
    assert describe_weights(config.backbone) == [("pretrained weights", f"{path}, read")]


def test_a_failed_download_says_what_to_copy_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    config = ModelConfig(backbone=ResNetConfig(weights="IMAGENET1K_V1"))
    with pytest.raises(ConfigError) as caught:
        build_model(config, seed=0)
    message = str(caught.value)
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in message
    assert str(tmp_path / "checkpoints" / "resnet18-f37072fd.pth") in message
    assert "no route to host" in message
    # A dry run says that they are missing; a run finds it before its folder is made.
    ((_, text),) = describe_weights(config.backbone)
    assert text.startswith("IMAGENET1K_V1, to be downloaded from https://download.pytorch.org/")
    with pytest.raises(ConfigError, match="no route to host"):
        require_weights(config.backbone)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (custom("no_features"), "num_features"),
        (custom("no_module"), "torch.nn.Module"),
        (custom("FlatBackbone", depth=3), "depth"),
    ],
)
def test_wrong_custom_backbones(config: ModelConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_model(config, seed=0)
