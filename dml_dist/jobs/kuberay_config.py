"""Settings of a KubeRay target: image, pods, storage, token, and what happens after an end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dml_dist.config.base import NonNegativeInt, PositiveInt, Section
from dml_dist.jobs.kuberay_check import DRAIN_VARIABLE

ABSOLUTE = r"^/\S+$"
DNS_LABEL = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"
AbsolutePath = Annotated[str, Field(pattern=ABSOLUTE)]
DnsName = Annotated[str, Field(pattern=DNS_NAME, max_length=253)]


class ClaimStorage(Section):
    """A PersistentVolumeClaim that all pods can mount (access mode ReadWriteMany)."""

    name: Literal["claim"] = "claim"

    claim: DnsName
    """Name of the claim, in the job's namespace."""

    mount_path: AbsolutePath
    """Where it is mounted in every pod; run folders and data lie below it."""


class NfsStorage(Section):
    """An NFS export."""

    name: Literal["nfs"] = "nfs"

    server: Annotated[str, Field(min_length=1)]
    """Host name or address of the server."""

    path: AbsolutePath
    """Exported path."""

    mount_path: AbsolutePath
    """Where it is mounted in every pod; run folders and data lie below it."""


class HostPathStorage(Section):
    """A folder of the nodes, on a file system that all of them mount."""

    name: Literal["host_path"] = "host_path"

    path: AbsolutePath
    """Folder on the nodes."""

    mount_path: AbsolutePath
    """Where it is mounted in every pod; run folders and data lie below it."""


Storage = Annotated[ClaimStorage | NfsStorage | HostPathStorage, Field(discriminator="name")]


class Toleration(Section):
    """A taint of nodes on which pods may still be placed."""

    key: Annotated[str, Field(min_length=1)]
    """Key of the taint, such as nvidia.com/gpu."""

    operator: Literal["Exists", "Equal"] = "Exists"
    """Exists matches every value of the taint."""

    value: str | None = None
    """Value of the taint for the operator Equal."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; null matches all."""

    @model_validator(mode="after")
    def _has_a_value_to_compare(self) -> Toleration:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("`value` belongs to the operator Equal, which needs one")
        return self


class PodSettings(Section):
    """Size and placement of a pod."""

    cpus: PositiveInt
    """CPUs, requested and the limit."""

    memory_gib: PositiveInt
    """Memory in GiB, requested and the limit; it includes what /dev/shm holds."""

    shared_memory_gib: PositiveInt = 4
    """Size of /dev/shm in GiB: half for Ray's object store, half for the loader workers."""

    node_selector: dict[str, str] = {}  # noqa: RUF012
    """Labels that a node must have, such as {cloud.google.com/gke-accelerator: nvidia-l4}."""

    tolerations: tuple[Toleration, ...] = ()
    """Taints that do not keep the pod away."""

    @model_validator(mode="after")
    def _shared_memory_fits(self) -> PodSettings:
        if self.shared_memory_gib >= self.memory_gib:
            raise ValueError(
                f"shared_memory_gib = {self.shared_memory_gib} is part of the pod's memory and "
                f"must be less than memory_gib = {self.memory_gib}"
            )
        return self


class WorkerSettings(PodSettings):
    """Size and placement of a pod that holds ranks."""

    gpus: NonNegativeInt = 1
    """GPUs of a pod (nvidia.com/gpu), one rank each; with 0 the CPUs say how many."""


class KubeRayTargetConfig(Section):
    """A Kubernetes cluster with the KubeRay operator, 1.5.1 or later."""

    target: Literal["kuberay"] = "kuberay"

    image: Annotated[str, Field(min_length=1)]
    """Image of all pods, with dml_dist and Ray installed, such as one of cluster/Dockerfile."""

    ray_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]
    """Version of Ray in the image; token authentication needs 2.52.0 or later."""

    namespace: Annotated[str, Field(pattern=DNS_LABEL, max_length=63)] = "default"
    """Namespace of the job."""

    context: str | None = None
    """Context of kubectl's configuration; null is the current one."""

    storage: Storage
    """File system shared by all pods, which holds run folders, configurations and data."""

    head: PodSettings = PodSettings(cpus=4, memory_gib=16)
    """The head pod, which runs the driver and no rank."""

    workers: WorkerSettings
    """The worker pods; their number follows from the ranks of the command."""

    token_secret: DnsName | None = None
    """Secret whose key auth_token holds the token of Ray; null lets the operator make one."""

    ttl_seconds_after_finished: NonNegativeInt = 600
    """Seconds for which the Ray cluster outlives the command, to look at its dashboard."""

    backoff_limit: NonNegativeInt = 3
    """Retries of a failed command, each on a new Ray cluster; a run resumes."""

    active_deadline_seconds: PositiveInt | None = None
    """Time limit of the job, with its waiting and all retries; null sets none."""

    checkpoint_seconds: PositiveInt = 60
    """Seconds that the command has after it was asked to stop, and a pod after SIGTERM."""

    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], str] = {}  # noqa: RUF012
    """Environment variables of all pods; they stand readable in the manifest: no secrets."""

    image_pull_secrets: tuple[DnsName, ...] = ()
    """Secrets that the image's registry needs."""

    service_account: DnsName | None = None
    """Service account of the pods; null is the default, and with autoscaling the operator's own."""

    schema_file: Path | None = None
    """RayJob's CustomResourceDefinition, JSON, against which manifests are also checked."""

    @model_validator(mode="after")
    def _sets_no_reserved_variable(self) -> KubeRayTargetConfig:
        if DRAIN_VARIABLE in self.environment:
            raise ValueError(
                f"{DRAIN_VARIABLE} follows from checkpoint_seconds; set that instead of the "
                "variable in `environment`"
            )
        return self
