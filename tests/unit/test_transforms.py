"""Views of images: shapes, distribution of crops, dependence on the generator alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from dml_dist.config.data import CustomTransformConfig, StandardTransformConfig
from dml_dist.data import transforms
from dml_dist.data.transforms import StandardTransform, Transform, build_transform, draw_crop
from dml_dist.errors import ConfigError
from dml_dist.random_streams import Stream, generator_of


def image_of(height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def standard(**changes: Any) -> Transform:
    return build_transform(StandardTransformConfig(**{"size": 16, **changes}))


def view(transform: Transform, image: torch.Tensor, step: int = 0, position: int = 0) -> Any:
    return transform.train(image, generator_of(Stream.AUGMENTATION, 0, step, position))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (5, 9), (16, 16), (40, 17), (90, 200)])
def test_every_image_size_gives_the_same_shape(height: int, width: int) -> None:
    for transform in (standard(), standard(resize=20)):
        for out in (view(transform, image_of(height, width)), transform.evaluation(image_of(9, 5))):
            assert out.shape == (3, 16, 16)
            assert out.dtype == torch.float32
            assert out.is_contiguous()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("resize", [None, 20, 21])
@pytest.mark.parametrize(
    ("height", "width"), [(33, 47), (47, 33), (12, 15), (16, 16), (20, 20), (20, 31), (31, 61)]
)
def test_evaluation_is_torchvisions_resize_crop_and_normalize(
    height: int, width: int, resize: int | None, interpolation: Any
) -> None:
    mode = v2.InterpolationMode(interpolation)
    reference = v2.Compose([v2.Resize(resize or 16, mode, antialias=True), v2.CenterCrop(16)])
    normalize = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    transform = standard(resize=resize, interpolation=interpolation)
    assert isinstance(transform, StandardTransform)
    for image in (image_of(height, width), image_of(width, height).permute(0, 2, 1)):
        expected = reference(image)
        assert torch.equal(transform.evaluation_pixels(image), expected)
        torch.testing.assert_close(transform.evaluation(image), normalize(expected))


@pytest.mark.parametrize(("height", "width"), [(4, 400), (401, 4), (3, 1000), (24, 193)])
def test_the_ends_of_long_images_change_nothing(height: int, width: int) -> None:
    image = image_of(height, width)
    whole = v2.CenterCrop(16)(v2.Resize(20, antialias=True)(image))
    transform = standard(resize=20, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    difference = transform.evaluation(image) - whole
    # Positions differ by the rounding of the longer side to whole pixels only.
    assert difference.abs().mean() <= 2.0


@pytest.mark.parametrize(("height", "width"), [(2, 4000), (4000, 2), (1, 60000)])
def test_extreme_images_are_not_blown_up(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    resize = transforms.interpolate

    def recorded(*arguments: Any, **options: Any) -> torch.Tensor:
        resized: torch.Tensor = resize(*arguments, **options)
        sizes.append(resized.numel())
        return resized

    monkeypatch.setattr(transforms, "interpolate", recorded)
    assert standard(size=64).evaluation(image_of(height, width)).shape == (3, 64, 64)
    assert max(sizes) <= 3 * 64 * 64 * 9


def test_a_full_crop_without_flip_is_a_plain_resize() -> None:
    transform = standard(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    image = image_of(30, 30)
    torch.testing.assert_close(view(transform, image), transform.evaluation(image))
    flipped = standard(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=1.0)
    torch.testing.assert_close(view(flipped, image), transform.evaluation(image).flip(-1))


def test_views_depend_on_step_and_position_and_on_nothing_else() -> None:
    transform, image = standard(), image_of(30, 40)
    torch.manual_seed(0)
    first = view(transform, image, step=5, position=3)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  (the point is that the global state does not matter)
    assert torch.equal(first, view(transform, image, step=5, position=3))
    assert not torch.equal(first, view(transform, image, step=5, position=4))
    assert not torch.equal(first, view(transform, image, step=6, position=3))


def test_images_are_not_changed() -> None:
    image = image_of(30, 40)
    before = image.clone()
    for position in range(20):
        view(standard(), image, position=position)
    standard().evaluation(image)
    assert torch.equal(image, before)


def test_crops_are_distributed_as_torchvisions() -> None:
    """Means and quantiles of area, ratio and place agree with RandomResizedCrop.get_params."""
    scale, ratio, count = (0.2, 1.0), (0.75, 4 / 3), 4000
    torch.manual_seed(0)
    image = image_of(50, 80)
    theirs = np.array(
        [
            list(params.values())
            for params in (
                v2.RandomResizedCrop(16, scale=scale, ratio=ratio).make_params([image])
                for _ in range(count)
            )
        ]
    )
    generator = generator_of(Stream.AUGMENTATION, 0, 0, 0)
    ours = np.array([draw_crop(50, 80, scale, ratio, generator) for _ in range(count)])
    for column in range(4):
        for quantile in (0.1, 0.25, 0.5, 0.75, 0.9):
            difference = np.quantile(ours[:, column], quantile) - np.quantile(
                theirs[:, column], quantile
            )
            assert abs(difference) <= 2
    area = [crop[:, 2] * crop[:, 3] / 4000 for crop in (ours, theirs)]
    assert abs(area[0].mean() - area[1].mean()) < 0.02


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 50), (50, 1), (7, 300), (64, 64)])
def test_crops_stay_inside(height: int, width: int) -> None:
    generator = generator_of(Stream.AUGMENTATION, 0, 0, 0)
    for _ in range(200):
        top, left, crop_height, crop_width = draw_crop(
            height, width, (0.05, 1.0), (0.5, 2.0), generator
        )
        assert 0 <= top < top + crop_height <= height
        assert 0 <= left < left + crop_width <= width


def test_a_crop_that_never_fits_is_the_largest_in_the_middle() -> None:
    generator = generator_of(Stream.AUGMENTATION, 0, 0, 0)
    assert draw_crop(10, 100, (1.0, 1.0), (1.0, 2.0), generator) == (0, 40, 10, 20)
    assert draw_crop(100, 10, (1.0, 1.0), (0.5, 1.0), generator) == (40, 0, 20, 10)


def test_flips_come_at_their_rate() -> None:
    transform = standard(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.25)
    image = image_of(16, 16)
    plain = transform.evaluation(image)
    flips = sum(not torch.equal(view(transform, image, position=p), plain) for p in range(400))
    assert abs(flips / 400 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)


class Halving:
    """A custom transform, as `data.transform.target` names it."""

    def __init__(self, divisor: float = 255.0) -> None:
        self.divisor = divisor

    def train(self, image: torch.Tensor, generator: np.random.Generator) -> torch.Tensor:
        return self.evaluation(image) + generator.random()

    def evaluation(self, image: torch.Tensor) -> torch.Tensor:
        return image[:, ::2, ::2] / self.divisor


def custom(name: str, **options: Any) -> Transform:
    return build_transform(
        CustomTransformConfig(
            name="custom", target=f"tests.unit.test_transforms:{name}", options=options
        )
    )


def test_a_custom_transform_is_used_as_it_is() -> None:
    transform = custom("Halving", divisor=2.0)
    image = image_of(8, 8)
    assert torch.equal(transform.evaluation(image), image[:, ::2, ::2] / 2.0)
    assert not torch.equal(view(transform, image, 0), view(transform, image, 1))


def test_a_custom_target_that_is_no_transform_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"image_of.*has no train|could not be called"):
        custom("image_of", height=4, width=4)
    with pytest.raises(ConfigError, match=r"could not be called with options.*wrong"):
        custom("Halving", wrong=1)


@pytest.mark.parametrize("size", [16, 40])
def test_training_views_are_torchvisions_crop_resize_flip_and_normalize(size: int) -> None:
    """Bit by bit, for images in the decoders' memory order and in planes."""
    config = StandardTransformConfig(size=size)
    transform = StandardTransform(config)
    mean, std = (255 * torch.tensor(values).view(3, 1, 1) for values in (config.mean, config.std))
    for position in range(40):
        height, width = np.random.default_rng(position).integers(1, 90, 2).tolist()
        image = image_of(height, width, position)
        if position % 2:
            image = image.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        draws = generator_of(Stream.AUGMENTATION, 0, 0, position)
        flip = draws.random() < config.flip
        box = draw_crop(height, width, config.crop_scale, config.crop_ratio, draws)
        reference = v2.functional.resized_crop(image, *box, [size, size], antialias=True)
        if flip:
            reference = v2.functional.horizontal_flip(reference)
        reference = (reference.to(torch.float32) - mean) / std
        assert torch.equal(view(transform, image, position=position), reference)
        out = torch.empty(3, size, size)
        pixels = transform.train_pixels(image, generator_of(Stream.AUGMENTATION, 0, 0, position))
        transform.normalize(pixels, out)
        assert torch.equal(out, reference)
