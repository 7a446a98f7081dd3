"""The SLURM target: an sbatch script whose processes start a Ray cluster for the command."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from dml_dist.errors import ConfigError, RunError
from dml_dist.jobs.slurm_commands import (
    accounted,
    call,
    field,
    job_info,
    partition_limits,
    seconds_of,
    status_of,
)
from dml_dist.jobs.slurm_config import SlurmTargetConfig
from dml_dist.jobs.slurm_script import script
from dml_dist.jobs.target import FINISHED, JobRequest, JobStatus

__all__ = ["SlurmTarget", "SlurmTargetConfig"]

_SETTINGS_OF_SBATCH = {
    *("nodes", "ranks_per_node", "cpus_per_node", "gpu_type", "partition", "account", "qos"),
    *("time", "constraint", "memory", "exclusive", "extra"),
}
# It waits for a busy slurmctld; ended too early, it may have submitted the job all the same.
_SECONDS_OF_SBATCH = 20.0
_SECONDS_BETWEEN_READS = 0.5
_SECONDS_BETWEEN_STATES = 5.0


class SlurmTarget:
    """Jobs of the SLURM cluster whose commands this machine has."""

    def __init__(self, config: SlurmTargetConfig) -> None:
        """Nothing is started or asked before a method is called."""
        self.config = config

    def check(self, request: JobRequest) -> None:
        """Raise if SLURM does not answer, or would never start the job."""
        self._sbatch(request, "--test-only")
        limits = partition_limits(call("sinfo", "-h", "-o", "%P|%l"), self.config.partition)
        time_limit = self.config.time
        # Many clusters accept such a job, which then waits for ever.
        if time_limit is not None and limits and seconds_of(time_limit) > max(limits.values()):
            names = ", ".join(limits)
            raise ConfigError(
                f"time {time_limit} of the SLURM target is above the limit of the partition "
                f"{names}; lower it, as a job that reaches it is queued again and resumes, or "
                "choose another partition (`sinfo -s` lists them)"
            )

    def render(self, request: JobRequest) -> str:
        """Return the sbatch script."""
        return script(self.config, request, Path.cwd())

    def submit(self, request: JobRequest) -> str:
        """Call sbatch and return the job's number."""
        Path(self.config.log_dir).mkdir(parents=True, exist_ok=True)
        # It prints NUMBER or NUMBER;CLUSTER.
        return self._sbatch(request, "--parsable").strip().partition(";")[0]

    def status(self, job: str) -> JobStatus:
        """Return the state of a job from slurmctld, or from the accounting of ended jobs."""
        info = job_info(job)
        if info is not None:
            return status_of(info)
        return accounted(job) or JobStatus("lost", "SLURM does not know the job any more")

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        """Give the output of a job in pieces; if followed, until its state says that it ended."""
        path = self._output(job)
        status, looked = self.status(job), time.monotonic()
        if status.state == "queued" and not path.exists() and not follow:
            raise RunError(
                f"the job {job} has no output yet: it is {status.detail}; use --follow to wait for "
                "its start"
            )
        offset = 0
        while True:
            # Asked before the file is read, so that the end of an ended job is read, too.
            if follow and time.monotonic() - looked > _SECONDS_BETWEEN_STATES:
                status, looked = self.status(job), time.monotonic()
            if path.exists():
                with open(path, "rb") as file:
                    file.seek(offset)
                    text = file.read()
                # A piece ends with a line, so that no character is cut.
                if follow and status.state not in FINISHED:
                    text = text[: text.rfind(b"\n") + 1]
                offset += len(text)
                if text:
                    yield text.decode(errors="replace")
            if not follow or status.state in FINISHED:
                return
            time.sleep(_SECONDS_BETWEEN_READS)

    def stop(self, job: str) -> str:
        """Cancel a job and say what happens now."""
        info = job_info(job)
        if info is None:
            raise RunError(f"SLURM does not know the job {job} (any more): nothing to stop")
        status = status_of(info)
        if status.state in FINISHED:
            return f"The job {job} has already ended: {status.detail}."
        call("scancel", job)
        if status.state == "queued":
            return f"The job {job} was still queued and has been removed."
        grace = field(call("scontrol", "show", "config").replace(" ", ""), "KillWait") or "30sec"
        seconds = grace.removesuffix("sec")
        return (
            f"The job {job} is being stopped: its ranks have {seconds} s (KillWait of the cluster) "
            "to write a checkpoint."
        )

    def _sbatch(self, request: JobRequest, option: str) -> str:
        try:
            return call("sbatch", option, stdin=self.render(request), seconds=_SECONDS_OF_SBATCH)
        except RunError as error:
            given = self.config.model_dump(exclude_defaults=True, include=_SETTINGS_OF_SBATCH)
            settings = ", ".join(f"{name}: {value}" for name, value in given.items())
            raise RunError(
                f"SLURM does not accept the job {request.id}: {error}; its settings in the SLURM "
                f"target are {settings or 'the defaults'} and its ranks come from the run's "
                "configuration; correct them (`sinfo -s` lists the partitions), or submit again "
                "later if the queue is full"
            ) from None

    def _output(self, job: str) -> Path:
        info = job_info(job)
        if info is not None and (path := field(info, "StdOut")) is not None:
            return Path(path.replace("%%", "%"))  # SLURM shows it as it was given.
        found = sorted(Path(self.config.log_dir).glob(f"*-{job}.log")) if job.isdigit() else []
        if not found:
            raise RunError(
                f"SLURM does not know the job {job}, and there is no output *-{job}.log in "
                f"{self.config.log_dir}; list the jobs with `dml-dist job list`"
            )
        return found[0]
