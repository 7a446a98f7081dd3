"""Where modules are imported from: the current folder comes last, in child processes too.

Otherwise a `torch.py`, `token.py` or `ray/` in it, such as one that came with a data set, would be
imported and run in place of the library.
"""

from __future__ import annotations

import os
import sys


def put_current_folder_last() -> None:
    """Let all other folders go first, in this process and in Python processes that it starts.

    `python -m` puts the current folder first, and so does an empty entry of PYTHONPATH. One that
    PYTHONPATH names in full keeps its place.
    """
    os.environ["PYTHONSAFEPATH"] = "1"  # Else `python -c`, as of multiprocessing, puts it first.
    if any(map(_is_current, sys.path)):
        sys.path[:] = search_path()
    if "PYTHONPATH" in os.environ:
        os.environ["PYTHONPATH"] = os.pathsep.join(_python_path())


def search_path() -> list[str]:
    """Return the folders that this process imports from, and the current folder at the end."""
    return [*(folder for folder in sys.path if not _is_current(folder)), os.getcwd()]


def _is_current(folder: str) -> bool:
    return os.path.abspath(folder) == os.getcwd() and folder not in _python_path()


def _python_path() -> list[str]:
    """Return the entries of PYTHONPATH that are neither empty nor relative."""
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path[:1] == "/"]
