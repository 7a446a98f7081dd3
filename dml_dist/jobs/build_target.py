"""From what a user names, `--to ray` or a file, to the settings of a target and the target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, assert_never, get_args

from dml_dist.config.base import Section
from dml_dist.config.load import parse_section
from dml_dist.config.shape import nearest, shown
from dml_dist.config.yaml_text import KeyPath, read_text, read_yaml
from dml_dist.errors import ConfigError
from dml_dist.jobs.target import Target

TargetName = Literal["ray", "slurm", "kuberay"]
_NAMES: tuple[TargetName, ...] = get_args(TargetName)


def load_target(to: str, overrides: Sequence[str] = ()) -> tuple[Section, Target]:
    """Return a target's settings, and the target.

    Args:
        to: The name of a target, for its default settings, or the path of a YAML file.
        overrides: Changes of the form `key=value`.

    Raises:
        ConfigError: If there is no such target or file, or a setting is wrong.
    """
    if to in _NAMES:
        return build_target({"target": to}, overrides, f"the settings of {to}")
    if not Path(to).suffix:
        raise ConfigError(
            f"--to {to} is no target: give one of {', '.join(_NAMES)}, or a YAML file with the "
            f"settings of one{_suggestion(to)}"
        )
    document = read_yaml(read_text(Path(to)), to)
    return build_target(document.value, overrides, to, document.lines)


def build_target(
    values: Any,
    overrides: Sequence[str] = (),
    source: str = "the job's record",
    lines: Mapping[KeyPath, int] | None = None,
) -> tuple[Section, Target]:
    """Return a target's settings, from plain values, and the target.

    Raises:
        ConfigError: If the values are wrong.
    """
    name = values.get("target") if isinstance(values, dict) else None
    if name not in _NAMES:
        raise ConfigError(
            f"{source} needs the key target with one of {', '.join(_NAMES)}, got {shown(name)}"
            f"{_suggestion(str(name))}"
        )
    section, build = _classes(name)
    config = parse_section(section, values, overrides, source, lines)
    return config, build(config)


def _suggestion(word: str) -> str:
    close = nearest(word, _NAMES)
    return f"; did you mean {close}?" if close else ""


def _classes(name: TargetName) -> tuple[type[Section], Callable[[Any], Target]]:
    match name:
        case "ray":
            from dml_dist.jobs.ray_jobs import RayTarget, RayTargetConfig

            return RayTargetConfig, RayTarget
        case "slurm":
            from dml_dist.jobs.slurm import SlurmTarget, SlurmTargetConfig

            return SlurmTargetConfig, SlurmTarget
        case "kuberay":
            from dml_dist.jobs.kuberay import KubeRayTarget, KubeRayTargetConfig

            return KubeRayTargetConfig, KubeRayTarget
        case _:
            assert_never(name)
