"""Configuration of data: sources, splits, batches, transforms, cache."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import (
    CustomSection,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    resumable,
)
from dml_dist.urls import local_path

# ---------------------------------------------------------------- data sets (importers)


class SplitConfig(Section):
    """How images are divided into a training and a test split; by default by class."""

    train: Fraction = 0.5
    """Share of the classes (by: class), or of each class's images (by: image), for training."""

    by: Literal["class", "image"] = "class"
    """What is divided: whole classes (unseen classes are tested), or the images of each class."""

    order: Literal["sorted", "seeded"] = "sorted"
    """Sorted: the first classes in sorted order train. Seeded: a random order from `seed`."""

    seed: NonNegativeInt = 0
    """Seed of a seeded order."""

    file: str | None = resumable(None)
    """CSV with columns `path,split` or `class,split`, used instead of the other fields."""

    @model_validator(mode="after")
    def _check(self) -> SplitConfig:
        rule = {"train": self.train, "by": self.by, "order": self.order, "seed": self.seed}
        fields = type(self).model_fields
        changed = [name for name, value in rule.items() if value != fields[name].default]
        if self.file is not None and changed:
            raise ValueError(
                f"file {self.file} defines the split, so it excludes {', '.join(changed)}; remove "
                "either"
            )
        if self.order == "sorted" and "seed" in changed:
            raise ValueError(f"seed {self.seed} is used with order: seeded only, got order: sorted")
        return self


class GlyphsConfig(Section):
    """The embedded data set: characters of the fonts that matplotlib ships, one class each."""

    name: Literal["glyphs"] = "glyphs"

    num_classes: Annotated[int, Field(ge=4)] = 1000
    """Number of classes, training and test together; half of them train."""

    images_per_class: Annotated[int, Field(ge=2)] = 12
    """Number of images rendered per class."""

    image_size: Annotated[int, Field(ge=16, le=256)] = 32
    """Side of the square images, in pixels."""

    seed: NonNegativeInt = 0
    """Seed of the choice of classes and of all images."""


class StoredImagesSection(Section):
    """Fields of all data sets of image files: how images are stored in the shards."""

    max_side: Annotated[int, Field(ge=16)] | None = None
    """Upper bound on the longer side in pixels. Larger images are resized at import (bicubic, JPEG
    quality 95), others are stored byte for byte. Null stores all images unchanged.
    """

    on_broken: Literal["raise", "skip"] = resumable("raise")
    """Whether an image that is missing or cannot be decoded is an error, or is skipped and listed.
    """


class CountsConfig(Section):
    """Number of classes and images of a split."""

    classes: PositiveInt
    """Number of classes."""

    images: PositiveInt
    """Number of images."""

    @model_validator(mode="after")
    def _check(self) -> CountsConfig:
        if self.images < self.classes:
            raise ValueError(
                f"images must be at least classes {self.classes}, got {self.images}: every class "
                "has an image"
            )
        return self


class SOPShapeConfig(Section):
    """Drawn stand-ins of Stanford Online Products with its numbers of images and classes.

    A class is a pair of characters, and no character is in both splits. There are 12 super-classes.
    The classes have 2 to 12 images each: an approximation of the histogram of the data set.
    """

    name: Literal["sop_shape"] = "sop_shape"

    train: CountsConfig = CountsConfig(classes=11_318, images=59_551)
    """Size of the training split: 12 or more classes, of 2 to 12 images each."""

    test: CountsConfig = CountsConfig(classes=11_316, images=60_502)
    """Size of the test split."""

    image_size: Annotated[int, Field(ge=16, le=256)] = 32
    """Side of the square images, in pixels."""

    seed: NonNegativeInt = 0
    """Seed of the choice of classes and of all images."""

    @model_validator(mode="after")
    def _check(self) -> SOPShapeConfig:
        for split, counts in (("train", self.train), ("test", self.test)):
            low, high = 2 * counts.classes, 12 * counts.classes
            if not (12 <= counts.classes <= 100_000 and low < counts.images <= high):
                raise ValueError(
                    f"{split} has {counts.images} images of {counts.classes} classes; set 12 to "
                    "100,000 classes, and more than 2 and at most 12 images for each on average"
                )
        return self


class FolderConfig(StoredImagesSection):
    """A folder of class folders, or of train/ and test/ folders with class folders."""

    name: Literal["folder"] = "folder"

    source: str = resumable()
    """The folder with the images."""

    split: SplitConfig = SplitConfig()
    """Ignored if `source` has train/ and test/ folders."""

    expected: dict[str, CountsConfig] | None = resumable(None)
    """Known counts of each split: a dry run uses them without the data, an import checks them."""


class TableConfig(StoredImagesSection):
    """A CSV or parquet table with columns path, label, split, optional super_class and role."""

    name: Literal["table"] = "table"

    source: str = resumable()
    """The table; image paths in it are absolute or relative to its folder."""

    expected: dict[str, CountsConfig] | None = resumable(None)
    """Known counts of each split: a dry run uses them without the data, an import checks them."""


class OfficialSection(StoredImagesSection):
    """Fields of all data sets with an official split; it is checked before anything is written."""

    source: str = resumable()
    """The folder that the official archive unpacks to."""

    allow_partial: bool = resumable(False)
    """Warn, instead of failing, if classes, images or files differ from the official split."""


class SOPConfig(OfficialSection):
    """Stanford Online Products: Ebay_train.txt, Ebay_test.txt and <super-class>_final/ folders."""

    name: Literal["sop"] = "sop"


class CUB200Config(OfficialSection):
    """Caltech-UCSD Birds-200-2011: images.txt, image_class_labels.txt, classes.txt and images/."""

    name: Literal["cub200"] = "cub200"


class Cars196Config(OfficialSection):
    """Stanford Cars: cars_annos.mat with car_ims/, the devkit, or folders by class."""

    name: Literal["cars196"] = "cars196"


class InShopConfig(OfficialSection):
    """DeepFashion In-Shop Clothes Retrieval: Eval/list_eval_partition.txt and img/."""

    name: Literal["inshop"] = "inshop"


class CustomDatasetConfig(CustomSection, StoredImagesSection):
    """A custom importer: `target(**options)` returns an object with `samples()`."""

    name: Literal["custom"] = "custom"


DatasetConfig = Annotated[
    GlyphsConfig
    | SOPShapeConfig
    | FolderConfig
    | TableConfig
    | SOPConfig
    | CUB200Config
    | Cars196Config
    | InShopConfig
    | CustomDatasetConfig,
    Field(discriminator="name"),
]

# ---------------------------------------------------------------- batches


class ShuffledBatchesConfig(Section):
    """Every training image exactly once per epoch, shuffled within windows of tar shards."""

    name: Literal["shuffled"] = "shuffled"

    window: PositiveInt = 16
    """Number of tar shards that are read and shuffled together."""

    last: Literal["keep", "drop"] = "drop"
    """Whether the last batch of an epoch is kept if it is smaller than the others."""


class BalancedBatchesConfig(Section):
    """P classes with K images each; an epoch is floor(images / batch) steps."""

    name: Literal["balanced"] = "balanced"

    classes_per_batch: Annotated[int, Field(ge=2)]
    """P, the number of different classes in a global batch."""

    samples_per_class: PositiveInt
    """K, the number of images of each of them."""

    small_classes: Literal["resample"] = "resample"
    """Classes with fewer than K images repeat some; each repetition is augmented differently."""


BatchesConfig = Annotated[
    ShuffledBatchesConfig | BalancedBatchesConfig, Field(discriminator="name")
]

# ---------------------------------------------------------------- transforms

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class StandardTransformConfig(Section):
    """Training: random resized crop and flip. Evaluation: resize and centre crop."""

    name: Literal["standard"] = "standard"

    size: Annotated[int, Field(ge=8, le=1024)] = 224
    """Side of the square input of the network, in pixels."""

    resize: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Evaluation: the shorter side before the centre crop; null means `size`, no margin."""

    crop_scale: tuple[NonNegativeFloat, NonNegativeFloat] = (0.16, 1.0)
    """Training: smallest and largest share of the image's area that a crop keeps."""

    crop_ratio: tuple[NonNegativeFloat, NonNegativeFloat] = (0.75, 4.0 / 3.0)
    """Training: smallest and largest aspect ratio (width / height) of a crop."""

    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Training: probability of a horizontal flip."""

    interpolation: Literal["auto", "bilinear", "bicubic"] = "auto"
    """How images are resized; auto is what a network of timm states, bilinear for others."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Subtracted from each channel, values in [0, 1]."""

    std: tuple[
        Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]
    ] = IMAGENET_STD
    """Each channel is divided by it."""

    @property
    def resize_mode(self) -> Literal["bilinear", "bicubic"]:
        """The interpolation, where auto has not been replaced by a network's."""
        return "bicubic" if self.interpolation == "bicubic" else "bilinear"

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
    """A custom transform: `target(**options)` returns an object with two methods.

    `train(image_CHW_uint8, generator)` and `evaluation(image_CHW_uint8)` return (3, H, W) float32.
    The numpy generator is the only source of randomness: a view depends on the seed, the step and
    the position in the batch, not on the loader worker or rank.
    """

    name: Literal["custom"] = "custom"


TransformConfig = Annotated[
    StandardTransformConfig | CustomTransformConfig, Field(discriminator="name")
]

# ---------------------------------------------------------------- remote tar shards


class CacheConfig(Section):
    """Local cache of the tar shards of a URL, on each machine."""

    folder: Annotated[str, Field(min_length=1)] = resumable("~/.cache/dml_dist")
    """A folder shared by all ranks of a machine; fastest on a local disk."""

    max_gb: PositiveFloat = resumable(50.0)
    """Limit of the folder in GB (10^9 bytes); least recently used shards are removed first."""

    retries: NonNegativeInt = resumable(6)
    """Retries of a tar shard after a temporary failure, at increasing intervals."""

    timeout_seconds: PositiveFloat = resumable(60.0)
    """Read timeout of web servers; s3, gs and others have their own."""


# ---------------------------------------------------------------- the section


ExifRule = Literal["apply", "ignore"]


class DataConfig(Section):
    """The images of a run."""

    path: str = resumable()
    """Folder of tar shards with their index.parquet: a path, or any URL that fsspec reads."""

    cache: CacheConfig = CacheConfig()
    """Local cache of the tar shards when `path` is a URL."""

    dataset: DatasetConfig | None = None
    """The source of the shards: imported into `path` first if that has none."""

    train_split: str = "train"
    """Name of the split whose classes are trained on."""

    test_split: str = "test"
    """Name of the split of the final evaluation."""

    exif: ExifRule = "apply"
    """Apply: images are turned upright by their EXIF orientation, as viewers do. Ignore: they are
    read as stored, as in the reference code of most papers.
    """

    batches: BatchesConfig = ShuffledBatchesConfig()
    """How global batches are formed."""

    transform: TransformConfig = StandardTransformConfig()
    """How an image becomes a tensor."""

    loader_workers: NonNegativeInt = resumable(1)
    """DataLoader processes of each rank; 0 reads in the training process."""

    prefetch: PositiveInt = resumable(4)
    """Batches that each loader worker prefetches."""

    decoded_cache_mb: NonNegativeInt = resumable(0)
    """MB of decoded training images cached in memory by each rank; 0 caches none."""

    @model_validator(mode="after")
    def _check_location(self) -> DataConfig:
        if not self.path.strip():
            raise ValueError(
                "path is empty, which would mean the current folder; give the folder of the tar "
                "shards, or . for the current one"
            )
        if self.dataset is not None and local_path(self.path) is None:
            raise ValueError(
                f"dataset is imported into a folder of this machine, got the URL {self.path}; "
                "import it with `dml-dist data import`, upload the folder, and leave dataset out"
            )
        return self
