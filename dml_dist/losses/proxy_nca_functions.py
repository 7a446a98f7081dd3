"""Proxy-NCA in one process, on plain tensors: the sharded formulas with one shard."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dml_dist.losses.forms import RoundsLoss, RowLoss
from dml_dist.losses.one_process import count_classes, dense_loss
from dml_dist.losses.proxy_nca import ProxyNCA
from dml_dist.losses.proxy_nca_dynamic import DynamicProxyNCA
from dml_dist.losses.proxy_nca_margin import ProxyNCAMargin


def proxy_nca_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies: Tensor,
    *,
    surrogate: Literal["nca", "margin"] = "nca",
    denominator: Literal["all", "negatives"] = "all",
    embedding_scale: float = 3.0,
    proxy_scale: float = 3.0,
    margin: float = 0.5,
    margin_reduction: Literal["mean", "sum"] = "mean",
    proxies_per_class: int = 1,
    label_smoothing: float = 0.0,
    class_rows: Tensor | None = None,
    class_weights: Tensor | None = None,
    logit_memory_mb: float = 64.0,
) -> Tensor:
    """Return Proxy-NCA with static or fractional assignment, a 0-d tensor.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64, 0 .. C - 1.
        proxies: Proxies, (C K, D), of any length; row c K + k is proxy k of class c. With
            `class_rows` (P, D).
        surrogate: `nca`, or `margin`, which uses no scales, denominator and label smoothing.
        denominator: `all`, or `negatives` as in the paper.
        embedding_scale: s_x, the length that normalized embeddings are given, > 0.
        proxy_scale: s_p, the length that normalized proxies are given, > 0.
        margin: M of the margin surrogate, in squared distances of unit rows, 0 < M < 4.
        margin_reduction: Of the hinges of a row over its negatives.
        proxies_per_class: K, >= 1.
        label_smoothing: Share of the target on the negatives, 0 <= e < 1.
        class_rows: Row of each class, (C,) int64, where classes share proxies (fractional).
        class_weights: Weight of each class, (C,); None for equal weights.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.

    Raises:
        ValueError: If shapes, labels or options do not fit.
    """
    if class_rows is not None and proxies_per_class != 1:
        raise ValueError(
            f"class_rows needs one proxy per class, but proxies_per_class is {proxies_per_class}"
        )
    units = count_classes(proxies, proxies_per_class)
    num_classes = units if class_rows is None else len(class_rows)
    _check_classes("class_weights", class_weights, num_classes)
    if class_rows is not None and not bool(((class_rows >= 0) & (class_rows < units)).all()):
        raise ValueError(
            f"class_rows must be in 0 .. {units - 1}, the rows of proxies, but some are not"
        )
    loss: RowLoss | RoundsLoss
    if surrogate == "margin":
        check_margin(margin)
        loss = ProxyNCAMargin(
            units,
            margin,
            margin_reduction,
            proxies_per_class,
            logit_memory_mb,
            class_rows,
            class_weights,
        )
    else:
        loss = ProxyNCA(
            units,
            denominator,
            embedding_scale,
            proxy_scale,
            proxies_per_class,
            label_smoothing,
            logit_memory_mb,
            class_rows,
            class_weights,
        )
    return dense_loss(
        loss, embeddings_BD, labels_B, proxies, num_classes=num_classes, num_units=units
    )


def dynamic_proxy_nca_loss(
    embeddings_BD: Tensor,
    labels_B: Tensor,
    proxies_PD: Tensor,
    *,
    surrogate: Literal["nca", "margin"] = "nca",
    denominator: Literal["all", "negatives"] = "all",
    embedding_scale: float = 3.0,
    proxy_scale: float = 3.0,
    margin: float = 0.5,
    margin_reduction: Literal["mean", "sum"] = "mean",
    positives: Literal["drawn", "all"] = "drawn",
    seed: int = 0,
    step: int = 0,
    logit_memory_mb: float = 64.0,
) -> Tensor:
    """Return Proxy-NCA with dynamic assignment, a 0-d tensor.

    Args:
        embeddings_BD: Embeddings, (B, D), of any length; half precision is converted to float32.
        labels_B: Classes, (B,) int64, >= 0. Without classes, give the views of an image one label.
        proxies_PD: Proxies, (P, D), P >= 2, of any length.
        surrogate: `nca`, or `margin`, which uses no scales and denominator.
        denominator: `all`, or `negatives` as in the paper.
        embedding_scale: s_x, the length that normalized embeddings are given, > 0.
        proxy_scale: s_p, the length that normalized proxies are given, > 0.
        margin: M of the margin surrogate, in squared distances of unit rows, 0 < M < 4.
        margin_reduction: Of the hinges of a row over its negatives.
        positives: Whether a sample's positive is the proxy of one other sample of its class that
            is drawn, or the mean over all of them is taken.
        seed: Seed of what is drawn, >= 0.
        step: Step of what is drawn, >= 0: another one draws others.
        logit_memory_mb: Bound on the memory for logits in MiB, > 0.

    Raises:
        ValueError: If shapes, labels or options do not fit.
    """
    if len(proxies_PD) < 2:
        raise ValueError(f"dynamic assignment needs at least 2 proxies, but got {len(proxies_PD)}")
    check_margin(margin)
    loss = DynamicProxyNCA(
        len(proxies_PD),
        surrogate,
        denominator,
        embedding_scale,
        proxy_scale,
        margin,
        margin_reduction,
        positives,
        logit_memory_mb,
        seed=seed,
        step=step,
    )
    num_classes = int(labels_B.max()) + 1 if len(labels_B) else 1
    return dense_loss(
        loss,
        embeddings_BD,
        labels_B,
        proxies_PD,
        num_classes=num_classes,
        num_units=len(proxies_PD),
    )


def check_margin(margin: float) -> None:
    """Raise ValueError for a margin that all or no pairs of squared distances satisfy."""
    if not 0 < margin < 4:
        raise ValueError(
            f"margin must be between 0 and 4, the range of squared distances of unit rows, but is "
            f"{margin}"
        )


def _check_classes(name: str, values: Tensor | None, num_classes: int) -> None:
    if values is not None and values.shape != (num_classes,):
        raise ValueError(f"{name} must have shape ({num_classes},), but has {tuple(values.shape)}")
