"""Schedules: the factor of every step against its definition."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from dml_dist.config.objective import (
    ConstantScheduleConfig,
    CosineScheduleConfig,
    ScheduleConfig,
    StepScheduleConfig,
)
from dml_dist.train.optim import depends_on_total_steps, learning_rate_factor


def factors(config: ScheduleConfig, total_steps: int, steps_per_epoch: int = 4) -> list[float]:
    return [
        learning_rate_factor(config, step, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
        for step in range(total_steps)
    ]


def test_constant() -> None:
    assert factors(ConstantScheduleConfig(), 3) == [1.0, 1.0, 1.0]
    assert factors(ConstantScheduleConfig(warmup_steps=4), 6) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_step_multiplies_at_the_beginning_of_epochs() -> None:
    config = StepScheduleConfig(milestones=(1, 3), gamma=0.5)
    assert factors(config, 16) == [1.0] * 4 + [0.5] * 8 + [0.25] * 4
    warm = StepScheduleConfig(milestones=(1,), gamma=0.5, warmup_steps=6)
    assert factors(warm, 8) == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 12, 0.5, 0.5, 0.5])


def test_cosine_falls_from_one_to_final_at_the_last_step() -> None:
    values = factors(CosineScheduleConfig(final=0.1, warmup_steps=2), 13)
    assert values[:3] == [0.5, 1.0, 1.0]
    assert values[-1] == pytest.approx(0.1)
    assert values[7] == pytest.approx(0.55)
    assert values[4] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.2)))
    assert all(one >= two for one, two in pairwise(values[1:]))


def test_cosine_of_a_single_step_trains() -> None:
    assert factors(CosineScheduleConfig(), 1) == [1.0]
    assert factors(CosineScheduleConfig(warmup_steps=1), 2) == [1.0, 1.0]


def test_only_the_cosine_depends_on_the_length_of_the_run() -> None:
    for config in (
        ConstantScheduleConfig(warmup_steps=2),
        StepScheduleConfig(milestones=(1,)),
        CosineScheduleConfig(),
    ):
        longer = factors(config, 12)[:8]
        assert (longer != factors(config, 8)) == depends_on_total_steps(config)
