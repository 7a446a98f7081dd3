"""The configuration of one run: frozen, strict models, one field one docstring."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import (
    DEFINITION,
    RUN_NAME,
    Fraction,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    resumable,
)
from dml_dist.config.data import BalancedBatchesConfig, DataConfig
from dml_dist.config.launch import LaunchConfig
from dml_dist.config.loggers import LoggerConfig
from dml_dist.config.model import ModelConfig, check_images
from dml_dist.config.nir import NIRConfig
from dml_dist.config.objective import (
    AdamConfig,
    ConstantScheduleConfig,
    LossConfig,
    OptimizerConfig,
    ProxyNCAConfig,
    ScheduleConfig,
)
from dml_dist.config.projections import ProjectionsConfig
from dml_dist.config.proxy_losses import ProxiesConfig
from dml_dist.config.scale import ScaleConfig
from dml_dist.config.study import CompareConfig, TuneConfig

# ---------------------------------------------------------------- validation


class FractionValidationConfig(Section):
    """A seeded random share of the training classes is held out."""

    name: Literal["fraction"] = "fraction"

    fraction: Fraction = 0.1
    """Share of the training classes; at least two are held out."""


class ClassesValidationConfig(Section):
    """Named training classes are held out."""

    name: Literal["classes"] = "classes"

    classes: Annotated[tuple[str, ...], Field(min_length=2)]
    """Class names, as in the index."""


class FoldsValidationConfig(Section):
    """The training classes are divided into seeded random folds; one is held out."""

    name: Literal["folds"] = "folds"

    num_folds: Annotated[int, Field(ge=2)] = 4
    """Number of folds."""

    fold: NonNegativeInt = 0
    """The fold that is held out, 0 .. num_folds - 1."""

    @model_validator(mode="after")
    def _check(self) -> FoldsValidationConfig:
        if self.fold >= self.num_folds:
            raise ValueError(f"fold must be below num_folds {self.num_folds}, got fold {self.fold}")
        return self


class NoValidationConfig(Section):
    """No class is held out; the last checkpoint is the result."""

    name: Literal["none"] = "none"


ValidationConfig = Annotated[
    FractionValidationConfig | ClassesValidationConfig | FoldsValidationConfig | NoValidationConfig,
    Field(discriminator="name"),
]

# ---------------------------------------------------------------- sections


class TrainConfig(Section):
    """Batch size, length and precision of training."""

    global_batch_size: Annotated[int, Field(ge=2)] = 64
    """B, number of images per step over all ranks; the only batch setting that changes results."""

    micro_batch_size: PositiveInt | None = resumable(None)
    """Images of a rank whose activations are in memory at a time; null means all of its images.

    The loss still sees the whole global batch, and gradients are equal up to rounding; the network
    computes each image's embedding twice. Dropout and stochastic depth draw for each micro-batch.
    Not with batch normalisation by statistics of the batch.
    """

    steps: NonNegativeInt | None = resumable(None)
    """Number of optimiser updates; give this or `epochs`. 0 evaluates the network as it is given.
    """

    epochs: PositiveInt | None = resumable(None)
    """Number of passes over the training images; give this or `steps`."""

    backbone_warmup_epochs: NonNegativeInt = 0
    """Initial epochs in which only head and proxies are updated."""

    max_grad_norm: PositiveFloat | None = None
    """Norm to which the gradients of backbone, head and proxies together are clipped."""

    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    """Arithmetic of the network; auto is bf16 autocast on a GPU and float32 on a CPU."""

    log_every: PositiveInt = resumable(10)
    """Steps between records of the training loss."""

    record_spans: bool = resumable(False)
    """Whether records tell where the time of a step goes: seconds_data, seconds_forward, ...

    With several ranks it adds a barrier to each step.
    """

    record_machine: bool = resumable(False)
    """Whether records have rank 0's peak memory, and the bytes that its machine sent to ranks."""

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "give exactly one of steps and epochs, "
                f"got steps={self.steps}, epochs={self.epochs}"
            )
        return self


class EvaluationConfig(Section):
    """How embeddings are computed and ranked."""

    recall_at: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """The K of Recall@K, in increasing order."""

    distance: Literal["cosine", "euclidean"] = "cosine"
    """Cosine compares L2-normalised embeddings, euclidean the embeddings as they are."""

    batch_size: PositiveInt = 256
    """Images of an evaluation batch, which one rank embeds as a whole.

    The last bits of an embedding depend on the batch in which it is computed.
    """

    every_steps: PositiveInt | None = resumable(None)
    """Steps between validations; null means the end of each epoch."""

    evaluate_test_every: PositiveInt | None = resumable(None)
    """Steps between evaluations on test classes ("literature protocol"), not used for selection."""

    final: Literal["full", "metrics", "none"] = resumable("full")
    """What a run evaluates when training ends.

    Full: the chosen checkpoint and the untrained network on the test classes, results of each
    class, the retrieval gallery, and what the report shows of proxies and embeddings. Metrics: the
    test metrics of the chosen checkpoint alone. None: nothing; the result is the best validation.
    """

    backend: Literal["auto", "faiss", "torch"] = resumable("auto")
    """Library of the search; auto is Faiss on a CPU and torch on a GPU; results are the same."""

    memory_mb: PositiveFloat = resumable(512.0)
    """Working memory of each rank for the search, in MiB, in addition to the embeddings."""

    metrics: tuple[
        Literal["nmi", "nmi_geometric", "f1", "ami", "super_class_recall", "structure"], ...
    ] = resumable(("nmi", "f1", "super_class_recall", "structure"))
    """Metrics of the final evaluation and of `dml-dist evaluate`, besides Recall@K, R-precision and
    MAP@R.

    NMI (arithmetic or geometric mean), AMI and pairwise F1 use k-means with as many clusters as
    classes and the run's seed; Recall@K by super-class needs super-classes. Structure is density,
    spectral decay and uniformity of at most 4,096 rows of whole classes; runs with `nir` measure it
    at each validation, too.
    """

    definitions: tuple[Annotated[str, Field(pattern=DEFINITION)], ...] = resumable(())
    """Metrics of the final evaluation as other projects define them, such as [oml.map_at_5].

    nir.map_1000, nir.map_lim, nir.map_c, oml.cmc_at_K, oml.precision_at_K, oml.map_at_K,
    mlrc.precision_at_1, mlrc.r_precision, mlrc.map_at_r; nir.map_1000 is slow.
    """

    save_embeddings: bool = resumable(True)
    """Whether final full saves the test embeddings: 4 D + 16 bytes an image, D the width.

    They are in embeddings.npz; more than 1 GiB is not saved.
    """

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if list(self.recall_at) != sorted(set(self.recall_at)):
            raise ValueError(f"recall_at must increase, got {list(self.recall_at)}")
        return self


class CheckpointConfig(Section):
    """When the state of training is saved."""

    every_steps: PositiveInt | None = resumable(None)
    """Steps between checkpoints; null means at each validation, or at the end of each epoch."""

    every_minutes: PositiveFloat | None = resumable(None)
    """Minutes between checkpoints, beside those by steps; null means by steps alone."""

    keep: PositiveInt = resumable(2)
    """Number of newest checkpoints that are kept, in addition to the best one."""


class RunConfig(Section):
    """One training execution."""

    name: Annotated[str, Field(pattern=RUN_NAME)]
    """Name of the run; its folder is `runs/<name>` unless --run-dir says otherwise."""

    seed: NonNegativeInt = 0
    """Seed of all random streams."""

    data: DataConfig
    model: ModelConfig = ModelConfig()

    loss: LossConfig = ProxyNCAConfig()
    """The loss function."""

    proxies: ProxiesConfig = ProxiesConfig()

    nir: NIRConfig | None = None
    """Non-isotropy regularisation added to `loss`; null disables it."""

    projections: ProjectionsConfig | None = None
    """Alternating projections onto feasible sets; null disables them."""

    optim: OptimizerConfig = AdamConfig()
    """Optimiser, learning rates and weight decay."""

    schedule: ScheduleConfig = ConstantScheduleConfig()
    """Schedule of the learning rates."""

    train: TrainConfig

    validation: ValidationConfig = FractionValidationConfig()
    """Training classes that are held out to select the best checkpoint."""

    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    launch: LaunchConfig = LaunchConfig()

    loggers: tuple[LoggerConfig, ...] = resumable(())
    """Experiment trackers that get a copy of config and records, such as [{name: tensorboard}]."""

    compare: CompareConfig | None = None
    """Methods and seeds for `dml-dist compare`; `dml-dist train` ignores it."""

    tune: TuneConfig | None = None
    """Search of values for `dml-dist tune`; `dml-dist train` ignores it."""

    scale: ScaleConfig | None = None
    """Points of a scaling study for `dml-dist scale`; `dml-dist train` ignores it."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        batches = self.data.batches
        if isinstance(batches, BalancedBatchesConfig):
            product = batches.classes_per_batch * batches.samples_per_class
            if product != self.train.global_batch_size:
                raise ValueError(
                    f"data.batches: classes_per_batch {batches.classes_per_batch} x "
                    f"samples_per_class {batches.samples_per_class} = {product} must equal "
                    f"train.global_batch_size {self.train.global_batch_size}"
                )
        names = [logger.name for logger in self.loggers]
        if len(set(names)) < len(names):
            raise ValueError(f"loggers must have different names, got {', '.join(names)}")
        if self.train.steps == 0 and (self.compare or self.tune):
            raise ValueError("compare and tune train their runs: train.steps must be positive")
        self._check_compare()
        self._check_tune()
        self._check_scale()
        if self.proxies.placement == "replicated" and (self.nir or self.projections):
            raise ValueError(
                "proxies.placement: replicated is for comparisons of scale, without the sections "
                "nir and projections; remove them, or set placement: sharded"
            )
        if self.model.head == "none" and self.train.backbone_warmup_epochs:
            raise ValueError(
                f"train.backbone_warmup_epochs {self.train.backbone_warmup_epochs} trains the head "
                "alone, which model.head: none leaves out"
            )
        check_images(self.model.backbone, self.data.transform)
        if self.launch.launcher == "ray" and self.launch.num_workers > self.train.global_batch_size:
            raise ValueError(
                f"train.global_batch_size {self.train.global_batch_size} must be at least "
                f"launch.num_workers {self.launch.num_workers}: every rank needs an image"
            )
        return self

    def _check_compare(self) -> None:
        if self.compare is None:
            return
        if self.train.steps is None:
            raise ValueError("compare needs train.steps, the same for all methods, got epochs")
        if self.compare.parallel > 1 and self.launch.launcher != "inprocess":
            raise ValueError(
                f"compare.parallel {self.compare.parallel} needs launch.launcher: inprocess, runs "
                f"on one process each, got {self.launch.launcher}, whose runs take all ranks"
            )
        if self.evaluation.final == "none":
            raise ValueError(
                "compare shows results on test classes, so evaluation.final must be full or "
                "metrics, got none"
            )
        if self.compare.search is not None and isinstance(self.validation, NoValidationConfig):
            raise ValueError(
                "compare.search needs validation classes to select by, got validation.name: none"
            )

    def _check_tune(self) -> None:
        if self.tune is None:
            return
        if self.compare is not None:
            raise ValueError("tune and compare are two studies, so give one of them, got both")
        if self.tune.folds == 1 and isinstance(self.validation, NoValidationConfig):
            raise ValueError(
                "tune needs validation classes to judge by, got validation.name none and "
                "tune.folds 1"
            )
        if self.launch.launcher == "torchrun":
            raise ValueError(
                "tune starts the ranks of its trials itself: launch.launcher must be inprocess or "
                "ray, got torchrun"
            )
        if self.evaluation.final == "none":
            raise ValueError(
                "tune --final shows results on test classes, so evaluation.final must be full or "
                "metrics, got none"
            )

    def _check_scale(self) -> None:
        if self.scale is None:
            return
        if self.compare is not None or self.tune is not None:
            raise ValueError("scale, compare and tune are different studies; give one of them")
        if isinstance(self.validation, NoValidationConfig):
            raise ValueError(
                "scale measures recall on validation classes, but validation.name is none; hold "
                "out some classes"
            )
        most = max(
            (size for one in self.scale.sweeps.values() for size in one.world_size), default=1
        )
        if self.launch.launcher == "torchrun" or (most > 1 and self.launch.launcher != "ray"):
            raise ValueError(
                f"scale has points of {most} ranks, which it starts itself, but launch.launcher is "
                f"{self.launch.launcher}; set it to ray"
            )
