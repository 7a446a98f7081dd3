"""Questions to a scaling study: how they are read, refused and answered."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import pytest

from dml_dist.config.load import parse_config
from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError, TopologyError
from dml_dist.studies.scale.ask import Answer, answer, print_answer
from dml_dist.studies.scale.hardware import PRESETS
from dml_dist.studies.scale.points import ScalePoint
from dml_dist.studies.scale.question import Question, parse
from dml_dist.terminal import open_console


def config(backbone: str = "resnet50") -> RunConfig:
    return parse_config(
        {
            "name": "scaled",
            "data": {"path": "unused"},
            "model": {
                "backbone": {"name": backbone, "norm": "group"},
                "embedding_size": 512,
            },
            "train": {"global_batch_size": 64, "epochs": 1},
        }
    )


def asked(question: str, points: tuple[ScalePoint, ...] = (), backbone: str = "resnet50") -> Answer:
    return answer(question, points, config(backbone))


def gpu_point(world_size: int, num_classes: int, device: str = "NVIDIA H100 80GB") -> ScalePoint:
    """A point whose GPUs take 0.1 ms an image, and 1e-12 s a product of logits."""
    batch = 128 * world_size
    products = batch * 512 * num_classes / world_size
    return ScalePoint(
        name=f"{world_size} GPUs, {num_classes} classes",
        world_size=world_size,
        num_classes=num_classes,
        embedding_size=512,
        global_batch_size=batch,
        backbone="resnet50",
        image_size=224,
        status="measured",
        device=device,
        seconds_step=0.0128 + 1e-12 * products,
        memory_measured=4e9 + 128 * 20e6 + 512 * 16 * num_classes / world_size,
        gradient_bytes=102e6,
    )


H100_POINTS = tuple(
    gpu_point(world_size, num_classes)
    for world_size in (1, 2, 8)
    for num_classes in (10_000, 100_000, 1_000_000)
)


def shown(given: Answer) -> str:
    stream = io.StringIO()
    print_answer(given, open_console(file=stream, width=200))
    return stream.getvalue()


# ---------------------------------------------------------------- the question


def test_a_question_is_read() -> None:
    text = "gpus=64 classes=10_000_000, batch=4096 images=1e6 proxies=replicated"
    assert parse(text) == Question(
        gpus=64, classes=10_000_000, batch=4096, images=1e6, proxies="replicated"
    )


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("gpus=64 clases=10", "'clases' is unknown. Did you mean classes?"),
        ("gpus=64 colour=red", "'colour' is unknown. A question is a list"),
        ("classes=10", "does not say how many GPUs"),
        ("gpus=64", "does not say how many classes"),
        ("gpus=many classes=10", "gpus must be a whole number from 1 to 1,024, but is 'many'"),
        ("gpus=2000 classes=10", "gpus must be a whole number from 1 to 1,024, but is '2000'"),
        ("gpus=2.5 classes=10", "but is '2.5'"),
        ("gpus=nan classes=10", "but is 'nan'"),
        ("gpus=8 classes=1e9", "classes must be a whole number from 2 to 100,000,000"),
        ("gpus=8 gpus=9", "gpus is given twice"),
        ("gpus=", "'gpus=' has no value. Write gpus=VALUE"),
        ("gpus=8 classes=10 hardware=h100-nvlink", "Did you mean h100-nvlink-400g?"),
        ("gpus=8 classes=10 proxies=shared", "Choose one of sharded, replicated"),
        ("gpus=64 classes=1000 batch=32", "batch 32 is smaller than gpus 64"),
    ],
)
def test_a_question_that_cannot_be_read_is_refused(question: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        asked(question)
    assert message in str(error.value)


def test_a_gpu_without_a_step_time_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no step time of resnet50 on H100"):
        asked("gpus=64 classes=10000000 hardware=h100-nvlink-400g")
    with pytest.raises(ConfigError, match="no step time of resnet18 on A100"):
        asked("gpus=64 classes=10000000 hardware=a100-nvlink-200g", backbone="resnet18")
    # Points of another device say nothing of it.
    on_cpu = tuple(replace(point, device="cpu") for point in H100_POINTS)
    with pytest.raises(ConfigError, match="no step time of resnet50 on H100"):
        asked("gpus=64 classes=10000000 hardware=h100-nvlink-400g", on_cpu)


def test_more_gpus_than_classes_are_refused() -> None:
    with pytest.raises(TopologyError, match="at most 32 ranks"):
        asked("gpus=64 classes=32")


# ---------------------------------------------------------------- the answer


def test_an_answer_from_a_published_step_time() -> None:
    given = asked("gpus=64 classes=10000000 images=42000000 epochs=20")
    assert given.hardware is PRESETS["a100-nvlink-200g"]
    low, middle, high = given.images_per_second
    assert low < middle < high
    # 64 GPUs at 2,078 images/s alone; the objective of 10 million classes costs more than that.
    assert high < 64 * 16621 / 8
    assert given.limit == "objective"
    assert given.hours is not None
    assert given.hours[1] == pytest.approx(42e6 * 20 / middle / 3600)
    assert given.hours[0] < given.hours[1] < given.hours[2]
    # Proxies, gradient and two moments of 156,250 rows, and the network's, at least.
    assert given.prediction.memory > 156_250 * 512 * 16 + 4 * 94e6
    assert given.fits
    text = shown(given)
    assert "DeepLearningExamples" in text
    assert "world_size 64 is 8 times the largest measured, 8." in text
    assert "Activations of resnet50 were not measured" in text
    assert "without activations" in text


def test_few_classes_are_limited_by_compute_near_the_published_speed() -> None:
    given = asked("gpus=8 classes=1000")
    assert given.limit == "compute"
    assert given.images_per_second[1] == pytest.approx(16621, rel=0.02)


@pytest.mark.parametrize(
    ("hardware", "classes"),
    [("a100-nvlink-200g", 100_000_000), ("a100-100g-ethernet", 1_000_000)],
)
def test_answers_from_8_to_1024_gpus_and_to_100_million_classes(
    hardware: str, classes: int
) -> None:
    found = [
        asked(f"gpus={gpus} classes={classes} batch=131072 hardware={hardware}")
        for gpus in (8, 64, 512, 1024)
    ]
    values = [value for one in found for value in one.images_per_second]
    assert all(math.isfinite(value) and value > 0 for value in values)
    memory = [one.prediction.memory for one in found]
    assert memory == sorted(memory, reverse=True)
    width = [one.prediction.seconds_high / one.prediction.seconds_low for one in found]
    assert width == sorted(width)


def test_a_table_that_does_not_fit_is_limited_by_memory() -> None:
    question = "gpus=64 classes=10000000 proxies="
    replicated, sharded = asked(f"{question}replicated"), asked(f"{question}sharded")
    assert replicated.limit == "memory of the GPU"
    assert "does not fit in the 80 GB" in shown(replicated)
    assert sharded.fits
    # The replicated table's gradient, 20 GB, is summed over all GPUs.
    limits = replicated.prediction.limits
    assert limits["network"] > 100 * sharded.prediction.limits["network"]


def test_a_slower_network_is_slower() -> None:
    question = "gpus=64 classes=100000 batch=2048 hardware=a100-"
    fast, slow = asked(f"{question}nvlink-200g"), asked(f"{question}100g-ethernet")
    assert slow.images_per_second[1] < fast.images_per_second[1]
    spread = [one.prediction.seconds_high / one.prediction.seconds_low for one in (fast, slow)]
    assert spread[0] < spread[1]


def test_points_on_the_gpu_come_before_what_is_published() -> None:
    given = asked("gpus=8 classes=500000", H100_POINTS)
    assert given.hardware is PRESETS["h100-nvlink-400g"]
    seconds = gpu_point(8, 500_000).seconds_step
    # The optimiser's part is computed, too.
    assert given.prediction.seconds == pytest.approx(seconds, rel=0.05)
    assert "points of the study" in given.sources[0]
    # Activations of 128 images of 20 MB follow from the points; they do not tell them from the
    # rest of what is fixed, so the most that they allow is counted.
    assert given.counts_activations
    assert given.prediction.memory >= 128 * 20e6


def test_a_step_time_in_the_question_is_taken() -> None:
    given = asked("gpus=8 classes=1000 batch=1024 hardware=h100-nvlink-400g step_time=0.05")
    assert given.images_per_second[1] == pytest.approx(1024 / 0.05, rel=0.02)
    assert "0.05 s, as the question says" in given.sources[0]
    assert any("loses inside itself is not counted" in mark for mark in given.marked)


def test_the_measured_machine_answers_for_itself() -> None:
    points = tuple(replace(point, device="cpu", processors=8) for point in H100_POINTS)
    given = asked("gpus=4 classes=500000 hardware=measured", points)
    assert given.hardware is None
    assert given.fits is None
    assert "4 ranks of the measured machine" in shown(given)
    with pytest.raises(ConfigError, match="Leave out step_time and backbone"):
        asked("gpus=4 classes=500000 hardware=measured backbone=resnet101", points)
    with pytest.raises(ConfigError, match="at least two measured points"):
        asked("gpus=4 classes=500000 hardware=measured")
