"""Bounds of every number of the configuration, written by hand: just outside and just inside.

A key is the dotted path of a field; `loss:arcface.scale` is `loss.scale` of the loss arcface. `x`
stands for any key of a mapping, 0, 1 and 2 for items of a list.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from dml_dist.config.load import parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError

Limits = tuple[float | None, float | None, float | None, float | None]
"""Refused below, lowest accepted, highest accepted, refused above; None: there is no such bound."""

TINY, HUGE, MANY = 1e-300, 1e30, 10**9  # large numbers where there is no upper bound

POSITIVE_INTEGERS = """
data.prefetch  data.batches:shuffled.window  data.batches:balanced.samples_per_class
data.dataset:sop_shape.train.classes  data.dataset:sop_shape.train.images
data.dataset:sop_shape.test.classes  data.dataset:sop_shape.test.images
data.dataset:folder.expected.x.classes  data.dataset:folder.expected.x.images
data.dataset:table.expected.x.classes  data.dataset:table.expected.x.images
model.backbone:vit_b_16.image_size  model.backbone:timm.image_size  model.embedding_size
loss:proxy_nca.proxies_per_class  loss:proxy_nca.dead_after_steps
loss:soft_triple.centers_per_class
nir.flow.num_blocks  nir.flow.width
projections.steps_per_problem  projections.patience  projections.representatives_per_class
projections.pool_per_class  projections.mining.neighbors_per_class
projections.mining.refresh_every  projections.lead_steps
schedule:step.milestones.0
train.micro_batch_size  train.epochs  train.log_every
evaluation.recall_at.0  evaluation.batch_size  evaluation.every_steps
evaluation.evaluate_test_every
checkpoint.every_steps  checkpoint.keep
launch.num_workers  launch.min_workers  launch.threads_per_rank
compare.search.trials  compare.search.steps  compare.parallel
compare.search.space.x:int.step
compare.search.sampler:tpe.startup_trials  compare.search.sampler:cmaes.startup_trials
compare.search.sampler:gp.startup_trials
tune.trials  tune.parallel  tune.folds
tune.space.x:int.step
tune.sampler:tpe.startup_trials  tune.sampler:cmaes.startup_trials  tune.sampler:gp.startup_trials
tune.pruner:asha.grace_steps
tune.pruner:median.grace_steps  tune.pruner:median.startup_trials
scale.sweeps.x.world_size.0  scale.sweeps.x.embedding_size.0  scale.sweeps.x.tar_shards.0
scale.warmup_steps  scale.steps  scale.repetitions  scale.tries
"""
NON_NEGATIVE_INTEGERS = """
seed
data.cache.retries  data.loader_workers  data.decoded_cache_mb
data.dataset:glyphs.seed  data.dataset:sop_shape.seed  data.dataset:folder.split.seed
nir.warmup_steps  projections.min_steps
schedule:constant.warmup_steps  schedule:step.warmup_steps  schedule:cosine.warmup_steps
train.steps  train.backbone_warmup_epochs  validation:folds.fold  launch.max_failures
compare.seeds.0  compare.search.seed
tune.seed  tune.final_seeds.0
scale.sweeps.x.loader_workers.0
"""
POSITIVE_NUMBERS = """
data.cache.max_gb  data.cache.timeout_seconds
data.transform:standard.std.0  data.transform:standard.std.1  data.transform:standard.std.2
model.gem_power  proxies.initial_std
loss:proxy_nca.embedding_scale  loss:proxy_nca.proxy_scale  loss:proxy_nca.logit_memory_mb
loss:proxy_anchor.scale  loss:proxy_anchor.logit_memory_mb
loss:soft_triple.scale  loss:soft_triple.gamma  loss:soft_triple.logit_memory_mb
loss:normalized_softmax.temperature  loss:normalized_softmax.logit_memory_mb
loss:cosface.scale  loss:cosface.logit_memory_mb
loss:arcface.scale  loss:arcface.logit_memory_mb
loss:triplet.triplet_memory_mb
loss:margin.margin  loss:margin.beta  loss:margin.distance_cutoff
loss:multi_similarity.positive_scale  loss:multi_similarity.negative_scale
nir.flow.clamp  nir.flow_weight  nir.loss_weight
optim:adam.lr  optim:adam.head_lr  optim:adam.proxy_lr  optim:adam.loss_lr  optim:adam.bias_lr
optim:adam.eps
optim:adamw.lr  optim:adamw.head_lr  optim:adamw.proxy_lr  optim:adamw.loss_lr
optim:adamw.bias_lr  optim:adamw.eps
optim:sgd.lr  optim:sgd.head_lr  optim:sgd.proxy_lr  optim:sgd.loss_lr  optim:sgd.bias_lr
optim:rmsprop.lr  optim:rmsprop.head_lr  optim:rmsprop.proxy_lr  optim:rmsprop.loss_lr
optim:rmsprop.bias_lr  optim:rmsprop.eps
optim:custom.lr  optim:custom.head_lr  optim:custom.proxy_lr  optim:custom.loss_lr
optim:custom.bias_lr
optim:adam.representative_lr  optim:adamw.representative_lr  optim:sgd.representative_lr
optim:rmsprop.representative_lr  optim:custom.representative_lr
projections.table.table_weight  projections.table.memory_mb
train.max_grad_norm  evaluation.memory_mb  checkpoint.every_minutes
launch.cpus_per_rank  launch.timeout_seconds
compare.search.space.x:float.step
tune.space.x:float.step  tune.hours
"""
NON_NEGATIVE_NUMBERS = """
data.transform:standard.crop_scale.0  data.transform:standard.crop_scale.1
data.transform:standard.crop_ratio.0  data.transform:standard.crop_ratio.1
loss:triplet.margin  loss:margin.nu
nir.noise  projections.proximal_weight  projections.table.in_batch_weight
optim:adam.weight_decay  optim:adamw.weight_decay  optim:sgd.weight_decay
optim:rmsprop.weight_decay  optim:custom.weight_decay
scale.max_load  scale.remote_latency_ms
"""
UNBOUNDED = ["data.transform:standard.mean.0", "data.transform:standard.mean.1"]
UNBOUNDED += ["data.transform:standard.mean.2"]
UNBOUNDED += ["compare.search.space.x:float.low", "compare.search.space.x:float.high"]
UNBOUNDED += ["tune.space.x:float.low", "tune.space.x:float.high"]
UNBOUNDED_INTEGERS = ["compare.search.space.x:int.low", "compare.search.space.x:int.high"]
UNBOUNDED_INTEGERS += ["tune.space.x:int.low", "tune.space.x:int.high"]

OTHERS: dict[str, Limits] = {
    "data.dataset:glyphs.num_classes": (3, 4, MANY, None),
    "data.dataset:glyphs.images_per_class": (1, 2, MANY, None),
    "data.dataset:glyphs.image_size": (15, 16, 256, 257),
    "data.dataset:sop_shape.image_size": (15, 16, 256, 257),
    "data.dataset:folder.max_side": (15, 16, MANY, None),
    "data.dataset:table.max_side": (15, 16, MANY, None),
    "data.dataset:sop.max_side": (15, 16, MANY, None),
    "data.dataset:cub200.max_side": (15, 16, MANY, None),
    "data.dataset:cars196.max_side": (15, 16, MANY, None),
    "data.dataset:inshop.max_side": (15, 16, MANY, None),
    "data.dataset:custom.max_side": (15, 16, MANY, None),
    "data.dataset:folder.split.train": (0.0, TINY, 0.999999, 1.0),
    "data.batches:balanced.classes_per_batch": (1, 2, MANY, None),
    "data.transform:standard.size": (7, 8, 1024, 1025),
    "data.transform:standard.resize": (7, 8, 2048, 2049),
    "data.transform:standard.flip": (-TINY, 0.0, 1.0, 1.000001),
    "model.backbone:conv4.width": (0, 8, 8 * MANY, None),
    "loss:proxy_nca.margin": (0.0, TINY, 3.999999, 4.0),
    "loss:proxy_nca.proxy_share": (0.0, TINY, 16.0, 16.000001),
    "loss:proxy_nca.label_smoothing": (-TINY, 0.0, 0.999999, 1.0),
    "loss:proxy_nca.effective_number_beta": (0.0, TINY, 0.999999, 1.0),
    "loss:proxy_anchor.margin": (-TINY, 0.0, 1.0, 1.000001),
    "loss:soft_triple.margin": (-TINY, 0.0, 1.0, 1.000001),
    "loss:normalized_softmax.negatives_share": (0.0, TINY, 1.0, 1.000001),
    "loss:cosface.margin": (-TINY, 0.0, 1.0, 1.000001),
    "loss:cosface.negatives_share": (0.0, TINY, 1.0, 1.000001),
    "loss:arcface.margin_degrees": (-TINY, 0.0, 90.0, 90.000001),
    "loss:arcface.negatives_share": (0.0, TINY, 1.0, 1.000001),
    "loss:contrastive.positive_margin": (-2.000001, -2.0, 1.999999, 2.0),
    "loss:contrastive.negative_margin": (0.0, TINY, 2.0, 2.000001),
    "loss:margin.loss_cutoff": (0.0, TINY, 1.999999, 2.0),
    "loss:multi_similarity.base": (-1.000001, -1.0, 1.0, 1.000001),
    "loss:multi_similarity.epsilon": (0.0, TINY, 2.0, 2.000001),
    "nir.flow.depth": (1, 2, MANY, None),
    "projections.proximal_decay": (0.0, TINY, 1.0, 1.000001),
    "optim:adam.betas.0": (-TINY, 0.0, 0.999999, 1.0),
    "optim:adam.betas.1": (-TINY, 0.0, 0.999999, 1.0),
    "optim:adamw.betas.0": (-TINY, 0.0, 0.999999, 1.0),
    "optim:adamw.betas.1": (-TINY, 0.0, 0.999999, 1.0),
    "optim:sgd.momentum": (-TINY, 0.0, 0.999999, 1.0),
    "optim:rmsprop.alpha": (-TINY, 0.0, 0.999999, 1.0),
    "optim:rmsprop.momentum": (-TINY, 0.0, 0.999999, 1.0),
    "schedule:step.gamma": (0.0, TINY, 1.0, 1.000001),
    "schedule:cosine.final": (-TINY, 0.0, 1.0, 1.000001),
    "train.global_batch_size": (1, 2, MANY, None),
    "validation:fraction.fraction": (0.0, TINY, 0.999999, 1.0),
    "validation:folds.num_folds": (1, 2, MANY, None),
    "tune.pruner:asha.reduction": (1, 2, MANY, None),
    "proxies.num_classes": (1, 2, MANY, None),
    "scale.sweeps.x.classes.0": (1, 2, MANY, None),
    "scale.sweeps.x.global_batch_size.0": (1, 2, MANY, None),
}
LIMITS: dict[str, Limits] = {
    **dict.fromkeys(POSITIVE_INTEGERS.split(), (0, 1, MANY, None)),
    **dict.fromkeys(NON_NEGATIVE_INTEGERS.split(), (-1, 0, MANY, None)),
    **dict.fromkeys(POSITIVE_NUMBERS.split(), (0.0, TINY, HUGE, None)),
    **dict.fromkeys(NON_NEGATIVE_NUMBERS.split(), (-TINY, 0.0, HUGE, None)),
    **dict.fromkeys(UNBOUNDED, (None, -HUGE, HUGE, None)),
    **dict.fromkeys(UNBOUNDED_INTEGERS, (None, -MANY, MANY, None)),
    **OTHERS,
}

# Lists and mappings, and texts, that must not be shorter: one item too few, and just enough.
SHORTEST: dict[str, tuple[Any, Any]] = {
    "data.cache.folder": ("", "a"),
    "validation:classes.classes": (["a"], ["a", "b"]),
    "evaluation.recall_at": ([], [1]),
    "nir.gradients_to": ([], ["flow"]),
    "compare.methods": ({}, {"a": []}),
    "compare.seeds": ([], [0]),
    "compare.search.space": ({}, {"optim.lr": {"type": "int", "low": 1, "high": 2}}),
    "compare.search.space.x:categorical.choices": ([], [1]),
    "compare.axis.lines": ({}, {"a": ["b", "c"]}),
    "compare.axis.lines.x": (["a"], ["a", "b"]),
    "tune.space": ({}, {"optim.lr": {"type": "int", "low": 1, "high": 2}}),
    "tune.objectives": ([], [{}]),
    "tune.final_seeds": ([], [0]),
    "scale.sweeps": ({}, {"a": {}}),
}

# Lists of which one item is changed.
LISTS: dict[str, list[float]] = {
    "betas": [0.9, 0.999],
    "crop_scale": [0.2, 1.0],
    "crop_ratio": [0.75, 1.25],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "recall_at": [1],
    "seeds": [1],
    "final_seeds": [1],
    "milestones": [1],
    "world_size": [1],
    "classes": [2],
    "embedding_size": [1],
    "global_batch_size": [2],
    "loader_workers": [1],
    "tar_shards": [1],
}


def tag_of(field: str) -> str:
    """Return the key that tells the members of a section apart."""
    return "type" if field == "x" else "name"


def mapping_with(key: str, value: Any) -> dict[str, Any]:
    """Return a configuration that has a value at a key, with as little else as possible."""
    mapping: dict[str, Any] = {"name": "demo", "data": {"path": "a"}, "train": {"steps": 10}}
    node: Any = mapping
    *above, last = key.split(".")
    for part in above:
        field, _, name = part.partition(":")
        begin = list(LISTS[field]) if field in LISTS else {tag_of(field): name} if name else {}
        node = node.setdefault(field, begin)
    node[int(last) if last.isdigit() else last] = value
    return mapping


def refused_paths(mapping: dict[str, Any]) -> set[str]:
    """Return the paths that an error names; sections whose fields do not fit are other paths."""
    try:
        parse_config(mapping)
    except ConfigError as error:
        return set(re.findall(r"^  ([^\s:]+)(?: \([^\n]*\))?: ", str(error), re.MULTILINE))
    return set()


def path_of(key: str) -> str:
    return re.sub(r":\w+", "", key)


@pytest.mark.parametrize("key", LIMITS)
def test_every_number_is_refused_beyond_its_bounds_and_accepted_at_them(key: str) -> None:
    below, lowest, highest, above = LIMITS[key]
    for value in (lowest, highest):
        assert path_of(key) not in refused_paths(mapping_with(key, value)), value
    for value in (below, above):
        if value is not None:
            assert path_of(key) in refused_paths(mapping_with(key, value)), value


@pytest.mark.parametrize("key", [key for key in LIMITS if isinstance(LIMITS[key][1], float)])
def test_numbers_must_be_finite_and_no_text(key: str) -> None:
    for value in (float("nan"), float("inf"), float("-inf"), "0.5", True, [0.5]):
        paths = refused_paths(mapping_with(key, value))
        assert path_of(key) in paths, value


@pytest.mark.parametrize("key", [key for key in LIMITS if isinstance(LIMITS[key][1], int)])
def test_integers_are_no_fractions(key: str) -> None:
    for value in (LIMITS[key][1], 16.5, 16.0, "16", True):
        refused = path_of(key) in refused_paths(mapping_with(key, value))
        assert refused == (type(value) is not int), value


def test_the_width_of_conv4_is_a_multiple_of_8() -> None:
    for width in (8, 64, 72):
        assert not refused_paths(mapping_with("model.backbone:conv4.width", width))
    for width in (9, 12, 63):
        assert refused_paths(mapping_with("model.backbone:conv4.width", width)) == {
            "model.backbone.width"
        }


@pytest.mark.parametrize("key", SHORTEST)
def test_lists_are_refused_when_they_are_too_short(key: str) -> None:
    too_short, enough = SHORTEST[key]
    assert path_of(key) in refused_paths(mapping_with(key, too_short))
    assert path_of(key) not in refused_paths(mapping_with(key, enough))


# ---------------------------------------------------------------- no field is forgotten


def numeric_keys(annotation: Any, key: str) -> Iterator[str]:
    """Give the keys of all numbers below a type, in the notation of LIMITS."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation in (int, float):
        yield key
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        tagged = annotation.model_fields.get(tag_of(key.rpartition(".")[2]))
        names = get_args(tagged.annotation) if tagged is not None else ()
        tag = f":{names[0]}" if names and key else ""
        for field, about in annotation.model_fields.items():
            yield from numeric_keys(about.annotation, f"{key}{tag}.{field}" if key else field)
    elif origin is Annotated:
        yield from numeric_keys(arguments[0], key)
    elif origin in (Union, types.UnionType):
        for part in arguments:
            yield from numeric_keys(part, key)
    elif origin is tuple:
        items = arguments[:1] if arguments[-1] is Ellipsis else arguments
        for place, item in enumerate(items):
            yield from numeric_keys(item, f"{key}.{place}")
    elif origin is dict:
        yield from numeric_keys(arguments[1], f"{key}.x")
    else:
        assert annotation in (str, bool, type(None), Any) or origin is Literal, (key, annotation)


def test_every_number_of_the_schema_is_listed() -> None:
    """A new field must be given its bounds here, or be named as unbounded."""
    found = list(numeric_keys(RunConfig, ""))
    assert len(found) > 150
    assert sorted(found) == sorted(LIMITS)


def test_every_shortest_length_of_the_schema_is_listed() -> None:
    def lengths(value: Any) -> Iterator[str]:
        if isinstance(value, dict):
            for name, item in value.items():
                if name in ("minItems", "minProperties", "minLength") and isinstance(item, int):
                    yield name
                yield from lengths(item)
        elif isinstance(value, list):
            for item in value:
                yield from lengths(item)

    # Lists of a fixed length have one, too: betas of adam and adamw, crop_scale, crop_ratio,
    # mean and std.
    schema = RunConfig.model_json_schema()
    assert len(list(lengths(schema))) == len(SHORTEST) + 6
