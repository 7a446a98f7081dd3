"""Configuration of the losses over class proxies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import PositiveFloat, PositiveInt, Section

CosineMargin = Annotated[float, Field(ge=0, le=1)]


class ProxyNCAConfig(Section):
    """Proxy-NCA (Movshovitz-Attias et al., ICCV 2017), static assignment, NCA surrogate."""

    name: Literal["proxy_nca"] = "proxy_nca"

    denominator: Literal["all", "negatives"] = "all"
    """`negatives` is the paper's form; `all` also has the positive in the denominator."""

    embedding_scale: PositiveFloat = 3.0
    """s_x, the length given to normalised embeddings."""

    proxy_scale: PositiveFloat = 3.0
    """s_p, the length given to normalised proxies; logits are 2 s_x s_p cos."""

    proxies_per_class: PositiveInt = 1
    """K; the nearest of the class's K proxies is the positive, the others are no negatives."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread over the negative proxies; needs `denominator: all`."""

    logit_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for logits, in MiB; proxies are worked through in chunks of this size."""

    @model_validator(mode="after")
    def _check(self) -> ProxyNCAConfig:
        if self.label_smoothing > 0 and self.denominator == "negatives":
            raise ValueError(
                f"label_smoothing {self.label_smoothing} needs denominator: all, "
                "got denominator: negatives, whose loss is no cross-entropy"
            )
        return self


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
    """Bound on the memory for logits, in MiB; proxies are worked through in chunks of this size."""


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
    """Bound on the memory for logits, in MiB; proxies are worked through in chunks of this size."""


class NormalizedSoftmaxConfig(Section):
    """Normalised softmax (Zhai and Wu, 2019): cross-entropy over cosines / temperature."""

    name: Literal["normalized_softmax"] = "normalized_softmax"

    temperature: PositiveFloat = 0.05
    """T, which cosines are divided by."""

    logit_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for logits, in MiB; proxies are worked through in chunks of this size."""


class CosFaceConfig(Section):
    """CosFace (Wang et al., CVPR 2018): softmax with a margin in the cosine."""

    name: Literal["cosface"] = "cosface"

    scale: PositiveFloat = 64.0
    """s, the factor of cosines."""

    margin: CosineMargin = 0.35
    """m, in cosines, 0 to 1."""

    logit_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for logits, in MiB; proxies are worked through in chunks of this size."""


class ArcFaceConfig(Section):
    """ArcFace (Deng et al., CVPR 2019): softmax with a margin in the angle."""

    name: Literal["arcface"] = "arcface"

    scale: PositiveFloat = 64.0
    """s, the factor of cosines."""

    margin_degrees: Annotated[float, Field(ge=0, le=90)] = 28.6
    """m, in degrees, 0 to 90."""

    logit_memory_mb: PositiveFloat = 64.0
    """Bound on the memory for logits, in MiB; proxies are worked through in chunks of this size."""
