"""Settings of the SLURM target."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from dml_dist.config.base import NonNegativeInt, PositiveInt, Section
from dml_dist.jobs.slurm_commands import seconds_of

# No white space, quotes, backslashes or '#': sbatch's own parser of #SBATCH lines reads them.
Word = Annotated[str, Field(pattern=r"^[^\s\"'\\#]+$")]
Line = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$")]
Option = Annotated[str, Field(pattern=r"^--[a-z][^\x00-\x1f\x7f]*$")]
TIME = r"^(\d+|\d+:\d{2}|\d+:\d{2}:\d{2}|\d+-\d+(:\d{2}){0,2})$"


class SlurmTargetConfig(Section):
    """A SLURM cluster: what a job asks for, and how its processes find their Python."""

    target: Literal["slurm"] = "slurm"
    """Kind of target."""

    nodes: PositiveInt | None = None
    """Number of nodes; null is as many as `ranks_per_node` needs, or one node."""

    ranks_per_node: PositiveInt | None = None
    """Ranks of each node, with one GPU each if the run uses GPUs; null divides them evenly."""

    cpus_per_node: PositiveInt | None = None
    """CPUs of each node; null is `launch.cpus_per_rank` of the run times its ranks per node."""

    gpu_type: Word | None = None
    """Type of the GPUs, as the cluster calls it, such as a100; null is any."""

    partition: Word | None = None
    """Partition; null is the cluster's default."""

    account: Word | None = None
    """Account that is charged; null is the user's default."""

    qos: Word | None = None
    """Quality of service; null is the account's default."""

    time: Annotated[str, Field(pattern=TIME)] | None = None
    """Time limit of one start, in SLURM's form, such as "30", "12:00:00" or "2-00:00:00"."""

    constraint: Word | None = None
    """Features that the nodes must have, such as `a100&nvlink`."""

    memory: Annotated[str, Field(pattern=r"^\d+[KMGT]?$")] | None = None
    """Memory of each node, such as 64G; "0" is all of it, null the cluster's default."""

    exclusive: bool = False
    """Whether no other job may use the nodes."""

    extra: tuple[Option, ...] = ()
    """More options of sbatch, one each, such as --mail-type=END; they override the ones above."""

    setup: tuple[Line, ...] = ()
    """Lines of bash before Python starts, such as `module load cuda` or `source venv/bin/activate`.
    """

    python: Line = sys.executable
    """Python with dml_dist, on the nodes; one that `setup` activates is called just `python`."""

    log_dir: Annotated[str, Field(min_length=1)] = "runs/slurm"
    """Folder of the jobs' output, on storage that all nodes and this machine share."""

    requeue: bool = True
    """Whether a job that is preempted or reaches its time limit is queued again and resumes."""

    seconds_before_end: Annotated[int, Field(ge=30, le=65535)] = 300
    """Time before the limit at which a job writes a checkpoint, so that it can be queued again."""

    max_starts_without_progress: NonNegativeInt = 3
    """Number of starts in a row without a new checkpoint after which a job is not continued."""

    start_seconds: PositiveInt = 300
    """Time within which Ray must have started on all nodes."""

    @field_validator("log_dir")
    @classmethod
    def _absolute(cls, path: str) -> str:
        # Kept in the job's record, where it must not depend on the folder of a later command.
        if set(path) & set("\"'\\#\n\r"):
            raise ValueError(f"sbatch cannot write to a path with quotes, backslashes, '#': {path}")
        return str(Path(path).absolute())

    @model_validator(mode="after")
    def _check(self) -> SlurmTargetConfig:
        # SLURM may send the signal a minute early.
        if self.time is not None and seconds_of(self.time) <= self.seconds_before_end + 60:
            raise ValueError(
                f"time {self.time} leaves nothing for training, as each start is asked to end "
                f"seconds_before_end: {self.seconds_before_end} (and up to 60) before; raise time "
                "or lower seconds_before_end"
            )
        return self
