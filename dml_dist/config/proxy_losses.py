"""Configuration of the losses over class proxies."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import PositiveFloat, PositiveInt, Section

CosineMargin = Annotated[float, Field(ge=0, le=1)]


class ProxiesConfig(Section):
    """How the proxies of a loss begin, and where they are."""

    initial_std: PositiveFloat | None = None
    """Standard deviation of their normal initial values; null is 1 / sqrt(D), about unit length.

    With Adam the rate over this spread decides how fast a proxy turns: a rate copied from other
    code belongs to its spread.
    """

    placement: Literal["sharded", "replicated"] = "sharded"
    """Sharded: each rank owns a range of the classes. Replicated: each rank holds all proxies and
    their gradients are summed, for comparisons in scaling studies; the results are the same.
    """

    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Classes of the table, for scaling studies; null: the training classes. Proxies of further
    classes, which have no image, are negatives of every image.
    """


class ProxyNCAConfig(Section):
    """Proxy-NCA (Movshovitz-Attias et al., ICCV 2017): both surrogates, all assignments."""

    name: Literal["proxy_nca"] = "proxy_nca"

    surrogate: Literal["nca", "margin"] = "nca"
    """`nca` is a softmax over proxies, `margin` a hinge for each negative proxy."""

    denominator: Literal["all", "negatives"] = "all"
    """`negatives` is the paper's form; `all` also has the positive in the denominator."""

    embedding_scale: PositiveFloat = 3.0
    """s_x, the length given to normalised embeddings; for `surrogate: nca`."""

    proxy_scale: PositiveFloat = 3.0
    """s_p, the length given to normalised proxies; logits are 2 s_x s_p cos."""

    margin: Annotated[float, Field(gt=0, lt=4)] = 0.5
    """M of `surrogate: margin`, between 0 and 4, the squared distances of unit rows."""

    margin_reduction: Literal["mean", "sum"] = "mean"
    """How `surrogate: margin` reduces over a sample's negatives."""

    assignment: Literal["static", "fractional", "dynamic"] = "static"
    """A class's own proxies; one shared by classes by a random map; or, dynamic, the proxy that is
    nearest to another image of the class in the global batch.
    """

    proxies_per_class: PositiveInt = 1
    """K; the nearest of the class's K proxies is the positive, the others are not negatives."""

    proxy_share: Annotated[float, Field(gt=0, le=16)] = 1.0
    """Ratio of proxies to classes, for fractional (at most 1) and dynamic assignment."""

    positives: Literal["drawn", "all"] = "drawn"
    """Dynamic: the other image is drawn in each step as in the paper, or the loss is the mean over
    all of them, which learns more in as many steps (R@1 of glyphs 71.3 % against 63.4 %).
    """

    dead_after_steps: PositiveInt | None = None
    """Dynamic: a proxy that has not been the nearest of an image for this many steps is dead; null
    is as many as it takes to see five images for each proxy: 5 P / B of P proxies, B images a step.
    """

    revive_dead: bool = True
    """Dynamic: every `dead_after_steps` steps, move dead proxies to random images of the batch."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over the negative proxies; needs `denominator: all`."""

    class_weighting: Literal["none", "inverse_frequency", "effective_number"] = "none"
    """Weights of samples by the number of training images of their class."""

    effective_number_beta: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """beta of `class_weighting: effective_number`: weights are (1 - beta) / (1 - beta^n)."""

    logit_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for logits, in MiB; proxies are processed in chunks of this size."""

    @model_validator(mode="before")
    @classmethod
    def _read_older(cls, values: Any) -> Any:
        """Read older run folders, which name fields that their assignment does not use."""
        if not isinstance(values, dict):
            return values
        unused: list[tuple[str, object]] = [("use_labels", True)]
        if values.get("assignment") != "dynamic":
            unused.append(("dead_after_steps", 1000))
        return {name: value for name, value in values.items() if (name, value) not in unused}

    @model_validator(mode="after")
    def _check(self) -> ProxyNCAConfig:
        if self.label_smoothing > 0 and self.denominator == "negatives":
            raise ValueError(
                f"label_smoothing {self.label_smoothing} needs denominator: all, "
                "got denominator: negatives, whose loss is not a cross-entropy"
            )
        if self.assignment == "fractional" and self.proxy_share > 1:
            raise ValueError(
                "assignment: fractional needs proxy_share of at most 1, a proxy for each class, "
                f"got proxy_share {self.proxy_share}"
            )
        if self.label_smoothing > 0 and self.assignment == "dynamic":
            raise ValueError(
                f"label_smoothing {self.label_smoothing} needs assignment: static or fractional, "
                "got assignment: dynamic, whose negatives change with the batch"
            )
        nca = ("denominator", "embedding_scale", "proxy_scale", "label_smoothing")
        self._only("surrogate", ("nca",), nca)
        self._only("surrogate", ("margin",), ("margin", "margin_reduction"))
        self._only("assignment", ("static",), ("proxies_per_class",))
        self._only("assignment", ("fractional", "dynamic"), ("proxy_share",))
        # Not revive_dead: run folders from when its default was false have it.
        dynamic = ("positives", "dead_after_steps")
        self._only("assignment", ("dynamic",), dynamic)
        self._only("class_weighting", ("effective_number",), ("effective_number_beta",))
        return self

    def _only(self, choice: str, with_values: tuple[str, ...], fields: tuple[str, ...]) -> None:
        """Raise for a setting that has no effect with the chosen form."""
        chosen = getattr(self, choice)
        for name in fields:
            given, default = getattr(self, name), type(self).model_fields[name].default
            if chosen not in with_values and given != default:
                raise ValueError(
                    f"{name} {given} needs {choice}: {' or '.join(with_values)}, "
                    f"got {choice}: {chosen}, which does not use it"
                )


class ProxyAnchorConfig(Section):
    """Proxy-Anchor (Kim et al., CVPR 2020): each proxy against all samples of the global batch."""

    name: Literal["proxy_anchor"] = "proxy_anchor"

    scale: PositiveFloat = 32.0
    """a, the factor of cosines in the exponentials."""

    margin: CosineMargin = 0.1
    """m, in cosines, 0 to 1."""

    positives: Literal["classes", "samples"] = "classes"
    """What positive terms are averaged over: the batch's classes (the paper) or its samples."""

    logit_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for logits, in MiB; proxies are processed in chunks of this size."""


class SoftTripleConfig(Section):
    """SoftTriple (Qian et al., ICCV 2019): a softmax over classes of several centres each."""

    name: Literal["soft_triple"] = "soft_triple"

    scale: PositiveFloat = 20.0
    """la, the factor of similarities in the softmax over classes."""

    margin: CosineMargin = 0.01
    """m, in cosines, 0 to 1."""

    centers_per_class: PositiveInt = 10
    """K, rows of each class in the table."""

    gamma: PositiveFloat = 0.1
    """Temperature of the softmax over a class's centres."""

    logit_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for logits, in MiB; proxies are processed in chunks of this size."""


class NormalizedSoftmaxConfig(Section):
    """Normalised softmax (Zhai and Wu, 2019): cross-entropy over cosines / temperature."""

    name: Literal["normalized_softmax"] = "normalized_softmax"

    temperature: PositiveFloat = 0.05
    """T, which cosines are divided by."""

    negatives_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the classes sampled per step besides the batch's own; others get no gradient."""

    logit_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for logits, in MiB; proxies are processed in chunks of this size."""


class CosFaceConfig(Section):
    """CosFace (Wang et al., CVPR 2018): softmax with a margin in the cosine."""

    name: Literal["cosface"] = "cosface"

    scale: PositiveFloat = 64.0
    """s, the factor of cosines."""

    margin: CosineMargin = 0.35
    """m, in cosines, 0 to 1."""

    negatives_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the classes sampled per step besides the batch's own; others get no gradient."""

    logit_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for logits, in MiB; proxies are processed in chunks of this size."""


class ArcFaceConfig(Section):
    """ArcFace (Deng et al., CVPR 2019): softmax with a margin in the angle."""

    name: Literal["arcface"] = "arcface"

    scale: PositiveFloat = 64.0
    """s, the factor of cosines."""

    margin_degrees: Annotated[float, Field(ge=0, le=90)] = 28.6
    """m, in degrees, 0 to 90."""

    negatives_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the classes sampled per step besides the batch's own; others get no gradient."""

    logit_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for logits, in MiB; proxies are processed in chunks of this size."""
