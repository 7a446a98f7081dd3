"""Configuration of data: where images come from, how they are batched, read and changed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import (
    CustomSection,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    Section,
    resumable,
)

# ---------------------------------------------------------------- data sets (importers)


class SplitConfig(Section):
    """How images are divided into a training and a test split; by default by class."""

    train: Fraction = 0.5
    """Share of the classes (by: class) or of each class's images (by: image) that trains."""

    by: Literal["class", "image"] = "class"
    """What is divided: whole classes (unseen classes are tested), or the images of each class."""

    order: Literal["sorted", "seeded"] = "sorted"
    """Sorted: the first classes in sorted order train. Seeded: a draw by `seed`."""

    seed: NonNegativeInt = 0
    """Seed of a seeded order."""

    file: str | None = resumable(None)
    """CSV with columns `path,split` or `class,split`, which decides instead of the rule."""


class GlyphsConfig(Section):
    """The embedded data set: characters of the fonts that matplotlib ships, one class each."""

    name: Literal["glyphs"] = "glyphs"

    num_classes: Annotated[int, Field(ge=4)] = 1000
    """Number of classes, training and test together; half of them train."""

    images_per_class: Annotated[int, Field(ge=2)] = 12
    """Number of images drawn of each class."""

    image_size: Annotated[int, Field(ge=16, le=256)] = 32
    """Side of the square images, in pixels."""

    seed: NonNegativeInt = 0
    """Seed of the choice of classes and of every drawing."""


class FolderConfig(Section):
    """A folder of class folders, or of train/ and test/ folders that hold class folders."""

    name: Literal["folder"] = "folder"

    source: str = resumable()
    """The folder with the images."""

    split: SplitConfig = SplitConfig()
    """Not used where `source` has train/ and test/ folders."""


class TableConfig(Section):
    """A CSV or parquet table with columns path, label, split, optional super_class and role."""

    name: Literal["table"] = "table"

    source: str = resumable()
    """The table; image paths in it are absolute or relative to its folder."""


class CustomDatasetConfig(CustomSection):
    """An importer of one's own: `target(**options)` gives an object with `samples()`."""

    name: Literal["custom"] = "custom"


DatasetConfig = Annotated[
    GlyphsConfig | FolderConfig | TableConfig | CustomDatasetConfig, Field(discriminator="name")
]

# ---------------------------------------------------------------- batches


class ShuffledBatchesConfig(Section):
    """Every training image exactly once an epoch, shuffled inside windows of tar shards."""

    name: Literal["shuffled"] = "shuffled"

    window: PositiveInt = 16
    """Number of tar shards that are read and shuffled together."""

    last: Literal["keep", "drop"] = "drop"
    """What becomes of the last batch of an epoch when it is smaller than the others."""


class BalancedBatchesConfig(Section):
    """P classes with K images each; an epoch is floor(images / batch) steps."""

    name: Literal["balanced"] = "balanced"

    classes_per_batch: Annotated[int, Field(ge=2)]
    """P, the number of different classes in a global batch."""

    samples_per_class: PositiveInt
    """K, the number of images of each of them."""

    small_classes: Literal["resample"] = "resample"
    """Classes with fewer than K images repeat images; each repetition is augmented afresh."""


BatchesConfig = Annotated[
    ShuffledBatchesConfig | BalancedBatchesConfig, Field(discriminator="name")
]

# ---------------------------------------------------------------- transforms


class StandardTransformConfig(Section):
    """Training: random resized crop and flip. Evaluation: resize and centre crop."""

    name: Literal["standard"] = "standard"

    size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Side of the square that the network sees, in pixels."""

    resize: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Evaluation: the shorter side before the centre crop; none means `size`, no margin."""

    crop_scale: tuple[NonNegativeFloat, NonNegativeFloat] = (0.16, 1.0)
    """Training: smallest and largest share of the image's area that a crop keeps."""

    crop_ratio: tuple[NonNegativeFloat, NonNegativeFloat] = (0.75, 4.0 / 3.0)
    """Training: smallest and largest aspect ratio (width / height) of a crop."""

    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Training: probability of a horizontal flip."""

    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from each channel, values in [0, 1]."""

    std: tuple[
        Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]
    ] = (0.229, 0.224, 0.225)
    """Each channel is divided by it."""

    @model_validator(mode="after")
    def _check(self) -> StandardTransformConfig:
        low, high = self.crop_scale
        if not 0 < low <= high <= 1:
            raise ValueError(f"crop_scale must be 0 < low <= high <= 1, got ({low}, {high})")
        low, high = self.crop_ratio
        if not 0 < low <= high:
            raise ValueError(f"crop_ratio must be 0 < low <= high, got ({low}, {high})")
        if self.resize is not None and self.resize < self.size:
            raise ValueError(f"resize must be at least size {self.size}, got {self.resize}")
        return self


class CustomTransformConfig(CustomSection):
    """A transform of one's own: `target(**options)` gives an object with two methods.

    `train(image_CHW_uint8, generator)` and `evaluation(image_CHW_uint8)` return (3, H, W) float32.
    The numpy generator is the only source of randomness: a view depends on the seed, the step and
    the position in the batch, not on the worker or rank that makes it.
    """

    name: Literal["custom"] = "custom"


TransformConfig = Annotated[
    StandardTransformConfig | CustomTransformConfig, Field(discriminator="name")
]

# ---------------------------------------------------------------- the section


class DataConfig(Section):
    """The images of a run."""

    path: str = resumable()
    """Folder of tar shards with their index.parquet."""

    dataset: DatasetConfig | None = None
    """Where the shards come from: imported into `path` first when it holds none."""

    train_split: str = "train"
    """Name of the split whose classes are trained on."""

    test_split: str = "test"
    """Name of the split that only the final evaluation touches."""

    batches: BatchesConfig = ShuffledBatchesConfig()
    """How images are put into global batches."""

    transform: TransformConfig = StandardTransformConfig()
    """How an image becomes a tensor."""

    loader_workers: NonNegativeInt = resumable(1)
    """DataLoader processes of each rank; 0 reads in the training process."""

    prefetch: PositiveInt = resumable(4)
    """Batches that each loader worker prepares ahead."""
