"""The target KubeRay: each job is a RayJob, with a Ray cluster of its own.

The operator starts the cluster, runs `ray job submit` in a submitter pod, and removes the cluster
some time after the end. A command that fails is started again on a new cluster, up to
`backoff_limit` times, and resumes (jobs/start_or_resume.py).
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from dml_dist.errors import ConfigError, RunError
from dml_dist.jobs.kuberay_check import check_manifest, read_schema
from dml_dist.jobs.kuberay_config import KubeRayTargetConfig
from dml_dist.jobs.kuberay_kubectl import Kubectl
from dml_dist.jobs.kuberay_manifest import HEAD_CONTAINER, manifest, manifest_text, rayjob_name
from dml_dist.jobs.target import FINISHED, JobRequest, JobStatus, State

__all__ = ["KubeRayTarget", "KubeRayTargetConfig"]

_SECONDS_BETWEEN_LOOKS = 2.0
_DASHBOARD = "http://127.0.0.1:8265"
_IN_HEAD = ("--container", HEAD_CONTAINER, "--")

_STATES: dict[str, State] = {
    "Initializing": "queued",
    "Waiting": "queued",
    "Retrying": "queued",
    "Suspending": "running",
    "Suspended": "stopped",
    "Failed": "failed",
    "ValidationFailed": "failed",
}
"""jobDeploymentStatus -> our word, where jobStatus does not matter."""


class KubeRayTarget:
    """Sends commands to a Kubernetes cluster as RayJobs, through kubectl."""

    def __init__(self, config: KubeRayTargetConfig) -> None:
        """Keep the settings; nothing is called yet."""
        self._config = config
        self._kubectl = Kubectl(config.namespace, config.context)

    def check(self, request: JobRequest) -> None:
        """Check the manifest here, then by the API server in a dry run that creates nothing.

        The server checks against the schema of the KubeRay version that is installed there, and
        whether the user may create the job.

        Raises:
            ConfigError: If a setting is wrong or kubectl is missing.
            RunError: If the cluster does not answer or refuses the manifest.
        """
        text = self.render(request)
        arguments = ("create", "--dry-run=server", "--validate=strict", "-f", "-")
        self._kubectl.call(*arguments, text=text)

    def render(self, request: JobRequest) -> str:
        """Return the RayJob manifest as YAML, checked.

        Raises:
            ConfigError: If it breaks the operator's rules or the schema of `schema_file`.
        """
        path = self._config.schema_file
        schema = None if path is None else read_schema(path)
        check_manifest(manifest(self._config, request), schema)
        return manifest_text(self._config, request)

    def submit(self, request: JobRequest) -> str:
        """Create the RayJob and return its name.

        `kubectl create`, not `apply`: an existing RayJob of this name is an error, never changed.
        """
        text = self.render(request)
        self._kubectl.call("create", "--validate=strict", "-f", "-", text=text)
        return rayjob_name(request.id)

    def status(self, job: str) -> JobStatus:
        """Return the state of a RayJob, from its status alone."""
        rayjob = self._rayjob(job)
        if rayjob is None:
            return JobStatus("lost", self._lost(job))
        return _status_of(rayjob)

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        """Give the lines of the newest submitter pod, which prints the command's output.

        Following goes on until the RayJob's status is final: a stream that breaks off is opened
        again and what was already given is left out; a retry has a new pod.
        """
        given: dict[str, int] = {}  # characters of each pod
        while True:
            # Asked before reading: what a job wrote before it ended must not be missed.
            state = self.status(job).state
            pod = self._submitter(job)
            if pod is not None:
                is_open = follow and state not in FINISHED
                yield from self._lines_after(pod, given, follow=is_open)
            elif state == "lost":
                raise ConfigError(self._lost(job))
            if not follow or state in FINISHED:
                return
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def _lines_after(self, pod: str, given: dict[str, int], *, follow: bool) -> Iterator[str]:
        """Give a pod's output beyond the characters already given, and count them."""
        position = 0
        with self._kubectl.lines("logs", pod, *(["--follow"] if follow else [])) as lines:
            for line in lines:
                new = line[max(0, given.get(pod, 0) - position) :]
                position += len(line)
                if new:
                    given[pod] = position
                    yield new

    def stop(self, job: str) -> str:
        """Ask the command to stop, with time for a checkpoint; the RayJob is kept as a record.

        A running command gets SIGTERM by `ray job stop` on the head pod. Suspending or deleting the
        RayJob would end the head and the ranks at the same time, in the middle of a checkpoint. A
        command that does not run has nothing to save: its RayJob is suspended.
        """
        rayjob = self._rayjob(job)
        if rayjob is None:
            raise ConfigError(self._lost(job))
        if (now := _status_of(rayjob)).state in FINISHED:
            return f"has ended already: {now.detail}"
        status = rayjob["status"]
        if (status.get("jobDeploymentStatus"), status.get("jobStatus")) != ("Running", "RUNNING"):
            patch = json.dumps({"spec": {"suspend": True}})
            self._kubectl.call("patch", "rayjob", job, "--type=merge", "--patch", patch)
            return (
                "was not running and is suspended now: its pods are removed; start it "
                f"after all with `kubectl --namespace {self._config.namespace} patch rayjob {job} "
                """--type=merge --patch '{"spec":{"suspend":false}}'`"""
            )
        stop = ("ray", "job", "stop", "--no-wait", "--address", _DASHBOARD, status["jobId"])
        self._kubectl.call("exec", self._head(status["rayClusterName"]), *_IN_HEAD, *stop)
        return (
            f"was asked to stop, with {self._config.checkpoint_seconds} s for a checkpoint; "
            f"its Ray cluster is removed {self._config.ttl_seconds_after_finished} s later, the "
            "RayJob stays"
        )

    def _lost(self, job: str) -> str:
        return (
            f"there is no RayJob {job} in the namespace {self._config.namespace}; list them with "
            f"`kubectl --namespace {self._config.namespace} get rayjob`"
        )

    def _rayjob(self, job: str) -> Mapping[str, Any] | None:
        text = self._kubectl.call("get", "rayjob", job, "--ignore-not-found", "-o", "json")
        if not text.strip():
            return None
        rayjob = json.loads(text)
        return {**rayjob, "status": rayjob.get("status", {})}

    def _submitter(self, job: str) -> str | None:
        """Return the name of the newest submitter pod that has started, if there is one."""
        pods = self._pods(f"job-name={job}")
        started = [pod for pod in pods if pod["status"].get("phase") != "Pending"]
        return max(started, key=_age_key)["metadata"]["name"] if started else None

    def _head(self, cluster: str) -> str:
        pods = self._pods(f"ray.io/cluster={cluster},ray.io/node-type=head")
        if not pods:
            raise RunError(
                f"the Ray cluster {cluster} has no head pod any more; it may be between two "
                "tries: ask for the status and stop the job again"
            )
        return max(pods, key=_age_key)["metadata"]["name"]

    def _pods(self, selector: str) -> list[Mapping[str, Any]]:
        text = self._kubectl.call("get", "pods", "--selector", selector, "-o", "json")
        return json.loads(text)["items"]


def _age_key(pod: Mapping[str, Any]) -> str:
    return pod["metadata"]["creationTimestamp"]  # ISO 8601, UTC: sorts as text


def _status_of(rayjob: Mapping[str, Any]) -> JobStatus:
    status = rayjob["status"]
    deployment, job = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    message = status.get("message", "")
    words = [word for word in (deployment or "New", job, status.get("reason", "")) if word]
    detail = " ".join(words) + (f": {message.splitlines()[0]}" if message else "")
    if deployment == "Initializing":
        detail += _pods_ready(status.get("rayClusterStatus", {}))
    state: State
    exit_code = None
    if deployment == "Complete":
        state = "stopped" if job == "STOPPED" else "succeeded"
        exit_code = 0 if job == "SUCCEEDED" else None
    elif deployment == "Running":
        # A command that has just ended counts as running: the operator may start it again.
        state = "queued" if job in ("", "PENDING") else "running"
    else:
        state = _STATES.get(deployment, "queued")
        # Ray's own sentence; the status has no field for the code.
        if state == "failed" and (code := re.search(r"failed with exit code (\d+)", message)):
            exit_code = int(code[1])
    return JobStatus(state, detail, exit_code)


def _pods_ready(cluster: Mapping[str, Any]) -> str:
    """Return what a job waits for: the pods of its Ray cluster."""
    ready, wanted = (cluster.get(f"{key}WorkerReplicas", 0) for key in ("ready", "desired"))
    text = f": {ready} of {wanted} worker pods ready"
    for condition in cluster.get("conditions", []):
        if condition["type"] == "HeadPodReady" and condition["status"] != "True":
            text += f", head pod not ready ({condition['reason']}: {condition['message']})"
    return text
