"""Learning rate schedules: pure functions of the step, so that nothing but the step is saved."""

from __future__ import annotations

import math
from typing import assert_never

from dml_dist.config.objective import (
    ConstantScheduleConfig,
    CosineScheduleConfig,
    ScheduleConfig,
    StepScheduleConfig,
)


def learning_rate_factor(
    config: ScheduleConfig, step: int, *, total_steps: int, steps_per_epoch: int
) -> float:
    """Return what every group's learning rate is multiplied by for one update.

    Warm-up: step s of the first `warmup_steps` has (s + 1) / warmup_steps, times the rest.
    Cosine: from 1 at the first step after warm-up to `final` at the last step of the run.
    Step: gamma to the number of milestones (epochs) that have begun.

    Args:
        config: The schedule section.
        step: Number of updates already made, 0 .. total_steps - 1.
        total_steps: Updates of the whole run; only the cosine depends on it.
        steps_per_epoch: Updates of one epoch; only milestones depend on it.
    """
    warmup = config.warmup_steps
    rising = (step + 1) / warmup if step < warmup else 1.0
    match config:
        case ConstantScheduleConfig():
            return rising
        case StepScheduleConfig():
            passed = sum(step >= epoch * steps_per_epoch for epoch in config.milestones)
            return rising * config.gamma**passed
        case CosineScheduleConfig():
            if step < warmup:
                return rising
            done = (step - warmup) / max(1, total_steps - warmup - 1)
            return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * done))
        case _:
            assert_never(config)


def depends_on_total_steps(config: ScheduleConfig) -> bool:
    """Whether a longer run would have had other learning rates from the start."""
    return isinstance(config, CosineScheduleConfig)
