"""`dml-dist submit`: what is checked on this machine, and what is sent to a target."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dml_dist.config.base import Section
from dml_dist.config.load import differing_paths, load_config, with_absolute_paths
from dml_dist.config.schema import RunConfig
from dml_dist.data.index import INDEX_NAME
from dml_dist.errors import ConfigError
from dml_dist.jobs.records import JobRecord, JobRecords
from dml_dist.jobs.target import JobRequest, Target
from dml_dist.orchestration.evaluate import evaluation_config
from dml_dist.runs.folder import RunFolder
from dml_dist.train.resume import resumable_differences
from dml_dist.urls import local_path

COMMANDS = ("train", "tune", "scale", "compare", "evaluate")
"""The subcommands that may be submitted."""


@dataclass(frozen=True)
class Command:
    """A subcommand as the command line parsed it.

    Attributes:
        name: One of COMMANDS.
        words: Its arguments, as they were given.
        values: Its arguments and options by parameter, such as `run_dir`.
        config: Its configuration with all changes; None where an evaluated run is elsewhere.
    """

    name: str
    words: tuple[str, ...]
    values: Mapping[str, Any]
    config: RunConfig | None


def read_command(name: str, words: Sequence[str], values: Mapping[str, Any]) -> Command:
    """Load the configuration of a subcommand.

    Raises:
        ConfigError: If it is wrong, or the subcommand cannot be submitted as it is.
    """
    if values.get("dry_run"):
        raise ConfigError("leave --dry-run out: submit --render checks a command and sends nothing")
    config: RunConfig | None = None
    overrides = [*(values.get("changes") or ())]
    if values.get("workers") is not None:
        overrides.append(f"launch.num_workers={values['workers']}")
    if name != "evaluate":
        config = load_config(Path(values["config"]), overrides)
    elif (folder := RunFolder(values["run"])).info_path.is_file():
        config = evaluation_config(folder, overrides)
    command = Command(name, tuple(words), values, config)
    launcher = values.get("launcher") or "ray"
    if _has_ray_ranks(command) and launcher != "ray":
        raise ConfigError(
            f"--launcher {launcher}: on a cluster Ray starts the ranks of {name}; leave it out"
        )
    return command


def request_of(command: Command, id: str) -> JobRequest:
    """Return what is sent: the command with absolute folders, for the cluster that it runs in."""
    words = list(command.words)
    launch = ["--set", "launch.address=auto"]
    if _has_ray_ranks(command):
        launch = ["--launcher", "ray", *launch]
    if command.name == "evaluate":
        words[_place(words, command.values["run"])] = str(run_dir_of(command))
    else:
        words[_place(words, command.values["config"])] = _portable(command.values["config"])
        if not Path(command.values["run_dir"] or ".").is_absolute():
            launch += ["--run-dir", str(run_dir_of(command))]
        launch += _absolute_paths(command.config)
    fewest, most = _ranks(command)
    launch_config = command.config.launch if command.config is not None else None
    return JobRequest(
        id=id,
        arguments=(command.name, *words, *launch),
        run_dir=run_dir_of(command),
        min_workers=fewest,
        max_workers=most * _at_a_time(command),
        cpus_per_rank=launch_config.cpus_per_rank if launch_config is not None else 1.0,
        uses_gpu=launch_config is not None and launch_config.use_gpu == "yes",
    )


def name_of(command: Command) -> str:
    """Return the name of the run or study."""
    return command.config.name if command.config is not None else run_dir_of(command).name


def run_dir_of(command: Command) -> Path:
    """Return the folder of the run or study, absolute."""
    if command.name == "evaluate":
        return Path(command.values["run"]).absolute()
    assert command.config is not None
    return Path(command.values["run_dir"] or Path("runs") / command.config.name).absolute()


def data_is_here(command: Command) -> bool:
    """Whether this machine has the data, so that a failed plan is the request's fault."""
    if command.config is None:
        return False
    folder = local_path(command.config.data.path)
    return folder is None or (folder / INDEX_NAME).exists()


def check_folder(command: Command) -> None:
    """Refuse a training that its run folder does not allow, where this machine sees the folder.

    Raises:
        ConfigError: If a new run has a folder that is in use, or a resumed one has changed.
    """
    if command.name != "train" or command.config is None:
        return
    folder = RunFolder(run_dir_of(command))
    if not command.values["resume"]:
        folder.require_new()
    elif folder.info_path.is_file():
        saved = load_config(folder.config_path)
        resumable_differences(saved, with_absolute_paths(command.config), folder.path)


def send(
    target: Target, config: Section, request: JobRequest, records: JobRecords, console: Console
) -> JobRecord:
    """Send a job that was checked, and keep its record."""
    settings = config.model_dump(mode="json")
    with records.sending(request, settings) as record:
        job = target.submit(request)
    record = records.write(JobRecord(request, settings, record.submitted, job))
    where = settings["target"] if job == request.id else f"{settings['target']}, as {job}"
    console.print(
        f"submitted {request.id} to {where}; run folder: {request.run_dir}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return record


def _has_ray_ranks(command: Command) -> bool:
    """Whether Ray starts the ranks of each run; else it places whole runs in the cluster."""
    if command.name == "tune":
        return False
    return command.name != "compare" or _at_a_time(command) == 1


def _ranks(command: Command) -> tuple[int, int]:
    """Return the fewest and the most ranks of a run."""
    if command.config is None:
        ranks = int(command.values.get("workers") or 1)
        return ranks, ranks
    launch = command.config.launch
    if _has_ray_ranks(command) or (command.values.get("launcher") or launch.launcher) == "ray":
        return launch.fewest_workers, launch.num_workers
    return 1, 1


def _at_a_time(command: Command) -> int:
    """Return the number of runs at a time."""
    section = getattr(command.config, command.name, None)
    parallel = command.values.get("parallel") or getattr(section, "parallel", None)
    return int(parallel or 1)


def _place(words: Sequence[str], path: Any) -> int:
    """Return the position of a path among the words of a command."""
    return next(i for i, word in enumerate(words) if Path(word) == Path(path))


def _portable(config: Any) -> str:
    """Return the path of the configuration below the current folder, else the absolute one."""
    path = Path(os.path.normpath(Path(config).absolute()))
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _absolute_paths(config: RunConfig | None) -> list[str]:
    """Return the changes that make relative paths absolute: a job starts in another folder.

    A path below `~` is left to the cluster.
    """
    assert config is not None
    words: list[str] = []
    for difference in differing_paths(config, with_absolute_paths(config)):
        if not str(difference.old).startswith("~"):
            words += ["--set", f"{difference.path}={json.dumps(difference.new)}"]
    return words
