"""The target KubeRay against a kubectl that talks to a file; there is no API server in tests."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from dml_dist.errors import ConfigError, RunError
from dml_dist.jobs import kuberay, kuberay_kubectl
from dml_dist.jobs.kuberay import KubeRayTarget
from tests.kuberay_cases import FakeKubectl, pod, request, settings

RUNNING = {
    "jobDeploymentStatus": "Running",
    "jobStatus": "RUNNING",
    "jobId": "demo-1-abcde",
    "rayClusterName": "demo-1-xyz",
}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeKubectl:
    fake = FakeKubectl(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))  # No real kubectl can be reached.
    monkeypatch.setattr(kuberay, "_SECONDS_BETWEEN_LOOKS", 0.0)
    return fake


def test_check_creates_nothing_and_submit_creates_what_render_shows(kubectl: FakeKubectl) -> None:
    target = KubeRayTarget(settings(context="lab"))
    target.check(request())
    assert kubectl.state["rayjobs"] == {}
    assert target.submit(request()) == "demo-1"
    assert kubectl.state["manifest"] == target.render(request())
    for call in kubectl.calls:
        assert call[:4] == ["--namespace", "research", "--context", "lab"]
        assert "--validate=strict" in call


def test_submit_never_changes_an_existing_job(kubectl: FakeKubectl) -> None:
    kubectl.set(rayjobs={"demo-1": RUNNING})
    with pytest.raises(RunError, match=r"already exists\n.* --id"):
        KubeRayTarget(settings()).submit(request())


@pytest.mark.parametrize(
    ("status", "state", "code"),
    [
        ({}, "queued", None),
        ({"jobDeploymentStatus": "Initializing"}, "queued", None),
        ({"jobDeploymentStatus": "Running", "jobStatus": "PENDING"}, "queued", None),
        (RUNNING, "running", None),
        # The operator has not decided yet whether it tries again.
        ({"jobDeploymentStatus": "Running", "jobStatus": "FAILED"}, "running", None),
        ({"jobDeploymentStatus": "Retrying", "jobStatus": "FAILED"}, "queued", None),
        (SUCCEEDED, "succeeded", 0),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, "stopped", None),
        ({"jobDeploymentStatus": "Suspended"}, "stopped", None),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "reason": "AppFailed",
                "message": "Job entrypoint command failed with exit code 2, last logs:\nerror: x",
            },
            "failed",
            2,
        ),
        ({"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}, "failed", None),
        ({"jobDeploymentStatus": "ValidationFailed"}, "failed", None),
    ],
)
def test_status_has_our_words(
    kubectl: FakeKubectl, status: dict[str, str], state: str, code: int | None
) -> None:
    kubectl.set(rayjobs={"demo-1": status})
    found = KubeRayTarget(settings()).status("demo-1")
    assert (found.state, found.exit_code) == (state, code)
    assert found.detail.startswith(status.get("jobDeploymentStatus", "New"))
    assert status.get("reason", "") in found.detail


def test_a_queued_job_says_what_it_waits_for(kubectl: FakeKubectl) -> None:
    head = {"type": "HeadPodReady", "status": "False"}
    head |= {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    cluster = {"readyWorkerReplicas": 1, "desiredWorkerReplicas": 4, "conditions": [head]}
    status = {"jobDeploymentStatus": "Initializing", "rayClusterStatus": cluster}
    kubectl.set(rayjobs={"demo-1": status})
    assert KubeRayTarget(settings()).status("demo-1").detail == (
        "Initializing: 1 of 4 worker pods ready, head pod not ready "
        "(ImagePullBackOff: Back-off pulling image)"
    )


def test_an_unknown_job_is_lost(kubectl: FakeKubectl) -> None:
    target = KubeRayTarget(settings())
    assert target.status("gone").state == "lost"
    for ask in (lambda: list(target.logs("gone", follow=True)), lambda: target.stop("gone")):
        with pytest.raises(ConfigError, match="no RayJob gone in the namespace research"):
            ask()


def test_logs_reconnect_without_gaps_until_the_status_is_final(kubectl: FakeKubectl) -> None:
    queued = {"jobDeploymentStatus": "Initializing"}
    kubectl.set(
        rayjobs={"demo-1": [queued, RUNNING, RUNNING, SUCCEEDED]},
        pods=[pod("demo-1-a", "job-name=demo-1"), pod("other", "job-name=other")],
        # The stream breaks off in the middle of a line, then at the end of one.
        logs={"demo-1-a": ["", "one\ntw", "one\ntwo\n", "one\ntwo\nthree\n"], "other": "no\n"},
    )
    text = "".join(KubeRayTarget(settings()).logs("demo-1", follow=True))
    assert text == "one\ntwo\nthree\n"
    calls = [call for call in kubectl.calls if "logs" in call]
    assert ["--follow" in call for call in calls] == [True, True, True, False]


def test_logs_of_a_retry_come_from_its_newer_pod(kubectl: FakeKubectl) -> None:
    kubectl.set(
        rayjobs={"demo-1": RUNNING},
        pods=[
            pod("second", "job-name=demo-1", created="2026-11-01T12:00:00Z"),
            pod("first", "job-name=demo-1"),
            {
                **pod("third", "job-name=demo-1", created="2026-11-01T13:00:00Z"),
                "status": {"phase": "Pending"},
            },
        ],
        logs={"first": "1\n", "second": "2\n"},
    )
    assert list(KubeRayTarget(settings()).logs("demo-1", follow=False)) == ["2\n"]


def test_stop_of_a_running_job_asks_ray_and_keeps_the_record(kubectl: FakeKubectl) -> None:
    head = pod("head-pod", "ray.io/cluster=demo-1-xyz", "ray.io/node-type=head")
    kubectl.set(rayjobs={"demo-1": RUNNING}, pods=[head])
    said = KubeRayTarget(settings(checkpoint_seconds=45)).stop("demo-1")
    executed = kubectl.state["executed"]
    assert executed[:3] == ["ray", "job", "stop"]
    assert executed[-1] == "demo-1-abcde"
    call = kubectl.calls[-1]
    assert call[call.index("exec") + 1 : call.index("--")] == [
        "head-pod",
        "--container",
        "ray-head",
    ]
    assert "patched" not in kubectl.state
    assert "45 s for a checkpoint" in said


@pytest.mark.parametrize("deployment", ["Initializing", "Retrying", "Suspending"])
def test_stop_of_a_job_that_does_not_run_suspends_it(kubectl: FakeKubectl, deployment: str) -> None:
    kubectl.set(rayjobs={"demo-1": {"jobDeploymentStatus": deployment, "jobStatus": "FAILED"}})
    said = KubeRayTarget(settings()).stop("demo-1")
    assert kubectl.state["patched"] == {"spec": {"suspend": True}}
    assert "executed" not in kubectl.state
    assert "suspended" in said


def test_stop_of_an_ended_job_does_nothing(kubectl: FakeKubectl) -> None:
    kubectl.set(rayjobs={"demo-1": SUCCEEDED})
    assert "has ended already" in KubeRayTarget(settings()).stop("demo-1")
    assert not {"patched", "executed"} & kubectl.state.keys()


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        ('no matches for kind "RayJob" in version "ray.io/v1"', "no KubeRay operator"),
        ('Error from server (NotFound): namespaces "research" not found', "Create the namespace"),
        ('(Forbidden): rayjobs.ray.io is forbidden: User "u" cannot create', "administrator"),
        ("error: You must be logged in to the server (Unauthorized)", "Log in again"),
        ("The connection to the server 10.0.0.1:6443 was refused", "`context`"),
        ('strict decoding error: unknown field "spec.priority"', "install a later one"),
        ('error: context "lab" does not exist', "get-contexts"),
    ],
)
def test_refusals_of_the_cluster_say_what_to_do(
    kubectl: FakeKubectl, error: str, advice: str
) -> None:
    kubectl.set(error=error)
    with pytest.raises(RunError) as caught:
        KubeRayTarget(settings()).check(request())
    assert error in str(caught.value)
    assert advice in str(caught.value)


def test_without_kubectl_the_manifest_can_still_be_rendered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    target = KubeRayTarget(settings())
    assert target.render(request()).startswith("apiVersion: ray.io/v1\n")
    with pytest.raises(ConfigError, match=r"kubectl is not on the PATH.*--render"):
        target.submit(request())


def test_a_kubectl_that_hangs_is_given_up(
    kubectl: FakeKubectl, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kuberay_kubectl._SECONDS <= 30
    monkeypatch.setattr(kuberay_kubectl, "_SECONDS", 0.3)
    kubectl.set(hang=60)
    with pytest.raises(RunError, match=r"`kubectl get` did not end within 0\.3 s"):
        KubeRayTarget(settings()).status("demo-1")


def test_leaving_the_log_ends_kubectl(kubectl: FakeKubectl, tmp_path: Path) -> None:
    (tmp_path / "kubectl").write_text(
        f"#!{sys.executable} -IS\nimport os, time\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "print('line', flush=True)\ntime.sleep(60)\n"
    )
    start = time.monotonic()
    with kuberay_kubectl.Kubectl("research").lines("logs", "pod", "--follow") as lines:
        assert next(lines) == "line\n"
    assert time.monotonic() - start < 30  # It would go on for 60 s.
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()
