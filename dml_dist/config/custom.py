"""Import of user code: `target: package.module:name`."""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

from dml_dist.config.base import TARGET
from dml_dist.config.shape import nearest
from dml_dist.errors import ConfigError

# A target within a text: a change of a method, such as "loss.target=my.losses:MyLoss".
_IN_TEXT = re.compile(rf"\btarget['\"]?\s*[=:]\s*['\"]?({TARGET[1:-1]})")


def named_targets(value: Any, path: str = "") -> Iterator[str]:
    """Yield the targets that plain values of a configuration name, valid or not.

    Args:
        value: Mappings, lists and texts, as read from a file.
        path: Where it is in the configuration.

    Yields:
        `path: target` of each, such as `loss.target: my.losses:MyLoss`.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            below = f"{path}.{key}" if path else str(key)
            if below.rpartition(".")[2] == "target" and isinstance(item, str):
                yield f"{below}: {item}"
            else:
                yield from named_targets(item, below)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from named_targets(item, path)
    elif isinstance(value, str):
        for match in _IN_TEXT.finditer(value):
            yield f"{path}: {match[1]}"


def load_target(target: str) -> Any:
    """Import an object from user code.

    Modules in the current working directory can be imported; installed modules take precedence.

    Args:
        target: Where the object lives, as `package.module:name`.

    Raises:
        ConfigError: If the module cannot be imported (with the reason and the line), or does not
            define the name (with the nearest name and the file).
    """
    if not re.search(TARGET, target):
        raise ConfigError(
            f"target {target!r} must be package.module:name, such as my_project.losses:MyLoss"
        )
    module_name, _, name = target.partition(":")
    module = _import(module_name, target)
    try:
        return getattr(module, name)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        close = nearest(name, public)
        raise ConfigError(
            f"target {target!r}: {module_name} "
            f"({getattr(module, '__file__', None) or 'no file'}) does not define {name}"
            + (f"; did you mean {module_name}:{close}?" if close else "")
        ) from None


def call_target(target: str, *arguments: Any, options: Mapping[str, Any]) -> Any:
    """Import an object from user code, call it, and return its result.

    Raises:
        ConfigError: If it cannot be imported, or ends the process, as `sys.exit` does: the command
            would end without a word.
    """
    factory = load_target(target)
    try:
        return factory(*arguments, **options)
    except SystemExit as error:
        raise ConfigError(
            f"target {target!r} ended the process when it was called; name a "
            "class or function that returns the object"
        ) from error


def _import(module_name: str, target: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        # Last, so that no user file hides a library; never removed, as modules may import late.
        sys.path.append(here)
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise ConfigError(
                f"target {target!r}: there is no module {missing}; run the command in the folder "
                f"that contains it ({here} was searched), or install it"
            ) from None
        raise _failed(target, module_name, error) from error
    except (Exception, SystemExit) as error:
        raise _failed(target, module_name, error) from error


def _failed(target: str, module_name: str, error: BaseException) -> ConfigError:
    """Report the reason and the last line of user code that ran."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    if isinstance(error, SyntaxError):
        where = f" at {error.filename}, line {error.lineno}"
    else:
        where = f" at {own[-1].filename}, line {own[-1].lineno}" if own else ""
    return ConfigError(
        f"target {target!r}: importing {module_name} failed{where}: {type(error).__name__}: {error}"
    )
