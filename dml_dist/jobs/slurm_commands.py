"""SLURM's own commands, each with a time limit, and what their output says."""

from __future__ import annotations

import re
import subprocess

from dml_dist.errors import ConfigError, RunError
from dml_dist.jobs.target import JobStatus, State

_SECONDS = 10.0
_QUEUED = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"}
_FAILED = {"FAILED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE"}
_STOPPED = {"CANCELLED", "PREEMPTED", "REVOKED"}
_NO_SUCH_JOB = "Invalid job id specified"


def call(*command: str, stdin: str = "", seconds: float = _SECONDS) -> str:
    """Run one of SLURM's commands and return its output.

    Args:
        command: The command's words.
        stdin: Its input.
        seconds: Time limit.

    Raises:
        ConfigError: If this machine does not have it.
        RunError: If it fails or gives no answer; the message ends with its own words.
    """
    try:
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, timeout=seconds, check=False
        )
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]} was not found on this machine: run dml-dist on a login node of the "
            "SLURM cluster, or print the script with --render and submit it there"
        ) from None
    except subprocess.TimeoutExpired as error:
        said = error.stderr or b""  # Bytes, although the process writes text.
        raise RunError(
            f"{command[0]} gave no answer within {seconds:g} s{_words(said.decode())}; check with "
            "`squeue --me` whether it had an effect, and that slurmctld runs (`scontrol ping`)"
        ) from None
    if done.returncode:
        raise RunError(f"{command[0]} failed{_words(done.stderr)}")
    return done.stdout


def _words(stderr: str) -> str:
    lines = [re.sub(r"^\w+: (error: )?", "", line) for line in stderr.splitlines() if line.strip()]
    return f": {'; '.join(lines)}" if lines else ""


def job_info(job: str) -> str | None:
    """Return what slurmctld knows of a job; None if it does not know it (any more)."""
    try:
        return call("scontrol", "show", "job", job)
    except RunError as error:
        if _NO_SUCH_JOB in str(error):
            return None
        raise


def field(info: str, name: str) -> str | None:
    """Return a field of `scontrol show job`; None without it, or if it is empty."""
    # A path may contain white space, but is alone on its line.
    pattern = r"(.*)$" if name.startswith("Std") else r"(\S*)"
    found = re.search(rf"(?:^|\s){name}={pattern}", info, re.MULTILINE)
    return found[1] if found and found[1] not in ("", "None", "(null)", "Unknown", "N/A") else None


def status_of(info: str) -> JobStatus:
    """Return the status of a job from `scontrol show job`."""
    state, reason = field(info, "JobState") or "", field(info, "Reason")
    detail = f"{state} ({reason})" if reason else state
    return JobStatus(_state(state), detail, _exit_code(_state(state), field(info, "ExitCode")))


def accounted(job: str) -> JobStatus | None:
    """Return the status of an old job from SLURM's accounting; None if there is none."""
    try:
        found = call("sacct", "-n", "-X", "-P", "-j", job, "-o", "State,ExitCode")
    except (ConfigError, RunError):
        return None  # Many clusters have no accounting.
    if "|" not in found:
        return None
    state, _, code = found.splitlines()[-1].partition("|")
    word = state.split()[0]  # Of "CANCELLED by 1000".
    return JobStatus(_state(word), state, _exit_code(_state(word), code))


def _state(word: str) -> State:
    if word in _QUEUED:
        return "queued"
    if word == "COMPLETED":
        return "succeeded"
    if word in _FAILED:
        return "failed"
    return "stopped" if word in _STOPPED else "running"


def _exit_code(state: State, text: str | None) -> int | None:
    """Return an exit code from CODE:SIGNAL, as a shell would give it."""
    if state not in ("succeeded", "failed") or text is None:
        return None
    code, _, number = text.partition(":")
    return int(code) or (128 + int(number) if int(number or 0) else 0)


def partition_limits(rows: str, wanted: str | None) -> dict[str, float]:
    """Return the time limits of partitions in seconds, from rows of NAME|LIMIT.

    Args:
        rows: Output of sinfo, where an asterisk marks the default partition.
        wanted: Names, separated by commas; None is the default partition.
    """
    pairs = [row.split("|") for row in rows.split()]
    if wanted is None:
        return {name[:-1]: seconds_of(limit) for name, limit in pairs if name.endswith("*")}
    names = wanted.split(",")
    return {n.rstrip("*"): seconds_of(limit) for n, limit in pairs if n.rstrip("*") in names}


def seconds_of(text: str) -> float:
    """Return a time of SLURM in seconds; one that is no number, such as infinite, is no limit."""
    days, dash, rest = text.rpartition("-")
    try:
        parts = [int(part) for part in rest.split(":")]
        # With days it begins with hours, alone it is minutes.
        scale = 3600 if dash or len(parts) == 3 else 60
        return 86400 * int(days or 0) + sum(n * scale / 60**at for at, n in enumerate(parts))
    except ValueError:
        return float("inf")
