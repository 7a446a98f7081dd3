"""`python -m dml_dist.jobs.start_or_resume DIR COMMAND ...`: a command that can be repeated.

A cluster that retries a job repeats its command line. `train` and `compare` refuse a folder that
holds their work already unless they are given `--resume`; this adds it when the folder DIR does.
The other commands need nothing: `tune` continues by itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dml_dist.runs.comparison import ComparisonFolder
from dml_dist.runs.folder import RunFolder


def with_resume(folder: Path, arguments: Sequence[str]) -> list[str]:
    """Return the arguments of `dml-dist` that start what the folder lacks, or resume what it has.

    Args:
        folder: Folder of the run or comparison.
        arguments: Subcommand and its arguments.
    """
    match arguments[0]:
        case "train":
            started = RunFolder(folder).info_path.is_file()
        case "compare":
            started = ComparisonFolder(folder).config_path.is_file()
        case _:
            started = False
    return [*arguments, *(["--resume"] if started and "--resume" not in arguments else [])]


if __name__ == "__main__":
    command = with_resume(Path(sys.argv[1]), sys.argv[2:])
    # Replaces this process, so that signals and the exit code are those of the command.
    os.execv(sys.executable, [sys.executable, "-m", "dml_dist", *command])
