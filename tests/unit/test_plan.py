"""The run plan: its values, its errors and its description."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dml_dist.config.load import parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError, DataError, TopologyError
from dml_dist.models.build_model import build_model
from dml_dist.train.dynamic_assignment import SharedProxyWarning
from dml_dist.train.run_plan import resolve

CPU = torch.device("cpu")


def config(**changes: Any) -> RunConfig:
    """Return a configuration; `changes` are dotted paths with `__` for dots."""
    return parse_config(
        {
            "name": "planned",
            "data": {"path": "unused"},
            "model": {"backbone": {"name": "conv4", "width": 16}, "embedding_size": 32},
            "loss": {"name": "proxy_nca", "proxies_per_class": 2},
            "train": {"global_batch_size": 10, "epochs": 4},
        },
        [f"{path.replace('__', '.')}={value}" for path, value in changes.items()],
    )


SIZES = [5, 9, 4, 6, 3, 5, 5]
"""37 images of 7 classes."""

TABLE = {
    "loss": "{name: triplet}",
    "projections": "{form: table, steps_per_problem: 4, representatives_per_class: 5}",
}


def test_sizes_and_steps_of_a_shuffled_run() -> None:
    plan = resolve(config(), train_class_sizes=SIZES, validation_class_sizes=[4, 6], world_size=3)
    assert (plan.num_images, plan.num_classes) == (37, 7)
    assert (plan.num_validation_images, plan.num_validation_classes) == (10, 2)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 12)
    assert plan.batch_sizes(0) == plan.batch_sizes(11) == [3, 3, 4]
    assert [plan.samples_seen(step) for step in (0, 1, 3, 4, 12)] == [0, 10, 30, 40, 120]
    assert plan.proxy_rows == (4, 4, 6)  # classes 2 + 2 + 3, two rows each
    assert plan.proxy_bytes == tuple(rows * 32 * 4 * 3 for rows in plan.proxy_rows)


def test_tables_that_belong_to_no_classes_are_cut_by_rows() -> None:
    fractional = config(loss="{name: proxy_nca, assignment: fractional, proxy_share: 0.5}")
    plan = resolve(fractional, train_class_sizes=SIZES, world_size=3)
    assert plan.proxy_rows == (1, 1, 2)  # 4 rows for 7 classes
    assert ("proxies per rank", "1, 1, 2") in plan.describe()
    dynamic = config(loss="{name: proxy_nca, assignment: dynamic, proxy_share: 2}")
    assert resolve(dynamic, train_class_sizes=SIZES, world_size=3).proxy_rows == (4, 5, 5)
    few = config(loss="{name: proxy_nca, assignment: fractional, proxy_share: 0.3}")
    with pytest.raises(TopologyError, match="2 proxies for 7 classes, and there are 3 ranks"):
        resolve(few, train_class_sizes=SIZES, world_size=3)
    one = config(loss="{name: proxy_nca, assignment: dynamic, proxy_share: 0.1}")
    with pytest.raises(ConfigError, match="at least 2 proxies"):
        resolve(one, train_class_sizes=SIZES, world_size=1)


def test_a_kept_last_batch_is_shared_out() -> None:
    kept = config(data__batches__last="keep")
    plan = resolve(kept, train_class_sizes=SIZES, world_size=3)
    assert (plan.steps_per_epoch, plan.total_steps) == (4, 16)
    assert [plan.batch_sizes(step) for step in (2, 3, 7)] == [[3, 3, 4], [2, 2, 3], [2, 2, 3]]
    assert [plan.samples_seen(step) for step in (3, 4, 5, 16)] == [30, 37, 47, 148]


def test_a_balanced_epoch_is_as_long_as_its_images() -> None:
    balanced = config(
        data__batches="{name: balanced, classes_per_batch: 5, samples_per_class: 2}",
        train__epochs="null",
        train__steps=7,
    )
    plan = resolve(balanced, train_class_sizes=SIZES, world_size=2)
    assert (plan.steps_per_epoch, plan.total_steps) == (3, 7)
    assert plan.batch_sizes(2) == [5, 5]


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_parameters_and_traffic(precision: str) -> None:
    run = config(train__precision=precision)
    item = 8 if precision == "float64" else 4
    model = build_model(run.model, seed=0)
    count = sum(parameter.numel() for parameter in model.parameters())
    one = resolve(run, train_class_sizes=SIZES, world_size=1)
    assert one.num_backbone_parameters + one.num_head_parameters == count
    assert one.num_head_parameters == 16 * 32 + 32
    assert [sent.total for sent in one.traffic.values()] == [0, 0]
    four = resolve(run, train_class_sizes=SIZES, world_size=4)
    assert four.traffic["gradients of the network"].total == 2 * 3 * item * count // 4
    many = resolve(run, train_class_sizes=[3] * 5000, world_size=4)
    assert four.traffic == many.traffic
    assert four.traffic["objective"].by_kind() == {
        # Parts of 2, 3, 2 and 3 images; 3 of W = 4 ranks are sent to.
        "all_gather": 3 * 3 * (8 + 32 * item),  # labels and embeddings
        "all_reduce": 2 * 3 * 10 * (1 + 2) * item // 4,  # a maximum, two sums per image
        "reduce_scatter": 3 * 3 * 32 * item,  # gradients of embeddings
    }


def test_batch_norm_and_draws_are_described() -> None:
    run = config(model="{backbone: {name: resnet18, batch_norm: {statistics: synchronized}}}")
    plan = resolve(run, train_class_sizes=[4] * 8, world_size=2)
    row = ("batch normalisation", "20 layers, affine trained, statistics of the global batch")
    assert row in plan.describe()
    # 4,800 channels: two float64 gathered and two float32 reduced of each, and 20 counts.
    gathered, reduced = 8 * (20 + 2 * 4800), 2 * 4800 * 4
    sent = f"{gathered + reduced:,} bytes (all-gather {gathered:,} bytes, all-reduce {reduced:,} "
    assert ("sent per rank and step, batch normalisation", f"{sent}bytes)") in plan.describe()
    run = config(model="{backbone: {name: swin_t}}")
    plan = resolve(run, train_class_sizes=[4] * 8, world_size=3)
    labels = [label for label, _ in plan.describe()]
    assert "random layers" in labels
    assert "batch normalisation" not in labels


def test_dynamic_assignment_needs_two_images_of_a_class() -> None:
    dynamic = {"loss": "{name: proxy_nca, assignment: dynamic}", "model__normalize": "batch"}
    alone = "{name: balanced, classes_per_batch: 10, samples_per_class: 1}"
    run = config(data__batches=alone, **dynamic)
    with pytest.raises(ConfigError, match=r"dynamic takes a positive .*samples_per_class is 1\."):
        resolve(run, train_class_sizes=[4] * 12, world_size=1)
    # 45 pairs of a batch; 100 of the 100 x 199 pairs of images are of a class.
    few = r"batches of 10 of 200 images in 100 classes hold 0\.23 pairs of a class on average"
    with pytest.raises(ConfigError, match=few):
        resolve(config(**dynamic), train_class_sizes=[2] * 100, world_size=1)
    plan = resolve(config(**dynamic), train_class_sizes=SIZES, world_size=2)
    row = ("batch normalisation of embeddings", "no weights, statistics of the global batch")
    assert row in plan.describe()
    sent = (1 + 2 * 32) * 8 + 2 * 32 * 4  # moments in float64, two sums in float32
    assert plan.traffic["batch normalisation"].total == sent


def test_a_proxy_that_all_images_share_is_noticed_once(caplog: pytest.LogCaptureFixture) -> None:
    warning = SharedProxyWarning()
    warning.see(40, 40, {"chosen_proxies": 1.0})
    warning.see(50, 10, {"chosen_proxies": 1.1})
    warning.see(70, 20, {"chosen_proxies": 1.0})
    assert caplog.messages == []
    for step in (100, 130, 160):
        warning.see(step, 30, {"chosen_proxies": 1.0})
    assert len(caplog.messages) == 1
    assert "for 50 steps (noticed at step 100)" in caplog.messages[0]
    assert "model.normalize: batch" in caplog.messages[0]


def test_resnet50_is_counted_without_its_memory() -> None:
    run = config(model="{backbone: {name: resnet50, weights: IMAGENET1K_V1}, embedding_size: 512}")
    before = torch.get_rng_state()
    plan = resolve(run, train_class_sizes=SIZES, world_size=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert plan.num_backbone_parameters == 23_508_032
    assert plan.num_head_parameters == 2048 * 512 + 512


@pytest.mark.parametrize(
    ("optimizer", "copies"),
    [("{name: sgd, momentum: 0.0}", 1), ("{name: sgd}", 2), ("{name: rmsprop}", 2)],
)
def test_memory_of_optimiser_state(optimizer: str, copies: int) -> None:
    plan = resolve(config(optim=optimizer), train_class_sizes=SIZES, world_size=1)
    assert plan.proxy_bytes == (14 * 32 * 4 * copies,)


def test_description() -> None:
    plan = resolve(config(), train_class_sizes=SIZES, validation_class_sizes=[4, 6], world_size=2)
    rows = dict(plan.describe())
    assert rows["training"] == "37 images of 7 classes"
    assert rows["validation"] == "10 images of 2 classes"
    assert rows["images per rank"] == "5, 5"
    assert rows["total steps"] == "12 (4 epochs)"
    assert rows["proxies per rank"] == "6, 8"
    assert "bytes" in rows["sent per rank and step, objective"]
    assert (
        dict(resolve(config(), train_class_sizes=SIZES, world_size=2).describe())["validation"]
        == "none"
    )


@pytest.mark.parametrize(
    ("changes", "sizes", "world_size", "error", "words"),
    [
        ({}, SIZES, 8, TopologyError, r"there are 7 training classes and 8 ranks"),
        ({}, [30] * 20, 11, TopologyError, r"global_batch_size 10 .*number of ranks 11"),
        ({}, [5, 0, 7], 1, DataError, r"1 of 3 classes have none, the first is class 1"),
        ({}, [50], 1, DataError, r"at least 2 classes, but there are 1"),
        ({}, [2, 3], 1, ConfigError, r"global_batch_size 10 images, but there are 5"),
        (
            {"data__batches": "{name: balanced, classes_per_batch: 5, samples_per_class: 2}"},
            [9, 9, 9],
            1,
            ConfigError,
            r"classes_per_batch 5 needs .* there are 3",
        ),
        (
            {"data__batches__last": "keep"},
            [16, 8, 8],
            3,
            TopologyError,
            r"at least 3 images.*leave 2",
        ),
        (
            {"schedule": "{name: cosine, warmup_steps: 12}"},
            SIZES,
            1,
            ConfigError,
            r"warmup_steps is 12, but the run has only 12 steps",
        ),
        (
            {"train__backbone_warmup_epochs": 4},
            SIZES,
            1,
            ConfigError,
            r"epochs is 4, but the run has 12 steps of 3 per epoch",
        ),
        (
            {"projections": "{form: table}"},
            SIZES,
            1,
            ConfigError,
            r"form is table, which is defined for the losses contrastive, triplet and multi_simil",
        ),
        (
            {"loss": "{name: margin}", "projections": "{form: table}"},
            SIZES,
            1,
            ConfigError,
            r"but the section loss gives Margin",
        ),
        (
            {**TABLE, "projections__representatives_per_class": 10},
            SIZES,
            1,
            DataError,
            r"per_class is 10, but the largest of the 7 training classes has 9 images",
        ),
        (
            {**TABLE, "projections__patience": 2, "validation": "{name: none}"},
            SIZES,
            1,
            ConfigError,
            r"patience is 2, but validation.name is none",
        ),
        (
            {**TABLE, "projections": "{form: table, mining: {}}"},
            SIZES,
            1,
            ConfigError,
            r"projections.mining needs data.batches.name balanced .* has name: shuffled",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    changes: dict[str, Any],
    sizes: list[int],
    world_size: int,
    error: type[Exception],
    words: str,
) -> None:
    with pytest.raises(error, match=words):
        resolve(config(**changes), train_class_sizes=sizes, world_size=world_size)


def test_the_plan_shows_the_table_of_representatives() -> None:
    """Shuffled batches, no lead, and classes of 4 and 3 images are no reason to refuse."""
    changes = {**TABLE, "optim": "{name: adam, lr: 0.1, representative_lr: 0.5}"}
    plan = resolve(config(**changes), train_class_sizes=SIZES, world_size=3)
    rows = dict(plan.describe())
    assert rows["representatives per rank"] == "10, 10, 15"
    assert plan.proxy_bytes == tuple(n * 32 * 4 * 3 for n in (10, 10, 15))
    assert rows["missing rows"] == "3 of 35: 2 classes have fewer than 5 images"
    assert rows["embedded at the start of a problem"] == "32 images"
    assert rows["learning rates"] == "backbone 0.1, head 0.1, representatives 0.5"
    assert "proxies per rank" not in rows
    assert not plan.has_proxies

    changes |= {"projections__table__trainable": "false", "projections__selection": "k_center"}
    plan = resolve(config(**changes), train_class_sizes=[9] * 4, world_size=1)
    rows = dict(plan.describe())
    assert plan.proxy_bytes == (20 * 32 * 4,)
    assert rows["embedded at the start of a problem"] == "36 images to select from, then 20"
    assert "representatives" not in rows["learning rates"]
    assert "missing rows" not in rows


def test_the_plan_shows_every_learning_rate() -> None:
    changes = {
        "optim": "{name: adamw, lr: 1e-4, head_lr: 1e-3, proxy_lr: 1e-2, bias_lr: 2e-4}",
        "schedule": "{name: cosine, warmup_steps: 2}",
        "train__backbone_warmup_epochs": 1,
    }
    rows = dict(resolve(config(**changes), train_class_sizes=SIZES, world_size=1).describe())
    assert rows["learning rates"] == "backbone 0.0001, head 0.001, biases 0.0002, proxies 0.01"
    assert rows["schedule"] == "cosine, 2 steps of warm-up"
    assert rows["backbone frozen"] == "the first 3 steps"
    margin = config(loss="{name: margin}", optim="{name: adam, lr: 0.1, loss_lr: 0.5}")
    rows = dict(resolve(margin, train_class_sizes=SIZES, world_size=1).describe())
    assert rows["learning rates"] == "backbone 0.1, head 0.1, loss 0.5"


@pytest.mark.parametrize(
    ("changes", "sizes", "world_size", "message"),
    [
        # 37 images in batches of 12 leave one.
        (
            {"train__global_batch_size": 12},
            SIZES,
            1,
            r"synchronized statistics needs at least 2 images, but there is only 1 image in a "
            r"batch \(37 images in batches of 12 on 1 rank\)",
        ),
        (
            {
                "train__global_batch_size": 12,
                "model__backbone__batch_norm": "{statistics: per_rank}",
            },
            SIZES,
            1,
            r"per_rank statistics needs at least 2 images, but rank 0 has 1 of the 1 images",
        ),
        # 37 images in batches of 16 leave 5 for 3 ranks: 1, 2 and 2.
        (
            {
                "train__global_batch_size": 16,
                "model__backbone__batch_norm": "{statistics: per_rank}",
            },
            SIZES,
            3,
            r"rank 0 has 1 of the 5 images in a batch \(37 images in batches of 16 on 3 ranks\)",
        ),
        # Every batch, not only the last.
        (
            {
                "train__global_batch_size": 4,
                "model__backbone__batch_norm": "{statistics: per_rank}",
            },
            [2, 2, 2, 2],
            4,
            r"rank 0 has 1 of the 4 images in a batch \(8 images in batches of 4 on 4 ranks\)",
        ),
    ],
)
def test_batch_statistics_of_one_image_are_refused(
    changes: dict[str, Any], sizes: list[int], world_size: int, message: str
) -> None:
    batches = "{name: shuffled, last: keep}"
    changes = {"model__backbone__norm": "batch", "data__batches": batches} | changes
    with pytest.raises(ConfigError, match=message):
        resolve(config(**changes), train_class_sizes=sizes, world_size=world_size)
    changes |= {"train__epochs": "null", "train__steps": 0}  # Nothing is trained.
    resolve(config(**changes), train_class_sizes=sizes, world_size=world_size)


@pytest.mark.parametrize(
    "changes",
    [
        {"data__batches": "{name: shuffled, last: drop}"},
        {"model__backbone__norm": "group"},
        {"train__global_batch_size": 16},
        {"train__epochs": "null", "train__steps": 3},
        {"train__epochs": "null", "train__steps": 7, "train__backbone_warmup_epochs": 1},
        {
            "model__backbone": "{name: resnet18, weights: IMAGENET1K_V1}",
        },
    ],
    ids=["dropped", "group norm", "larger", "never reached", "in warm-up only", "frozen"],
)
def test_one_image_is_enough_without_its_statistics(changes: dict[str, Any]) -> None:
    first = {
        "model__backbone__norm": "batch",
        "data__batches": "{name: shuffled, last: keep}",
        "train__global_batch_size": 12,
    }
    if "model__backbone" in changes:
        del first["model__backbone__norm"]
    resolve(config(**first | changes), train_class_sizes=SIZES, world_size=1)
