"""A request and the settings of a KubeRay target to a RayJob manifest."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from dml_dist.config.yaml_text import dump_yaml, read_text
from dml_dist.errors import ConfigError, TopologyError
from dml_dist.jobs.kuberay_check import DRAIN_VARIABLE, MAX_NAME
from dml_dist.jobs.kuberay_config import (
    ClaimStorage,
    HostPathStorage,
    KubeRayTargetConfig,
    NfsStorage,
    PodSettings,
    WorkerSettings,
)
from dml_dist.jobs.target import JobRequest

HEAD_CONTAINER = "ray-head"
WORKER_CONTAINER = "ray-worker"

_GIB = 2**30
_CONFIG_DIR, _CONFIG = "/etc/dml-dist", "config.yaml"
_ANNOTATION = "dml-dist/config"
_STORAGE = "storage"
_SHARED_MEMORY = "shared-memory"
# Time that Kubernetes leaves a pod beyond Ray's own: Ray ends its processes after the drain.
_SECONDS_AFTER_DRAIN = 30


def rayjob_name(identifier: str) -> str:
    """Return a Kubernetes name (DNS-1035, at most 47 characters) for the identifier of a job.

    A name that had to be changed ends in a digest, so that different identifiers stay different.
    """
    name = re.sub(r"[^a-z0-9]+", "-", identifier.lower()).strip("-")
    if not name or not name[0].isalpha():
        name = f"job-{name}".strip("-")
    if name == identifier and len(name) <= MAX_NAME:
        return name
    digest = hashlib.sha256(identifier.encode()).hexdigest()[:6]
    return f"{name[: MAX_NAME - 7].rstrip('-')}-{digest}"


def manifest_text(config: KubeRayTargetConfig, request: JobRequest) -> str:
    """Return the RayJob as YAML."""
    return dump_yaml(manifest(config, request), blocks=True)


def manifest(config: KubeRayTargetConfig, request: JobRequest) -> dict[str, Any]:
    """Return the RayJob as plain values.

    Raises:
        ConfigError: If the run folder is not on the shared storage.
        TopologyError: If a pod cannot hold a rank.
    """
    _require_shared(config, request)
    command = _command(config, request)
    ranks = ranks_per_pod(config.workers, request)
    fewest, most = (math.ceil(n / ranks) for n in (request.min_workers, request.max_workers))
    elastic = {"enableInTreeAutoscaling": True} if fewest < most else {}
    deadline = config.active_deadline_seconds
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": rayjob_name(request.id), "namespace": config.namespace},
        "spec": {
            "entrypoint": command.entrypoint,
            # Ray kills a command that it was asked to stop after 3 s unless this says otherwise.
            "runtimeEnvYAML": json.dumps(
                {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(config.checkpoint_seconds)}}
            ),
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": config.ttl_seconds_after_finished,
            "backoffLimit": config.backoff_limit,
            **({} if deadline is None else {"activeDeadlineSeconds": deadline}),
            "rayClusterSpec": {
                "rayVersion": config.ray_version,
                "authOptions": _auth(config),
                **elastic,
                "headGroupSpec": {
                    # Ranks are placed on the workers, whose CPUs and GPUs are sized for them.
                    "rayStartParams": {"num-cpus": "0", **_start_params(config.head)},
                    "template": _with_config(
                        _pod(config, config.head, HEAD_CONTAINER, gpus=0), command.config
                    ),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "ranks",
                        "replicas": most,
                        "minReplicas": fewest,
                        "maxReplicas": most,
                        "rayStartParams": _start_params(config.workers),
                        "template": _pod(
                            config, config.workers, WORKER_CONTAINER, gpus=config.workers.gpus
                        ),
                    }
                ],
            },
        },
    }


def ranks_per_pod(workers: WorkerSettings, request: JobRequest) -> int:
    """Return the number of ranks that a worker pod holds.

    Raises:
        TopologyError: If it holds none, or has too few CPUs for the ranks of its GPUs.
    """
    if request.uses_gpu and workers.gpus == 0:
        raise TopologyError(
            "launch.use_gpu is yes, but worker pods have workers.gpus = 0; raise this "
            "setting of the target, or set launch.use_gpu to no"
        )
    ranks = workers.gpus or math.floor(workers.cpus / request.cpus_per_rank + 1e-9)
    needed = max(1, ranks) * request.cpus_per_rank
    if workers.cpus < needed:
        what = "a rank needs" if ranks <= 1 else f"{ranks} ranks, one per GPU, need"
        raise TopologyError(
            f"{what} {needed:g} CPUs (launch.cpus_per_rank = {request.cpus_per_rank:g}), but a "
            f"worker pod has workers.cpus = {workers.cpus}; raise workers.cpus in the target's "
            "settings or lower launch.cpus_per_rank"
        )
    return ranks


@dataclass(frozen=True)
class _Command:
    """What runs on the head pod.

    Attributes:
        entrypoint: The command line.
        config: Text of the configuration file that is sent along; None sends none.
    """

    entrypoint: str
    config: str | None


def _command(config: KubeRayTargetConfig, request: JobRequest) -> _Command:
    """Return the command line, and the configuration that it reads if only this machine has it.

    Every retry repeats the command, so that it resumes what an earlier try left. It is one simple
    command: the operator puts it into a shell command of the submitter pod, which does not mount
    the storage, so that a shell test in it would look at the wrong disk.
    """
    arguments, text = list(request.arguments), None
    for position, word in enumerate(arguments):
        path = Path(word)
        is_shared = path.is_relative_to(config.storage.mount_path)
        if path.suffix in (".yaml", ".yml") and not is_shared and path.is_file():
            arguments[position], text = f"{_CONFIG_DIR}/{_CONFIG}", read_text(path)
            break
    words = ["python", "-m", "dml_dist.jobs.start_or_resume", str(request.run_dir), *arguments]
    return _Command(shlex.join(words), text)


def _require_shared(config: KubeRayTargetConfig, request: JobRequest) -> None:
    mount = config.storage.mount_path
    if not PurePosixPath(request.run_dir).is_relative_to(mount):
        raise ConfigError(
            f"the run folder {request.run_dir} is not on the storage that the pods share, which is "
            f"mounted at {mount} (storage.mount_path); give --run-dir a folder below it"
        )


def _auth(config: KubeRayTargetConfig) -> dict[str, str]:
    secret = config.token_secret
    return {"mode": "token", **({} if secret is None else {"secretName": secret})}


def _start_params(pod: PodSettings) -> dict[str, str]:
    return {"object-store-memory": str(pod.shared_memory_gib * _GIB // 2)}


def _pod(config: KubeRayTargetConfig, pod: PodSettings, name: str, *, gpus: int) -> dict[str, Any]:
    """Return the template of the head's or the workers' pods."""
    resources = {
        "cpu": str(pod.cpus),
        "memory": f"{pod.memory_gib}Gi",
        **({"nvidia.com/gpu": str(gpus)} if gpus else {}),
    }
    environment = {
        **config.environment,
        # After SIGTERM a node of Ray goes on for this long.
        DRAIN_VARIABLE: str(config.checkpoint_seconds),
    }
    container = {
        "name": name,
        "image": config.image,
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "resources": {"requests": resources, "limits": resources},
        "volumeMounts": [
            {"name": _STORAGE, "mountPath": config.storage.mount_path},
            {"name": _SHARED_MEMORY, "mountPath": "/dev/shm"},
        ],
    }
    account, secrets = config.service_account, config.image_pull_secrets
    tolerations = [item.model_dump(exclude_none=True) for item in pod.tolerations]
    optional = {
        "serviceAccountName": account,
        "imagePullSecrets": [{"name": secret} for secret in secrets],
        "nodeSelector": pod.node_selector,
        "tolerations": tolerations,
    }
    return {
        "spec": {
            "terminationGracePeriodSeconds": config.checkpoint_seconds + _SECONDS_AFTER_DRAIN,
            **{key: value for key, value in optional.items() if value},
            "containers": [container],
            "volumes": [
                {"name": _STORAGE, **_volume(config.storage)},
                {
                    "name": _SHARED_MEMORY,
                    "emptyDir": {"medium": "Memory", "sizeLimit": f"{pod.shared_memory_gib}Gi"},
                },
            ],
        }
    }


def _with_config(pod: dict[str, Any], text: str | None) -> dict[str, Any]:
    """Add a file with the configuration to the head's pod, through an annotation.

    Unlike a ConfigMap, it needs no other object, which would be left behind.
    """
    if text is None:
        return pod
    pod = {"metadata": {"annotations": {_ANNOTATION: text}}, **pod}
    field = {"fieldPath": f"metadata.annotations['{_ANNOTATION}']"}
    spec = pod["spec"]
    spec["volumes"].append(
        {"name": "config", "downwardAPI": {"items": [{"path": _CONFIG, "fieldRef": field}]}}
    )
    spec["containers"][0]["volumeMounts"].append({"name": "config", "mountPath": _CONFIG_DIR})
    return pod


def _volume(storage: ClaimStorage | NfsStorage | HostPathStorage) -> dict[str, Any]:
    match storage:
        case ClaimStorage():
            return {"persistentVolumeClaim": {"claimName": storage.claim}}
        case NfsStorage():
            return {"nfs": {"server": storage.server, "path": storage.path}}
        case HostPathStorage():
            return {"hostPath": {"path": storage.path, "type": "Directory"}}
