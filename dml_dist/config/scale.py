"""Configuration of scaling studies: which sizes are measured, and how."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import NonNegativeFloat, NonNegativeInt, PositiveInt, Section, resumable
from dml_dist.config.search_space import MethodName

Sizes = tuple[PositiveInt, ...]


class SweepConfig(Section):
    """All combinations of the given values; a field that is left out has the configuration's value.

    A field with one value sets it for the whole sweep.
    """

    world_size: Sizes = ()
    """W, the number of ranks."""

    scaling: Literal["strong", "weak"] = "strong"
    """Strong: the global batch is the same for all world sizes. Weak: the images of a rank are."""

    global_batch_size: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """B, images of a step; with `scaling: weak` B is W times this."""

    classes: tuple[Annotated[int, Field(ge=2)], ...] = ()
    """C, classes of the table of proxies, at least as many as the training classes."""

    embedding_size: Sizes = ()
    """D."""

    backbone: tuple[MethodName, ...] = ()
    """Names of `scale.backbones`."""

    proxies: tuple[Literal["sharded", "replicated"], ...] = ()
    """Each rank owns a range of the classes, or holds all of them."""

    loader_workers: tuple[NonNegativeInt, ...] = ()
    """Loader processes of each rank."""

    tar_shards: Sizes = ()
    """Tar shards of the training images; the data set is imported once for each number."""

    data: tuple[Literal["local", "remote"], ...] = ()
    """Local: from data.path. Remote: from a web server of this machine, with an empty cache."""

    @model_validator(mode="after")
    def _check(self) -> SweepConfig:
        for name, values in self:
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise ValueError(f"{name} must have different values, got {list(values)}")
        return self


class ScaleConfig(Section):
    """A study of speed, traffic and memory over sizes, for `dml-dist scale`.

    Each point is a run of this configuration: warm-up, then repetitions of equally many steps. All
    points see equally many images, so that their recall can be compared.
    """

    sweeps: Annotated[dict[MethodName, SweepConfig], Field(min_length=1)]
    """Name and values of each sweep; points that are the same are measured once."""

    backbones: dict[MethodName, tuple[str, ...]] = {}  # noqa: RUF012 (pydantic copies it)
    """Name of a backbone and its changes to this configuration, as with --set."""

    warmup_steps: PositiveInt = 10
    """Steps before the first repetition, counted in global batches of train.global_batch_size."""

    steps: PositiveInt = 20
    """Steps of a repetition, counted in global batches of train.global_batch_size: a point with
    twice that batch makes half as many.
    """

    repetitions: PositiveInt = 3
    """Measured repetitions of a point; its numbers are their medians."""

    max_load: NonNegativeFloat = resumable(0.2)
    """Processors that other programs may use on average while a point is measured. Beyond that the
    point is noisy and measured again.
    """

    tries: PositiveInt = resumable(3)
    """Times that a noisy point is measured; the quietest one counts, and is marked as noisy."""

    remote_latency_ms: NonNegativeFloat = 5.0
    """Delay of each answer of the web server of remote points."""

    @model_validator(mode="after")
    def _check(self) -> ScaleConfig:
        named = {name for sweep in self.sweeps.values() for name in sweep.backbone}
        if unknown := sorted(named - set(self.backbones)):
            known = ", ".join(self.backbones) or "there are none"
            raise ValueError(f"sweeps name the backbones {', '.join(unknown)}, known are: {known}")
        return self
