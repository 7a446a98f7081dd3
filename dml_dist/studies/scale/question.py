"""The question of `dml-dist scale CONFIG --ask`, from its text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dml_dist.config.shape import nearest
from dml_dist.errors import ConfigError
from dml_dist.studies.scale.hardware import PRESETS

MEASURED = "measured"
"""Value of `hardware` for the machine of the study's points."""

_NUMBERS: dict[str, tuple[float, float]] = {
    "gpus": (1, 1024),
    "classes": (2, 100_000_000),
    "batch": (2, 10_000_000),
    "embedding": (2, 65_536),
    "images": (1, 1e12),
    "epochs": (1, 1e6),
    "step_time": (1e-6, 1e4),
}
_TEXTS = ("hardware", "proxies", "backbone")
KEYS = (*_NUMBERS, *_TEXTS)
"""What a question may name, as key=value."""


@dataclass(frozen=True)
class Question:
    """A question, with what it leaves open as None.

    Attributes:
        gpus: W.
        classes: C.
        batch: Global batch size.
        embedding: D.
        images: Training images of an epoch.
        epochs: Passes over the images.
        step_time: Seconds of forward and backward of a GPU's share of the batch, measured.
        hardware: Name of a preset, or `measured`.
        proxies: Sharded or replicated.
        backbone: Name of the network.
    """

    gpus: int
    classes: int | None = None
    batch: int | None = None
    embedding: int | None = None
    images: float | None = None
    epochs: float | None = None
    step_time: float | None = None
    hardware: str | None = None
    proxies: Literal["sharded", "replicated"] = "sharded"
    backbone: str | None = None


def parse(question: str) -> Question:
    """Return a question from its text, such as "gpus=64 classes=10000000".

    Raises:
        ConfigError: If it names an unknown key, leaves out `gpus`, or has a value out of range.
    """
    values: dict[str, float | str] = {}
    for part in question.replace(",", " ").split():
        key, equals, text = part.partition("=")
        if key not in KEYS:
            near = nearest(key, KEYS)
            hint = f" Did you mean {near}?" if near else ""
            raise ConfigError(
                f"--ask: {key!r} is unknown.{hint} A question is a list of key=value with "
                f"{', '.join(KEYS)}."
            )
        if not equals or not text:
            raise ConfigError(f"--ask: {part!r} has no value. Write {key}=VALUE.")
        if key in values:
            raise ConfigError(f"--ask: {key} is given twice. Keep one of them.")
        values[key] = _number(key, text) if key in _NUMBERS else text
    if "gpus" not in values:
        raise ConfigError(
            f'--ask: {question!r} does not say how many GPUs. Add gpus=N, such as "gpus=64 '
            'classes=10000000".'
        )
    _check_choice("proxies", values.get("proxies"), ("sharded", "replicated"))
    _check_choice("hardware", values.get("hardware"), (*PRESETS, MEASURED))
    return Question(**values)  # type: ignore[arg-type]


def _number(key: str, text: str) -> float | int:
    low, high = _NUMBERS[key]
    try:
        value = float(text.replace("_", ""))
    except ValueError:
        value = math.nan
    whole = key in ("gpus", "classes", "batch", "embedding")
    if not low <= value <= high or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise ConfigError(
            f"--ask: {key} must be {kind} from {low:,.6g} to {high:,.12g}, but is {text!r}."
        )
    return int(value) if whole else value


def _check_choice(key: str, value: float | str | None, choices: Sequence[str]) -> None:
    if value is None or value in choices:
        return
    near = nearest(str(value), choices)
    hint = f" Did you mean {near}?" if near else ""
    raise ConfigError(
        f"--ask: {key} {value!r} is unknown.{hint} Choose one of {', '.join(choices)}."
    )
