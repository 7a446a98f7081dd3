"""Objectives and batches for `test_sharded_proxies.py`: each with its oracle in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dml_dist.config.objective import (
    ArcFaceConfig,
    CosFaceConfig,
    CustomLossConfig,
    LossConfig,
    NormalizedSoftmaxConfig,
    ProxyAnchorConfig,
    ProxyNCAConfig,
    SoftTripleConfig,
)
from dml_dist.losses.class_weights import class_weights, fractional_rows
from tests import oracles_row_losses as oracles
from tests.oracles_losses import (
    contrastive_pairs_oracle,
    hard_negative_softmax_oracle,
    proxy_nca_oracle,
)

SEED = 5
"""Of initial proxies and of the map of fractional assignment."""


@dataclass(frozen=True)
class Case:
    """One objective and one batch; labels are for the global batch."""

    name: str
    loss: LossConfig
    num_classes: int = 7
    labels: tuple[int, ...] = (0, 3, 3, 6, 1, 0, 5, 3)
    zero_rows: tuple[int, ...] = ()
    equal_rows: tuple[int, int] | None = None
    zero_proxy: int | None = None
    proxies_per_class: int = 1
    class_sizes: tuple[int, ...] | None = None
    oracle: Callable[..., Tensor] | None = None
    options: dict[str, Any] = field(default_factory=dict)


def _nca(name: str, *, memory: float = 64.0, **rest: Any) -> Case:
    of_case = {key: rest.pop(key) for key in tuple(rest) if key in Case.__dataclass_fields__}
    per_class = rest.get("proxies_per_class", of_case.get("proxies_per_class", 1))
    rest["proxies_per_class"] = per_class
    of_case["proxies_per_class"] = per_class
    loss = ProxyNCAConfig(logit_memory_mb=memory, **rest)
    return Case(name, loss, oracle=proxy_nca_oracle, options=rest, **of_case)


ONE_ROW = 1e-9
MATES = (0, 3, 3, 6, 0, 0, 6, 3, 3)
ONE_CLASS: tuple[int, ...] = (2,) * 8
BY_ROWS: dict[str, Any] = {"logit_memory_mb": ONE_ROW}
SIZES = (3, 9, 1, 4, 20, 2, 7)


def _simple(name: str, config: LossConfig, oracle: Callable[..., Tensor], **rest: Any) -> Case:
    """A case whose options of the oracle are those of the configuration."""
    own = {"name", "logit_memory_mb", "assignment", "proxy_share", "class_weighting"}
    given = config.model_dump(exclude=own, exclude_unset=True)
    options = given | rest.pop("options", {})
    of_nca = [options.pop(key, 3.0) for key in ("embedding_scale", "proxy_scale")]
    if isinstance(config, ProxyNCAConfig) and config.surrogate == "nca":
        options["scale"] = of_nca[0] * of_nca[1]
    per_class = options.get("proxies_per_class", options.get("centers_per_class", 1))
    return Case(name, config, oracle=oracle, options=options, proxies_per_class=per_class, **rest)


def _assigned(name: str, *, oracle: Any = oracles.assigned_nca_oracle, **rest: Any) -> Case:
    """Proxy-NCA in one of its other forms."""
    fields = set(Case.__dataclass_fields__) - {"proxies_per_class"}
    of_case = {key: rest.pop(key) for key in tuple(rest) if key in fields}
    config = ProxyNCAConfig(**rest)
    num_classes, options = of_case.get("num_classes", 7), of_case.pop("options", {})
    if config.assignment == "fractional":
        num_rows = int(config.proxy_share * num_classes + 0.5)
        options["class_rows"] = fractional_rows(num_classes, num_rows, SEED)
    if config.class_weighting != "none":
        of_case["class_sizes"] = SIZES
        options["class_weights"] = class_weights(config.class_weighting, SIZES).tolist()
    return _simple(name, config, oracle, options=options, **of_case)


def _dynamic(name: str, **rest: Any) -> Case:
    options = {"seed": SEED}
    return _assigned(
        name, oracle=oracles.dynamic_nca_oracle, assignment="dynamic", options=options, **rest
    )


OTHER_LOSSES = (
    _simple("softmax", NormalizedSoftmaxConfig(), oracles.normalized_softmax_oracle),
    _simple("cosface", CosFaceConfig(scale=8.0, **BY_ROWS), oracles.cosface_oracle),
    _simple("arcface", ArcFaceConfig(scale=8.0), oracles.arcface_oracle, equal_rows=(0, 5)),
    _simple("arcface, one class", ArcFaceConfig(), oracles.arcface_oracle, labels=ONE_CLASS),
    _simple("soft triple", SoftTripleConfig(centers_per_class=3), oracles.soft_triple_oracle),
    _simple(
        "soft triple, chunks of a class",
        SoftTripleConfig(centers_per_class=2, **BY_ROWS),
        oracles.soft_triple_oracle,
        zero_rows=(1, 4),
        zero_proxy=3,
    ),
    _simple("anchor", ProxyAnchorConfig(), oracles.proxy_anchor_oracle, equal_rows=(1, 2)),
    _simple(
        "anchor, samples, chunks of a row",
        ProxyAnchorConfig(positives="samples", **BY_ROWS),
        oracles.proxy_anchor_oracle,
        zero_rows=(2,),
    ),
    _simple(
        "anchor, one class", ProxyAnchorConfig(), oracles.proxy_anchor_oracle, labels=ONE_CLASS
    ),
    _assigned("margin", surrogate="margin"),
    _assigned(
        "margin, three proxies, sum, chunks of a row",
        surrogate="margin",
        margin_reduction="sum",
        margin=1.0,
        proxies_per_class=3,
        **BY_ROWS,
    ),
    _assigned("margin, weights", surrogate="margin", class_weighting="inverse_frequency"),
    _assigned("weights", class_weighting="effective_number", zero_rows=(1, 4)),
    _assigned("fractional", assignment="fractional", proxy_share=0.5),
    _assigned(
        "fractional, margin, one class",
        assignment="fractional",
        proxy_share=0.5,
        surrogate="margin",
        labels=ONE_CLASS,
    ),
    _assigned(
        "fractional, weights",
        assignment="fractional",
        proxy_share=0.75,
        class_weighting="inverse_frequency",
        denominator="negatives",
    ),
    _dynamic("dynamic", proxy_share=0.5),
    _dynamic("dynamic, as many, chunks of a row", **BY_ROWS),
    _dynamic("dynamic, negatives, equal rows", denominator="negatives", equal_rows=(0, 5)),
    _dynamic("dynamic, margin", surrogate="margin", proxy_share=2.0),
    _dynamic("dynamic, margin, sum", surrogate="margin", margin_reduction="sum", **BY_ROWS),
    _dynamic("dynamic, one class", labels=ONE_CLASS, denominator="negatives"),
    _dynamic("dynamic, no two of a class", labels=tuple(range(7)), denominator="negatives"),
    _dynamic("dynamic, all positives", positives="all", labels=MATES, proxy_share=1.5),
    _dynamic("dynamic, all positives, margin", positives="all", labels=MATES, surrogate="margin"),
    _dynamic("dynamic, weights", class_weighting="inverse_frequency", zero_rows=(1,)),
)

CASES = (
    *OTHER_LOSSES,
    _nca("all"),
    _nca("negatives", denominator="negatives"),
    _nca("smoothing", label_smoothing=0.1, embedding_scale=1.0, proxy_scale=8.0),
    _nca("three proxies", proxies_per_class=3, num_classes=5, labels=(0, 3, 3, 4, 1, 0, 2)),
    _nca(
        "three proxies, smoothing, chunks of a row",
        proxies_per_class=3,
        label_smoothing=0.2,
        memory=ONE_ROW,
    ),
    _nca("three proxies, negatives", proxies_per_class=3, denominator="negatives"),
    _nca("one class, chunks of a row", labels=(2,) * 8, memory=ONE_ROW),
    _nca("zero rows, equal rows", zero_rows=(1, 4), equal_rows=(0, 5)),
    _nca("zero proxy", zero_proxy=4),
    _nca("a class a rank", num_classes=3, labels=(0, 1, 2, 2)),
    Case(
        "custom, row form",
        CustomLossConfig(
            target="tests.custom_examples:HardNegativeSoftmax",
            options={"scale": 8.0, "margin": 0.3},
        ),
        oracle=hard_negative_softmax_oracle,
        options={"scale": 8.0, "margin": 0.3},
    ),
    Case(
        "custom, pair form",
        CustomLossConfig(target="tests.custom_examples:ContrastivePairs", options={"margin": 1.5}),
        oracle=contrastive_pairs_oracle,
        options={"margin": 1.5},
    ),
)
