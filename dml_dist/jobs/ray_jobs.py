"""Ray Jobs: the head of a running Ray cluster takes a command and files, and starts the driver."""

from __future__ import annotations

import json
import math
import secrets
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from dml_dist.config.base import NonNegativeFloat, PositiveInt, Section
from dml_dist.errors import ConfigError, RunError, TopologyError
from dml_dist.jobs.ray_http import Dashboard, token
from dml_dist.jobs.target import FINISHED, JobRequest, JobStatus, State
from dml_dist.jobs.upload import files_to_upload, pack, package_name

_SECONDS_WITHOUT_AN_ANSWER = 120.0
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_FOR_NODES = 15.0
_STATES: dict[str, State] = {
    "PENDING": "queued",
    "RUNNING": "running",
    "SUCCEEDED": "succeeded",
    "FAILED": "failed",
    "STOPPED": "stopped",
}


class RayTargetConfig(Section):
    """Ray Jobs on a running cluster."""

    target: Literal["ray"] = "ray"
    """Ray Jobs."""

    address: Annotated[str, Field(pattern=r"^https?://[^/\s]+/?$")] = "http://127.0.0.1:8265"
    """The head's dashboard, as http://HOST:PORT."""

    upload: bool = True
    """Ship what git does not ignore; false ships the configuration alone."""

    python: str = "python"
    """The Python interpreter on the cluster."""

    env: dict[str, str] = Field(default_factory=dict)
    """Environment variables of the job."""

    driver_cpus: NonNegativeFloat = 0.0
    """CPUs reserved for the driver, for which a job is queued; 0 starts it on the head at once."""

    grace_seconds: PositiveInt = 300
    """Time for a last checkpoint between the signal of a stop and the end by force."""


class RayTarget:
    """Jobs on the cluster that a section describes; files are those below `folder`."""

    def __init__(self, config: RayTargetConfig, folder: Path | None = None) -> None:
        """Nothing is read or sent; `folder` is by default the current one."""
        self._config = config
        self._head = Dashboard(config.address)
        self._folder = folder or Path.cwd()

    def check(self, request: JobRequest) -> None:
        """See target.Target.

        Raises:
            ConfigError: If the token is missing or wrong, or the files are too large.
            RunError: If no Ray cluster answers.
            TopologyError: If the cluster cannot hold the ranks.
        """
        self._head.call("GET", "/api/version", expects="ray_version")
        pack(self._folder, self._files(request))
        deadline = time.monotonic() + _SECONDS_FOR_NODES
        # A head that has just started does not know its own node yet.
        while not (nodes := self._nodes()) and time.monotonic() < deadline:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        _require_resources(nodes, request, self._config)

    def _nodes(self) -> list[dict[str, float]]:
        """Return the resources of each node of the cluster."""
        answer = self._head.call("GET", "/api/v0/nodes?detail=1&limit=10000", expects="data")
        nodes = answer["data"]["result"]["result"]
        return [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]

    def render(self, request: JobRequest) -> str:
        """Return the command of Ray's own client that sends the job."""
        is_open = token() is None
        body = self._body(request, request.id, is_open)
        options = f"--address {self._head.address} --submission-id {request.id} --working-dir ."
        if self._config.driver_cpus:
            options += f" --entrypoint-num-cpus {self._config.driver_cpus:g}"
        command = (
            f"ray job submit {options} "
            f"--runtime-env-json {shlex.quote(json.dumps(body['runtime_env']))} "
            f"-- {body['entrypoint']}"
        )
        files = self._files(request)
        size = sum((self._folder / path).stat().st_size for path in files) / 2**20
        what = f"{len(files):,} files" if self._config.upload else ", ".join(map(str, files))
        return (
            f"# In {self._folder}, of which {what or 'nothing'} ({size:,.1f} MiB) is sent.\n"
            f"RAY_AUTH_MODE={'disabled' if is_open else 'token'} {command}\n"
        )

    def submit(self, request: JobRequest) -> str:
        """See target.Target; the identifier on the cluster is the job's, unless it is taken."""
        package = pack(self._folder, self._files(request))
        path = f"/api/packages/gcs/{package_name(package)}"
        if self._head.call("GET", path, missing=True) is None:
            self._head.call("PUT", path, data=package)
        job = request.id
        if self._head.call("GET", f"/api/jobs/{job}", missing=True) is not None:
            job = f"{job}-{secrets.token_hex(3)}"
        body = self._body(request, job, self._head.is_open())
        body["runtime_env"]["working_dir"] = f"gcs://{package_name(package)}"
        answer = self._head.call(
            "POST", "/api/jobs/", data=json.dumps(body).encode(), expects="submission_id"
        )
        return str(answer["submission_id"])

    def status(self, job: str) -> JobStatus:
        """See target.Target."""
        info = self._head.call("GET", f"/api/jobs/{job}", missing=True)
        if info is None:
            return JobStatus("lost", f"{self._head.address} does not know the job")
        # The log itself is asked for where it is shown.
        message = (info.get("message") or "").partition(", last available logs")[0]
        return JobStatus(
            _STATES[info["status"]],
            f"{info['status']}: {message}" if message else info["status"],
            info.get("driver_exit_code"),
        )

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        """See target.Target."""
        if follow:
            yield from self._followed(job)
        else:
            yield self._whole_log(job)

    def stop(self, job: str) -> str:
        """See target.Target; the job is never deleted."""
        state = self.status(job).state
        if state in FINISHED:
            return f"it has ended already ({state})"
        self._head.call("POST", f"/api/jobs/{job}/stop")
        if self.status(job).state == "queued":
            return (
                "it is still queued: Ray ends it when it would have started, or some minutes later"
            )
        return (
            "it was asked to stop: a training saves a checkpoint first, "
            f"for at most {self._config.grace_seconds} s"
        )

    def _files(self, request: JobRequest) -> list[Path]:
        """Return the files that are sent, which the arguments name or git does not ignore."""
        named = {
            Path(word)
            for word in request.arguments
            if not Path(word).is_absolute() and (self._folder / word).is_file()
        }
        return sorted({*named, *(files_to_upload(self._folder) if self._config.upload else ())})

    def _body(self, request: JobRequest, job: str, is_open: bool) -> dict[str, Any]:
        environment = {
            "RAY_JOB_STOP_WAIT_TIME_S": str(self._config.grace_seconds),
            **({"RAY_AUTH_MODE": "disabled"} if is_open else {}),
            **self._config.env,
        }
        cpus = self._config.driver_cpus
        return {
            "entrypoint": f"{self._config.python} -m dml_dist {shlex.join(request.arguments)}",
            "submission_id": job,
            **({"entrypoint_num_cpus": cpus} if cpus else {}),
            "runtime_env": {"env_vars": environment},
        }

    def _whole_log(self, job: str) -> str:
        answer = self._head.call("GET", f"/api/jobs/{job}/logs", missing=True)
        if answer is None:
            raise ConfigError(
                f"the cluster {self._head.address} does not know the job {job}, nor its log: it "
                "was started again since then, or another one has this address"
            )
        return str(answer.get("logs") or "")

    def _followed(self, job: str) -> Iterator[str]:
        """Give the log until the status says that the job has ended."""
        seen = 0
        answered = time.monotonic()

        def has_ended() -> bool:
            nonlocal answered
            ended = self.status(job).state in FINISHED
            answered = time.monotonic()
            return ended

        while True:
            try:
                ended = has_ended()
                pieces = [self._whole_log(job)] if ended else self._head.stream_log(job, has_ended)
                start = 0  # Of the next piece: every stream begins with the whole log.
                for text in pieces:
                    answered = time.monotonic()
                    new = text[max(0, seen - start) :]
                    start += len(text)
                    seen = max(seen, start)
                    if new:
                        yield new
                if ended:
                    return
            except RunError:
                if time.monotonic() - answered > _SECONDS_WITHOUT_AN_ANSWER:
                    raise
            time.sleep(_SECONDS_BETWEEN_LOOKS)


def _require_resources(
    nodes: Sequence[Mapping[str, float]], request: JobRequest, config: RayTargetConfig
) -> None:
    """Check that the nodes hold driver and ranks; a rank cannot use the rests of two nodes."""
    cpus = sorted((node.get("CPU", 0.0) for node in nodes), reverse=True)
    free = [cpus[0] - config.driver_cpus, *cpus[1:]] if cpus else []
    places = sum(max(0, math.floor(have / request.cpus_per_rank + 1e-9)) for have in free)
    if places < request.min_workers:
        driver = f" and a driver with {config.driver_cpus:g}" if config.driver_cpus else ""
        raise TopologyError(
            f"{request.min_workers} ranks with {request.cpus_per_rank:g} CPUs each{driver} do not "
            f"fit the cluster {config.address}, whose nodes have "
            f"{', '.join(f'{have:g}' for have in cpus)} CPUs; lower --workers or "
            "launch.cpus_per_rank, or add nodes"
        )
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    if request.uses_gpu and gpus < request.min_workers:
        raise TopologyError(
            f"launch.use_gpu: yes needs {request.min_workers} GPUs, and the cluster "
            f"{config.address} has {gpus:g}; lower --workers, set launch.use_gpu to auto or no, "
            "or add nodes"
        )
