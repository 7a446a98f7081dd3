"""The text of a configuration file."""

from __future__ import annotations

import difflib
from pathlib import Path

from dml_dist.errors import ConfigError

_MAX_BYTES = 1 << 20


def read_text(path: Path) -> str:
    """Return the text of a configuration file.

    Raises:
        ConfigError: If it does not exist (with the YAML files nearby), is a folder, not readable,
            absurdly large or not UTF-8.
    """
    try:
        if path.is_dir():
            raise ConfigError(
                f"required a YAML file, got the folder {path}{_yaml_files(path, path.name)}"
            )
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        hint = _yaml_files(path.parent, path.name)
        raise ConfigError(f"required a YAML file, got {path}, which does not exist{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise ConfigError(f"required a YAML file, got {path}, not readable: {error}") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(
            f"required a configuration of at most {_MAX_BYTES >> 20} MiB, "
            f"got {path}, which is larger"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"required UTF-8 text, got {path}, whose line {line} holds the byte "
            f"0x{data[error.start]:02x}; save the file as UTF-8"
        ) from None


def _yaml_files(folder: Path, name: str) -> str:
    """Name the YAML files of a folder, those most like `name` first."""
    try:
        found = sorted(file.name for file in folder.iterdir() if file.suffix in (".yaml", ".yml"))
    except OSError:
        return f"; there is no folder {folder} either"
    if not found:
        return f"; there is no .yaml file in {folder.resolve()}"
    close = difflib.get_close_matches(name, found, n=3, cutoff=0.5) or found[:5]
    return f"; in {folder} there {'is' if len(close) == 1 else 'are'} {', '.join(close)}"
