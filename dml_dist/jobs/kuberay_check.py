"""Checks of a RayJob manifest before it is sent: RayJob's schema, then the operator's rules.

The operator's rules hold for every manifest. They are written here because the API server does not
know them: it accepts a manifest that breaks one, and the job ends as ValidationFailed. The schema
belongs to the version of KubeRay in the cluster: the API server checks it in a dry run, and without
a cluster it comes from a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dml_dist.errors import ConfigError

MAX_NAME = 47
"""Longest name of a RayJob: the operator appends to it for pods, whose names have 63 at most."""

DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
"""How many seconds a node of Ray goes on after SIGTERM."""

_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_FIRST_RAY_WITH_TOKENS = (2, 52, 0)
_DEFAULT_DRAIN_SECONDS = 30.0
_DEFAULT_GRACE_SECONDS = 30  # of Kubernetes

Schema = Mapping[str, Any]
Problems = Iterator[tuple[str, str]]
"""Path of a field, and what is wrong with it."""


def check_manifest(manifest: Mapping[str, Any], schema: Schema | None = None) -> None:
    """Check a RayJob.

    Args:
        manifest: The RayJob as plain values.
        schema: A closed JSON schema of RayJob, see `read_schema`; None checks the rules alone.

    Raises:
        ConfigError: If it breaks the schema or a rule; names each field.
    """
    problems = [] if schema is None else list(_schema_problems(manifest, schema))
    # The rules need fields of the right types.
    problems = problems or list(_rule_problems(manifest))
    if problems:
        lines = "".join(f"\n  {path}: {what}" for path, what in problems)
        raise ConfigError(
            f"the RayJob manifest is not valid; correct the settings of the target:{lines}"
        )


# ---------------------------------------------------------------- the schema


def read_schema(path: Path) -> Schema:
    """Return the closed schema of the CustomResourceDefinition in a JSON file.

    `kubectl get crd rayjobs.ray.io -o json` writes such a file.

    Raises:
        ConfigError: If the file is not RayJob's definition.
    """
    try:
        definition = json.loads(path.read_text())
        versions = {each["name"]: each for each in definition["spec"]["versions"]}
        kind = definition["spec"]["names"]["kind"]
        schema = versions["v1"]["schema"]["openAPIV3Schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"schema_file {path} is not the CustomResourceDefinition of RayJob v1 as JSON "
            f"({type(error).__name__}: {error}); write it with "
            "`kubectl get crd rayjobs.ray.io -o json`"
        ) from None
    if kind != "RayJob":
        raise ConfigError(f"schema_file {path} defines {kind}; give the one of rayjobs.ray.io")
    return _closed(schema)


def _closed(node: Any) -> Any:
    """Return a Kubernetes schema as a JSON schema that refuses unknown fields."""
    if isinstance(node, list):
        return [_closed(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: _closed(value) for key, value in node.items()}
    if node.get("x-kubernetes-int-or-string") is True:
        result["type"] = ["integer", "string"]
    is_open = node.get("x-kubernetes-preserve-unknown-fields") is True
    if isinstance(node.get("properties"), dict) and node.get("type") == "object" and not is_open:
        result.setdefault("additionalProperties", False)
    return result


def _schema_problems(manifest: Mapping[str, Any], schema: Schema) -> Problems:
    import jsonschema  # Ray depends on it.

    validator = jsonschema.Draft202012Validator(schema)
    for error in sorted(validator.iter_errors(manifest), key=lambda error: list(error.path)):
        path = _dotted(error.absolute_path)
        match error.validator:
            case "additionalProperties":
                for name in sorted(set(error.instance) - set(error.schema.get("properties", {}))):
                    yield _below(path, name), "is no field of RayJob v1; correct its name"
            case "required":
                for name in error.validator_value:
                    if name not in error.instance:
                        yield _below(path, name), "is missing"
            case _:
                yield path, error.message


def _dotted(path: Sequence[str | int]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ---------------------------------------------------------------- the operator's rules


def _rule_problems(manifest: Mapping[str, Any]) -> Problems:
    name = manifest["metadata"].get("name", "")
    if len(name) > MAX_NAME or not _DNS_1035.fullmatch(name):
        yield (
            "metadata.name",
            f"must be at most {MAX_NAME} lower-case letters, digits and '-', begin with a letter "
            f"and not end with '-', got {name!r} of {len(name)} characters",
        )
    spec = manifest["spec"]
    yield from _job_problems(spec)
    cluster = spec.get("rayClusterSpec")
    if cluster is None:
        yield "spec.rayClusterSpec", "is missing"
        return
    yield from _auth_problems(cluster)
    yield from _pod_problems(cluster["headGroupSpec"], "spec.rayClusterSpec.headGroupSpec")
    seen = set()
    for number, group in enumerate(cluster.get("workerGroupSpecs", [])):
        path = f"spec.rayClusterSpec.workerGroupSpecs[{number}]"
        if group["groupName"] in seen:
            yield f"{path}.groupName", f"must be unique, got {group['groupName']!r} again"
        seen.add(group["groupName"])
        yield from _replica_problems(group, path)
        yield from _pod_problems(group, path)


def _job_problems(spec: Mapping[str, Any]) -> Problems:
    if not spec.get("entrypoint", "").strip():
        yield "spec.entrypoint", "is missing"
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in _SUBMISSION_MODES:
        yield "spec.submissionMode", f"must be one of {', '.join(_SUBMISSION_MODES)}, got {mode!r}"
    shuts_down = spec.get("shutdownAfterJobFinishes", False)
    ttl = spec.get("ttlSecondsAfterFinished", 0)
    if ttl < 0:
        yield "spec.ttlSecondsAfterFinished", f"must be at least 0, got {ttl}"
    if ttl > 0 and not shuts_down:
        yield (
            "spec.ttlSecondsAfterFinished",
            f"is {ttl}, but has an effect only with spec.shutdownAfterJobFinishes = true",
        )
    if spec.get("suspend") and not shuts_down:
        yield "spec.suspend", "needs spec.shutdownAfterJobFinishes = true"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if (seconds := spec.get(key)) is not None and seconds <= 0:
            yield f"spec.{key}", f"must be at least 1, got {seconds}"
    if (limit := spec.get("backoffLimit", 0)) < 0:
        yield "spec.backoffLimit", f"must be at least 0, got {limit}"


def _auth_problems(cluster: Mapping[str, Any]) -> Problems:
    if cluster.get("authOptions", {}).get("mode") != "token":
        return
    text = cluster.get("rayVersion", "")
    numbers = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)", text)
    if numbers is None or tuple(map(int, numbers.groups())) < _FIRST_RAY_WITH_TOKENS:
        first = ".".join(map(str, _FIRST_RAY_WITH_TOKENS))
        yield (
            "spec.rayClusterSpec.rayVersion",
            f"must be {first} or later, since authOptions.mode is token, got {text!r}",
        )


def _replica_problems(group: Mapping[str, Any], path: str) -> Problems:
    fewest, most = group["minReplicas"], group["maxReplicas"]
    if fewest < 0:
        yield f"{path}.minReplicas", f"must be at least 0, got {fewest}"
    if fewest > most:
        yield f"{path}.minReplicas", f"must be at most maxReplicas = {most}, got {fewest}"
    elif not fewest <= group.get("replicas", fewest) <= most:
        yield f"{path}.replicas", f"must be from {fewest} to {most}, got {group['replicas']}"


def _pod_problems(group: Mapping[str, Any], path: str) -> Problems:
    spec = group["template"]["spec"]
    containers, path = spec["containers"], f"{path}.template.spec"
    if not containers:
        yield f"{path}.containers", "must hold at least one container"
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    for number, volume in enumerate(volumes):
        if volume in volumes[:number]:
            yield f"{path}.volumes[{number}].name", f"must be unique, got {volume!r} again"
    names = [container["name"] for container in containers]
    for number, container in enumerate(containers):
        here = f"{path}.containers[{number}]"
        if names[number] in names[:number]:
            yield f"{here}.name", f"must be unique, got {names[number]!r} again"
        mounted = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
        for index, mount in enumerate(container.get("volumeMounts", [])):
            if mount["name"] not in volumes:
                yield (
                    f"{here}.volumeMounts[{index}].name",
                    f"must be one of the volumes {', '.join(volumes) or '(none)'}, "
                    f"got {mount['name']!r}",
                )
            if mounted[index] in mounted[:index]:
                yield (
                    f"{here}.volumeMounts[{index}].mountPath",
                    f"must be unique, got {mounted[index]} again",
                )
        variables = {each["name"]: each.get("value", "") for each in container.get("env", [])}
        drain = float(variables.get(DRAIN_VARIABLE) or _DEFAULT_DRAIN_SECONDS)
        grace = spec.get("terminationGracePeriodSeconds", _DEFAULT_GRACE_SECONDS)
        # Sidecars do not drain: the first container of a pod is Ray's.
        if number == 0 and grace <= drain:
            yield (
                f"{path}.terminationGracePeriodSeconds",
                f"must exceed Ray's time for a checkpoint at the end of a pod, {DRAIN_VARIABLE} = "
                f"{drain:g} s, got {grace}",
            )
