"""A note for run folders whose configuration names code: they are programs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from dml_dist.config.custom import named_targets
from dml_dist.config.yaml_text import read_text, read_yaml
from dml_dist.errors import ConfigError
from dml_dist.terminal import say


def say_if_code(folder: Path, console: Console) -> None:
    """Say which code the configuration files of a run or study name, if any."""
    for file in sorted(folder.glob("*.yaml")):
        try:
            named = list(named_targets(read_yaml(read_text(file), str(file)).value))
        except ConfigError:
            continue  # Whoever needs the file reports what is wrong with it.
        if named:
            say(
                console,
                f"note: {file} names code ({', '.join(named)}), which evaluate, export and train "
                "import and run; use a run folder of others only if you trust that code",
            )
