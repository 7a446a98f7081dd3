"""Ray Jobs through a stand-in for the head: packages, requests, errors and logs."""

from __future__ import annotations

import io
import json
import shlex
import socket
import subprocess
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dml_dist.errors import ConfigError, RunError, TopologyError
from dml_dist.jobs import ray_http, ray_jobs, upload
from dml_dist.jobs.ray_jobs import RayTarget, RayTargetConfig
from dml_dist.jobs.target import JobRequest
from dml_dist.jobs.upload import files_to_upload, pack
from tests.ray_head import RayHead, ray_head

REQUEST = JobRequest(
    id="glyphs-1",
    arguments=("train", "glyphs.yaml", "--set", "name=a b"),
    run_dir=Path("/shared/glyphs"),
    min_workers=2,
    max_workers=2,
    cpus_per_rank=1.0,
    uses_gpu=False,
)


@pytest.fixture(scope="module")
def running() -> Iterator[RayHead]:
    with ray_head() as head:
        yield head


@pytest.fixture
def head(running: RayHead, monkeypatch: pytest.MonkeyPatch) -> RayHead:
    url = running.url
    running.__init__()  # type: ignore[misc]
    running.url = url
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    monkeypatch.setattr(ray_jobs, "_SECONDS_BETWEEN_LOOKS", 0.01)
    return running


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository with tracked, new and ignored files."""
    for name, text in {
        ".gitignore": "ignored/\nglyphs.yaml\n",
        "code.py": "x = 1",
        "package/deep.py": "y = 2",
        "new.py": "z = 3",
        "glyphs.yaml": "name: glyphs",
        "ignored/secret": "s",
        "venv/pyvenv.cfg": "home = /usr",
        "venv/lib/module.py": "v",
        "shards/index.parquet": "i",
        "shards/shard-0.tar": "t",
        "results/one/run.json": "{}",
        "results/one/checkpoints/big.pt": "p",
        "records/.jobs/a-1.json": "{}",
        "records/b/note": "n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "code.py", "package", ".gitignore"], cwd=tmp_path, check=True)
    return tmp_path


def target(head: RayHead, project: Path, **changes: Any) -> RayTarget:
    return RayTarget(RayTargetConfig(address=head.url, **changes), project)


# ---------------------------------------------------------------- package


CODE = [".gitignore", "code.py", "new.py", "package/deep.py"]


def test_code_is_sent_and_nothing_else(project: Path) -> None:
    assert list(map(str, files_to_upload(project))) == CODE


def test_the_rules_hold_without_a_repository(project: Path) -> None:
    for path in sorted((project / ".git").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (project / ".git").rmdir()
    assert list(map(str, files_to_upload(project))) == CODE


def test_tracked_files_are_sent_whatever_lies_beside_them(project: Path) -> None:
    subprocess.run(["git", "add", "results/one/run.json"], cwd=project, check=True)
    (project / "code.py").unlink()  # Still tracked.
    sent = list(map(str, files_to_upload(project)))
    assert sent == [".gitignore", "new.py", "package/deep.py", "results/one/run.json"]


def test_a_folder_below_the_top_of_the_repository(project: Path) -> None:
    assert files_to_upload(project / "package") == [Path("deep.py")]


def test_equal_files_give_equal_packages(project: Path) -> None:
    files = files_to_upload(project)
    one = pack(project, files)
    (project / "code.py").touch()
    assert pack(project, files) == one
    with zipfile.ZipFile(io.BytesIO(one)) as archive:
        assert archive.namelist() == CODE
        assert archive.read("package/deep.py") == b"y = 2"
    (project / "code.py").write_text("x = 2")
    assert upload.package_name(pack(project, files)) != upload.package_name(one)


def test_a_package_too_large_names_the_largest_files(project: Path) -> None:
    for name, size in (("big.bin", 70), ("bigger.bin", 80)):
        with (project / name).open("wb") as file:
            file.truncate(size * 2**20)
    with pytest.raises(ConfigError, match=r"150 MiB.*are bigger.bin \(80.0 MiB\), big.bin"):
        pack(project, files_to_upload(project))


# ---------------------------------------------------------------- what is sent


def test_a_job_is_sent(head: RayHead, project: Path) -> None:
    sender = target(head, project, python="/env/bin/python", env={"A": "1"}, grace_seconds=90)
    sender.check(REQUEST)
    assert sender.submit(REQUEST) == "glyphs-1"
    body = head.jobs["glyphs-1"]["body"]
    command = shlex.split(body["entrypoint"])
    assert command == ["/env/bin/python", "-m", "dml_dist", *REQUEST.arguments]
    assert body["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "90", "A": "1"}
    assert "entrypoint_num_cpus" not in body
    [(name, package)] = head.packages.items()
    assert body["runtime_env"]["working_dir"] == f"gcs://{name}"
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        # The configuration is sent although git ignores it: the command names it.
        assert sorted(archive.namelist()) == sorted([*CODE, "glyphs.yaml"])


def test_the_same_files_are_uploaded_once(head: RayHead, project: Path) -> None:
    for number in (1, 2):
        target(head, project).submit(replace(REQUEST, id=f"glyphs-{number}"))
    assert [method for method, path in head.requests if "packages" in path] == ["GET", "PUT", "GET"]


def test_without_upload_only_the_configuration_is_sent(head: RayHead, project: Path) -> None:
    target(head, project, upload=False, driver_cpus=1.0).submit(REQUEST)
    [package] = head.packages.values()
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        assert archive.namelist() == ["glyphs.yaml"]
    assert head.jobs["glyphs-1"]["body"]["entrypoint_num_cpus"] == 1.0


def test_an_identifier_that_the_cluster_has_gets_an_ending(head: RayHead, project: Path) -> None:
    head.jobs["glyphs-1"] = {"status": "RUNNING"}
    job = target(head, project).submit(REQUEST)
    assert job.startswith("glyphs-1-")
    assert head.jobs["glyphs-1"] == {"status": "RUNNING"}


def test_the_rendered_command_is_what_is_sent(head: RayHead, project: Path) -> None:
    sender = target(head, project)
    text = sender.render(REQUEST)
    words = shlex.split(text, comments=True)
    assert words[:4] == ["RAY_AUTH_MODE=token", "ray", "job", "submit"]
    options = dict(zip(words[4:12:2], words[5:13:2], strict=True))
    sender.submit(REQUEST)
    body = head.jobs["glyphs-1"]["body"]
    del body["runtime_env"]["working_dir"]
    assert options["--address"] == head.url
    assert options["--submission-id"] == "glyphs-1"
    assert options["--working-dir"] == "."
    assert json.loads(options["--runtime-env-json"]) == body["runtime_env"]
    assert shlex.join(words[words.index("--") + 1 :]) == body["entrypoint"]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("nodes", "changes", "settings", "words"),
    [
        ([{"CPU": 1.0}], {}, {}, "2 ranks with 1 CPUs each do not fit"),
        ([{"CPU": 3.0}, {"CPU": 3.0}], {"cpus_per_rank": 4.0}, {}, "have 3, 3 CPUs"),
        ([{"CPU": 2.0}], {}, {"driver_cpus": 1.0}, "and a driver with 1 do not fit"),
        ([{"CPU": 4.0, "GPU": 1.0}], {"uses_gpu": True}, {}, "needs 2 GPUs"),
        ([], {}, {}, "do not fit"),
    ],
)
def test_a_cluster_that_is_too_small(
    nodes: Any,
    changes: Any,
    settings: Any,
    words: str,
    head: RayHead,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_jobs, "_SECONDS_FOR_NODES", 0.0)
    head.nodes = nodes
    with pytest.raises(TopologyError, match=words):
        target(head, project, **settings).check(replace(REQUEST, **changes))


def test_ranks_are_counted_node_by_node(head: RayHead, project: Path) -> None:
    head.nodes = [{"CPU": 3.0}, {"CPU": 3.0}]
    target(head, project).check(replace(REQUEST, min_workers=2, cpus_per_rank=3.0))


def test_missing_and_wrong_tokens_are_told_apart(
    head: RayHead, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(ConfigError, match="refuses the token from RAY_AUTH_TOKEN"):
        target(head, project).check(REQUEST)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(project))
    with pytest.raises(ConfigError, match="needs a token, and none was found"):
        target(head, project).check(REQUEST)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(project / "none"))
    with pytest.raises(ConfigError, match=r"cannot be read from .*none"):
        target(head, project).check(REQUEST)
    (project / "token").write_text("right\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(project / "token"))
    target(head, project).check(REQUEST)


def test_a_driver_connects_without_a_token_to_a_cluster_that_has_none(
    head: RayHead, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mode() -> str | None:
        head.jobs.clear()
        target(head, project).submit(REQUEST)
        variables = head.jobs["glyphs-1"]["body"]["runtime_env"]["env_vars"]
        return variables.get("RAY_AUTH_MODE")

    assert mode() is None
    head.token = None  # This machine has a token all the same, such as one of its own cluster.
    assert mode() == "disabled"
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HOME", str(project))
    assert mode() == "disabled"
    assert "RAY_AUTH_MODE=disabled ray job submit" in target(head, project).render(REQUEST)


@pytest.mark.parametrize("listens", [False, True])
def test_nothing_answers(listens: bool, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_http, "_TIMEOUT_SECONDS", 0.2)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(RunError, match=f"no Ray cluster answers at {address}"):
            RayTarget(RayTargetConfig(address=address), project).check(REQUEST)


def test_something_else_answers(head: RayHead, project: Path) -> None:
    sender = RayTarget(RayTargetConfig(address=head.url), project)
    sender._head.address += "/elsewhere"
    with pytest.raises(RunError, match="not as the dashboard of a Ray cluster"):
        sender.check(REQUEST)


# ---------------------------------------------------------------- state and log


@pytest.mark.parametrize(
    ("answer", "state", "code"),
    [
        ({"status": "PENDING"}, "queued", None),
        ({"status": "RUNNING"}, "running", None),
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, "succeeded", 0),
        ({"status": "FAILED", "driver_exit_code": 2}, "failed", 2),
        ({"status": "STOPPED", "driver_exit_code": None}, "stopped", None),
    ],
)
def test_states(answer: Any, state: str, code: int | None, head: RayHead, project: Path) -> None:
    head.jobs["a-1"] = {"message": "why, last available logs (truncated):\nlog", **answer}
    status = target(head, project).status("a-1")
    assert (status.state, status.exit_code) == (state, code)
    assert status.detail == f"{answer['status']}: why"


def test_a_job_that_the_cluster_does_not_know_is_lost(head: RayHead, project: Path) -> None:
    assert target(head, project).status("b-1").state == "lost"
    for follow in (False, True):
        with pytest.raises(ConfigError, match="does not know the job b-1, nor its log"):
            list(target(head, project).logs("b-1", follow=follow))


@pytest.mark.parametrize("streams", [[10, 0, 25, 61], [None], [5, None], [1000]])
def test_a_log_is_followed_over_streams_that_end_early(
    streams: Any, head: RayHead, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_http, "_SECONDS_OF_SILENCE", 0.05)
    head.log = "".join(f"line {number} é\n" for number in range(20))
    head.streams = streams
    head.jobs["a-1"] = {"status": "RUNNING"}
    assert "".join(target(head, project).logs("a-1", follow=True)) == head.log
    assert head.streams == []


def test_following_survives_a_head_that_does_not_answer_for_a_while(
    head: RayHead, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.log, head.streams, head.jobs["a-1"] = "text", [2], {"status": "RUNNING"}
    follower = target(head, project)
    call, failures = follower._head.call, [True, False, True, True]

    def flaky(*arguments: Any, **options: Any) -> Any:
        if failures and failures.pop(0):
            raise RunError("no answer")
        return call(*arguments, **options)

    monkeypatch.setattr(follower._head, "call", flaky)
    assert "".join(follower.logs("a-1", follow=True)) == "text"
    monkeypatch.setattr(ray_jobs, "_SECONDS_WITHOUT_AN_ANSWER", 0.05)
    failures += [True] * 1000
    with pytest.raises(RunError, match="no answer"):
        list(follower.logs("a-1", follow=True))


def test_a_short_failure_after_a_long_stream_is_no_end(
    head: RayHead, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head.log, head.jobs["a-1"] = "ab", {"status": "RUNNING"}
    follower = target(head, project)

    def stream(job: str, has_ended: Any) -> Iterator[str]:
        for text in head.log:
            time.sleep(0.1)
            yield text
        head.jobs["a-1"] = {"status": "SUCCEEDED"}
        raise RunError("no answer")

    monkeypatch.setattr(follower._head, "stream_log", stream)
    monkeypatch.setattr(ray_jobs, "_SECONDS_WITHOUT_AN_ANSWER", 0.15)
    assert "".join(follower.logs("a-1", follow=True)) == "ab"


@pytest.mark.parametrize(
    ("status", "words", "asked"),
    [
        ("PENDING", "still queued", True),
        ("RUNNING", "a training saves a checkpoint first, for at most 300 s", True),
        ("SUCCEEDED", "ended already", False),
    ],
)
def test_stop(status: str, words: str, asked: bool, head: RayHead, project: Path) -> None:
    head.jobs["a-1"] = {"status": status}
    assert words in target(head, project).stop("a-1")
    assert (("POST", "/api/jobs/a-1/stop") in head.requests) == asked
    assert "DELETE" not in [method for method, _ in head.requests]
