"""RayJob manifests: what they hold, and which ones are refused."""

from __future__ import annotations

import copy
import gzip
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dml_dist.errors import ConfigError, TopologyError
from dml_dist.jobs.kuberay import KubeRayTarget
from dml_dist.jobs.kuberay_check import check_manifest, read_schema
from dml_dist.jobs.kuberay_manifest import manifest, rayjob_name
from dml_dist.jobs.start_or_resume import with_resume
from dml_dist.runs.comparison import ComparisonFolder
from dml_dist.runs.folder import RunFolder
from tests.kuberay_cases import RUN_DIR, request, settings

Manifest = dict[str, Any]


@pytest.fixture(scope="session")
def schema_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RayJob's definition as `kubectl get crd` writes it, with the schema of KubeRay 1.7.0."""
    source = Path(os.environ.get("DML_DIST_TEST_DATA", "")) / "kuberay_rayjob_v1_schema.json.gz"
    if not source.is_file():
        pytest.skip("DML_DIST_TEST_DATA does not name the folder with the schema of RayJob")
    schema = json.loads(gzip.decompress(source.read_bytes()))
    path = tmp_path_factory.mktemp("crd") / "rayjobs.json"
    path.write_text(json.dumps(_definition(schema)))
    return path


def _definition(schema: Any, kind: str = "RayJob") -> Manifest:
    versions = [{"name": "v1alpha1"}, {"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    return {"spec": {"names": {"kind": kind}, "versions": versions}}


# ---------------------------------------------------------------- what is rendered


EVERYTHING: Manifest = {
    "storage": {"name": "nfs", "server": "10.0.0.2", "path": "/export", "mount_path": "/shared"},
    "head": {"cpus": 2, "memory_gib": 8, "node_selector": {"pool": "cpu"}},
    "workers": {
        "gpus": 1,
        "cpus": 8,
        "memory_gib": 32,
        "node_selector": {"cloud.google.com/gke-accelerator": "nvidia-l4"},
        "tolerations": [
            {"key": "nvidia.com/gpu", "effect": "NoSchedule"},
            {"key": "team", "operator": "Equal", "value": "vision"},
        ],
    },
    "token_secret": "ray-token",
    "ttl_seconds_after_finished": 60,
    "backoff_limit": 2,
    "active_deadline_seconds": 86400,
    "checkpoint_seconds": 120,
    "environment": {"NCCL_DEBUG": "WARN"},
    "image_pull_secrets": ["registry"],
    "service_account": "trainer",
}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, {}),
        (EVERYTHING, {}),
        ({"storage": {"name": "host_path", "path": "/mnt/nfs", "mount_path": "/shared"}}, {}),
        ({"workers": {"gpus": 0, "cpus": 8, "memory_gib": 16}}, {"uses_gpu": False}),
        ({}, {"min_workers": 8, "id": "Ünusual name_of.a RUN" * 5}),
    ],
)
def test_our_manifests_pass_the_schema_and_the_rules(
    schema_file: Path, changes: Manifest, wanted: Manifest
) -> None:
    target = KubeRayTarget(settings(**changes, schema_file=str(schema_file)))
    text = target.render(request(**wanted))
    assert yaml.safe_load(text)["kind"] == "RayJob"


def test_every_setting_is_in_the_manifest() -> None:
    spec = manifest(settings(**EVERYTHING), request())["spec"]
    assert spec["ttlSecondsAfterFinished"] == 60
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["backoffLimit"] == 2
    assert spec["activeDeadlineSeconds"] == 86400
    assert json.loads(spec["runtimeEnvYAML"]) == {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "120"}}
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    head, worker = cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert "num-cpus" not in worker["rayStartParams"]
    pods = [head["template"]["spec"], worker["template"]["spec"]]
    for pod in pods:
        container = pod["containers"][0]
        assert {"name": "NCCL_DEBUG", "value": "WARN"} in container["env"]
        assert pod["imagePullSecrets"] == [{"name": "registry"}]
        assert pod["serviceAccountName"] == "trainer"
        assert pod["terminationGracePeriodSeconds"] > 120
        volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod["volumes"])}
        mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounts["/shared"] == {"nfs": {"server": "10.0.0.2", "path": "/export"}}
        assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert pods[0]["nodeSelector"] == {"pool": "cpu"}
    assert "nvidia.com/gpu" not in pods[0]["containers"][0]["resources"]["limits"]
    assert pods[1]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert pods[1]["tolerations"] == [
        {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
        {"key": "team", "operator": "Equal", "value": "vision"},
    ]


@pytest.mark.parametrize(
    ("workers", "ranks", "replicas"),
    [
        ({"gpus": 2, "cpus": 16, "memory_gib": 32}, (4, 8), (2, 4)),
        ({"gpus": 4, "cpus": 16, "memory_gib": 32}, (3, 9), (1, 3)),
        ({"gpus": 0, "cpus": 9, "memory_gib": 32}, (4, 4), (2, 2)),  # 2 ranks of 4 CPUs a pod
    ],
)
def test_pods_follow_from_ranks(
    workers: Manifest, ranks: tuple[int, int], replicas: tuple[int, int]
) -> None:
    wanted = request(min_workers=ranks[0], max_workers=ranks[1], uses_gpu=workers["gpus"] > 0)
    cluster = manifest(settings(workers=workers), wanted)["spec"]["rayClusterSpec"]
    group = cluster["workerGroupSpecs"][0]
    assert (group["minReplicas"], group["maxReplicas"]) == replicas
    assert cluster.get("enableInTreeAutoscaling", False) == (replicas[0] < replicas[1])


def test_a_command_is_one_simple_shell_command() -> None:
    odd = ("train", "/shared/my runs/$x.yaml", "--set", "name=it's; ok")
    spec = manifest(settings(), request(arguments=odd))["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[:4] == ["python", "-m", "dml_dist.jobs.start_or_resume", str(RUN_DIR)]
    assert tuple(words[4:]) == odd


def test_a_configuration_of_this_machine_is_sent_along(tmp_path: Path, schema_file: Path) -> None:
    text = "# Mine.\nname: demo\n"
    (tmp_path / "mine.yaml").write_text(text)
    wanted = request(arguments=("train", str(tmp_path / "mine.yaml"), "--workers", "4"))
    target = KubeRayTarget(settings(schema_file=str(schema_file)))
    spec = yaml.safe_load(target.render(wanted))["spec"]
    cluster = spec["rayClusterSpec"]
    pod = cluster["headGroupSpec"]["template"]
    (volume,) = [each for each in pod["spec"]["volumes"] if "downwardAPI" in each]
    (mount,) = [
        each
        for each in pod["spec"]["containers"][0]["volumeMounts"]
        if each["name"] == volume["name"]
    ]
    (item,) = volume["downwardAPI"]["items"]
    ((key, value),) = pod["metadata"]["annotations"].items()
    assert value == text
    assert "dml-dist/config: |\n" in target.render(wanted)
    assert item["fieldRef"]["fieldPath"] == f"metadata.annotations['{key}']"
    words = shlex.split(spec["entrypoint"])
    assert words[4:] == ["train", f"{mount['mountPath']}/{item['path']}", "--workers", "4"]
    # One on the storage is read there, where it may be changed between retries.
    on_storage = settings(storage={"name": "claim", "claim": "c", "mount_path": str(tmp_path)})
    spec = manifest(on_storage, request(arguments=wanted.arguments, run_dir=tmp_path))["spec"]
    assert shlex.split(spec["entrypoint"])[5] == str(tmp_path / "mine.yaml")


def test_a_repeated_command_resumes_what_the_first_one_left(tmp_path: Path) -> None:
    run, comparison = tmp_path / "run", tmp_path / "comparison"
    assert with_resume(run, ["train", "a.yaml"]) == ["train", "a.yaml"]
    RunFolder.create(run, "name: run\n", name="run", seed=0)
    assert with_resume(run, ["train", "a.yaml"]) == ["train", "a.yaml", "--resume"]
    assert with_resume(run, ["train", "--resume"]) == ["train", "--resume"]
    assert with_resume(run, ["evaluate", "run"]) == ["evaluate", "run"]
    assert with_resume(comparison, ["compare", "a.yaml"]) == ["compare", "a.yaml"]
    comparison.mkdir()
    ComparisonFolder(comparison).config_path.touch()
    assert with_resume(comparison, ["compare", "a.yaml"])[-1] == "--resume"


def test_the_repeated_command_is_dml_dist_with_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dml_dist.jobs.start_or_resume", str(tmp_path)]
    arguments = ["config", "--explain", "optim.nothing"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "optim.nothing" in done.stderr


def test_names_are_valid_and_different() -> None:
    assert rayjob_name("glyphs-12") == "glyphs-12"
    odd = ["Glyphs-12", "glyphs_12", "glyphs.12", "12", "-", "x" * 60 + "1", "x" * 60 + "2"]
    names = [rayjob_name(each) for each in [*odd, "glyphs-12"]]
    assert len(set(names)) == len(names)
    for name in names:
        job = manifest(settings(), request())
        job["metadata"]["name"] = name
        check_manifest(job)


# ---------------------------------------------------------------- what is refused

CLUSTER = "spec.rayClusterSpec"
GROUP = f"{CLUSTER}.workerGroupSpecs[0]"
POD = f"{GROUP}.template.spec"


def _job(job: Manifest) -> Manifest:
    return job["spec"]


def _cluster(job: Manifest) -> Manifest:
    return job["spec"]["rayClusterSpec"]


def _group(job: Manifest) -> Manifest:
    return _cluster(job)["workerGroupSpecs"][0]


def _pod(job: Manifest) -> Manifest:
    return _group(job)["template"]["spec"]


def _box(job: Manifest) -> Manifest:
    return _pod(job)["containers"][0]


Change = Callable[[Manifest], object]
AGAINST_RULES: dict[str, tuple[str, Change]] = {
    "long name": ("metadata.name", lambda job: job["metadata"].update(name="x" * 48)),
    "upper case": ("metadata.name", lambda job: job["metadata"].update(name="Demo")),
    "digit first": ("metadata.name", lambda job: job["metadata"].update(name="1-demo")),
    "no command": ("spec.entrypoint", lambda job: _job(job).update(entrypoint=" ")),
    "mode": ("spec.submissionMode", lambda job: _job(job).update(submissionMode="K8sJob")),
    "ttl without shutdown": (
        "spec.ttlSecondsAfterFinished",
        lambda job: _job(job).update(shutdownAfterJobFinishes=False),
    ),
    "deadline": (
        "spec.activeDeadlineSeconds",
        lambda job: _job(job).update(activeDeadlineSeconds=0),
    ),
    "backoff": ("spec.backoffLimit", lambda job: _job(job).update(backoffLimit=-1)),
    "token without version": (f"{CLUSTER}.rayVersion", lambda job: _cluster(job).pop("rayVersion")),
    "old Ray": (f"{CLUSTER}.rayVersion", lambda job: _cluster(job).update(rayVersion="2.51.9")),
    "no cluster": (CLUSTER, lambda job: _job(job).pop("rayClusterSpec")),
    "bounds": (f"{GROUP}.minReplicas", lambda job: _group(job).update(minReplicas=9)),
    "replicas": (f"{GROUP}.replicas", lambda job: _group(job).update(replicas=5)),
    "group twice": (
        f"{CLUSTER}.workerGroupSpecs[1].groupName",
        lambda job: _cluster(job)["workerGroupSpecs"].append(copy.deepcopy(_group(job))),
    ),
    "no container": (f"{POD}.containers", lambda job: _pod(job).update(containers=[])),
    "mount without volume": (
        f"{POD}.containers[0].volumeMounts[0].name",
        lambda job: _pod(job)["volumes"].pop(0),
    ),
    "mount twice": (
        f"{POD}.containers[0].volumeMounts[1].mountPath",
        lambda job: _box(job)["volumeMounts"][1].update(mountPath="/shared"),
    ),
    "container twice": (
        f"{POD}.containers[1].name",
        lambda job: _pod(job)["containers"].append(dict(_box(job))),
    ),
    "no time for a checkpoint": (
        f"{POD}.terminationGracePeriodSeconds",
        lambda job: _pod(job).update(terminationGracePeriodSeconds=60),
    ),
}
AGAINST_SCHEMA: dict[str, tuple[str, Change]] = {
    "misspelt field": (f"{GROUP}.replica", lambda job: _group(job).update(replica=2)),
    "field of another place": ("spec.rayVersion", lambda job: _job(job).update(rayVersion="2.6")),
    "no template": (f"{GROUP}.template", lambda job: _group(job).pop("template")),
    "text for a number": ("spec.backoffLimit", lambda job: _job(job).update(backoffLimit="3")),
    "number for text": (
        f"{GROUP}.rayStartParams.num-cpus",
        lambda job: _group(job)["rayStartParams"].update({"num-cpus": 0}),
    ),
    "quantity": (
        f"{POD}.containers[0].resources.limits.memory",
        lambda job: _box(job)["resources"]["limits"].update(memory="32 GB"),
    ),
    "authentication": (
        f"{CLUSTER}.authOptions.mode",
        lambda job: _cluster(job)["authOptions"].update(mode="tokens"),
    ),
    "misspelt in a container": (
        f"{POD}.containers[0].volumeMount",
        lambda job: _box(job).update(volumeMount=[]),
    ),
}


def _refusal(change: Change, schema: Any = None) -> str:
    job = copy.deepcopy(manifest(settings(), request()))
    change(job)
    with pytest.raises(ConfigError) as caught:
        check_manifest(job, schema)
    return str(caught.value)


@pytest.mark.parametrize("case", AGAINST_RULES)
def test_a_manifest_against_the_rules_is_refused_by_the_name_of_its_field(case: str) -> None:
    path, change = AGAINST_RULES[case]
    assert f"\n  {path}: " in _refusal(change)


@pytest.mark.parametrize("case", AGAINST_SCHEMA)
def test_a_manifest_against_the_schema_is_refused_by_the_name_of_its_field(
    case: str, schema_file: Path
) -> None:
    path, change = AGAINST_SCHEMA[case]
    assert f"\n  {path}: " in _refusal(change, read_schema(schema_file))


def test_the_definition_of_a_resource_becomes_a_closed_schema(tmp_path: Path) -> None:
    port = {"x-kubernetes-int-or-string": True}
    free = {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True}
    labels = {"type": "object", "additionalProperties": {"type": "string"}}
    item = {"type": "object", "properties": {"port": port, "free": free, "labels": labels}}
    spec = {"type": "object", "properties": {"items": {"type": "array", "items": item}}}
    path = tmp_path / "crd.json"
    path.write_text(json.dumps(_definition({"type": "object", "properties": {"spec": spec}})))
    schema = read_schema(path)
    said = _refusal(
        lambda job: (
            job.clear(),
            job.update(
                spec={"items": [{"port": 1.5, "free": {"a": 1}, "labels": {"b": "c"}}]}, x=1
            ),
        ),
        schema,
    )
    assert [line.partition(":")[0].strip() for line in said.splitlines()[1:]] == [
        "x",
        "spec.items[0].port",
    ]


def test_a_file_that_is_no_definition_of_rayjob_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "crd.json"
    for text in ("{", "{}", json.dumps(_definition({}, kind="RayCluster"))):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"crd\.json .*rayjobs\.ray\.io"):
            read_schema(path)


@pytest.mark.parametrize(
    ("changes", "wanted", "message"),
    [
        ({}, {"run_dir": Path("/home/me/runs/demo")}, r"/home/me/runs/demo is not on .* /shared"),
        ({}, {"run_dir": Path("/shared2/demo")}, "is not on"),
        ({"workers": {"gpus": 0, "cpus": 8, "memory_gib": 8}}, {}, r"workers\.gpus = 0"),
        ({}, {"cpus_per_rank": 9.0}, r"2 ranks, one per GPU, need 18 CPUs"),
        (
            {"workers": {"gpus": 0, "cpus": 8, "memory_gib": 8}},
            {"cpus_per_rank": 9.0, "uses_gpu": False},
            r"a rank needs 9 CPUs .* workers\.cpus = 8",
        ),
    ],
)
def test_requests_that_no_pod_can_hold_are_refused(
    changes: Manifest, wanted: Manifest, message: str
) -> None:
    with pytest.raises((ConfigError, TopologyError), match=message):
        KubeRayTarget(settings(**changes)).render(request(**wanted))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"namespace": "My_Space"}, "namespace"),
        ({"ray_version": "latest"}, "ray_version"),
        ({"backoff_limit": -1}, "backoff_limit"),
        ({"storage": {"name": "claim", "claim": "c", "mount_path": "shared"}}, "mount_path"),
        ({"replicas": 3}, "replicas"),
        ({"environment": {"A-B": "1"}}, "environment"),
        ({"environment": {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1"}}, "checkpoint_seconds"),
        ({"workers": {"cpus": 8, "memory_gib": 4}}, "must be less than memory_gib = 4"),
        (
            {"head": {"cpus": 1, "memory_gib": 8, "tolerations": [{"key": "a", "value": "b"}]}},
            "belongs to the operator Equal",
        ),
    ],
)
def test_wrong_settings_are_refused(changes: Manifest, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**changes)
