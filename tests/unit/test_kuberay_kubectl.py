"""The target KubeRay with the real kubectl, against a small HTTP server in place of Kubernetes."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dml_dist.errors import RunError
from dml_dist.jobs import kuberay
from dml_dist.jobs.kuberay import KubeRayTarget
from tests.api_server import ApiServer, serving
from tests.kuberay_cases import pod, request, settings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed"),
]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    source = Path(os.environ.get("DML_DIST_TEST_DATA", "")) / "kuberay_rayjob_v1_schema.json.gz"
    if not source.is_file():
        pytest.skip("DML_DIST_TEST_DATA does not name the folder with the schema of RayJob")
    with serving(json.loads(gzip.decompress(source.read_bytes()))) as state:
        config = tmp_path / "config"
        config.write_text(json.dumps(_kubectl_config(state.url)))
        # kubectl reads no other configuration and keeps its cache here.
        monkeypatch.setenv("KUBECONFIG", str(config))
        monkeypatch.setenv("HOME", str(tmp_path))
        yield state


def _kubectl_config(url: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "other",
        "clusters": [{"name": "here", "cluster": {"server": url}}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "lab", "context": {"cluster": "here", "user": "me"}}],
    }


def test_a_job_from_its_check_to_its_stop(server: ApiServer) -> None:
    target = KubeRayTarget(settings(context="lab"))
    target.check(request())
    assert server.rayjobs == {}
    assert target.submit(request()) == "demo-1"
    assert target.status("demo-1").state == "queued"
    assert target.status("gone").state == "lost"
    with pytest.raises(RunError, match=r'"demo-1" already exists\n.*--id'):
        target.submit(request())

    submitter = {"kind": "Pod", "apiVersion": "v1", **pod("demo-1-a")}
    submitter["metadata"] |= {"labels": {"job-name": "demo-1"}, "namespace": "research"}
    submitter["spec"] = {"containers": [{"name": "ray-job-submitter"}]}
    server.pods, server.logs = [submitter], {"demo-1-a": "one\ntwo\n"}
    assert list(target.logs("demo-1", follow=False)) == ["one\n", "two\n"]
    server.rayjobs["demo-1"]["status"] = {
        "jobDeploymentStatus": "Complete",
        "jobStatus": "SUCCEEDED",
    }
    assert list(target.logs("demo-1", follow=True)) == ["one\n", "two\n"]
    server.rayjobs["demo-1"]["status"] = {"jobDeploymentStatus": "Initializing"}
    target.stop("demo-1")
    assert server.rayjobs["demo-1"]["spec"]["suspend"] is True


def test_the_server_refuses_a_field_that_its_version_does_not_know(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        kuberay,
        "manifest_text",
        lambda *_: (
            "apiVersion: ray.io/v1\nkind: RayJob\nmetadata: {name: demo-1, namespace: research}\n"
            "spec: {entrypoint: python, priority: high}\n"
        ),
    )
    with pytest.raises(RunError, match=r"strict decoding error.*'priority'.*\n.*install a later"):
        KubeRayTarget(settings(context="lab")).check(request())


def test_no_server_and_no_such_context_are_told_apart(server: ApiServer) -> None:
    with pytest.raises(RunError, match=r'context "attic" does not exist\n.*get-contexts'):
        KubeRayTarget(settings(context="attic")).check(request())
    Path(os.environ["KUBECONFIG"]).write_text(json.dumps(_kubectl_config("http://127.0.0.1:9")))
    with pytest.raises(RunError, match=r"failed: The connection .* was refused.*\nCheck kubectl"):
        KubeRayTarget(settings(context="lab")).status("demo-1")
