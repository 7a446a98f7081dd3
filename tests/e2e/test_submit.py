"""`dml-dist submit` and `dml-dist job` on the command line, with a stand-in for a Ray head."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.ray_head import RayHead, ray_head

Cli = Callable[..., tuple[int, str]]


@pytest.fixture
def head(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayHead]:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "right")
    with ray_head() as head:
        settings = f"target: ray\naddress: {head.url}\n"
        config_file.with_name("head.yaml").write_text(settings)
        yield head


TO = ("submit", "--to", "head.yaml")


def test_a_job_from_submission_to_its_end(head: RayHead, cli: Cli, tmp_path: Path) -> None:
    code, output = cli(*TO, "--detach", "--", "train", "small.yaml", "--workers", 2)
    assert code == 0, output
    assert "total steps" in output  # The plan.
    assert output.strip().splitlines()[-2:] == [
        "follow: dml-dist job logs small-1 --follow",
        "stop:   dml-dist job stop small-1",
    ]
    sent = head.jobs["small-1"]["body"]["entrypoint"]
    assert f"--set launch.address=auto --run-dir {tmp_path}/runs/small" in sent

    code, output = cli("job", "list")
    assert (code, "queued" in output) == (0, True)
    assert "still queued" in cli("job", "stop", "small-1")[1]
    head.jobs["small-1"] |= {"status": "FAILED", "message": "exit 2", "driver_exit_code": 2}
    head.log = "error: no such thing\n"
    code, output = cli("job", "status", "small-1")
    assert code == 0
    assert output.endswith("end of the log:\nerror: no such thing\n")
    assert cli("job", "logs", "small-1") == (0, head.log)
    assert cli("job", "logs", "small-1", "--follow") == (2, f"{head.log}small-1 failed\n")

    # Its state is known from now on, whatever becomes of the cluster; the next job is number 2.
    head.jobs.clear()
    assert "failed" in cli("job", "list")[1]
    cli(*TO, "--detach", "--", "train", "small.yaml", "--run-dir", "other")
    assert list(head.jobs) == ["small-2"]
    code, output = cli("job", "status", "small-3")
    assert code == 2
    assert "did you mean small-2? Jobs in" in output


def test_rendering_sends_nothing(head: RayHead, cli: Cli, tmp_path: Path) -> None:
    code, output = cli(*TO, "--render", "--", "train", "small.yaml")
    assert code == 0
    assert "--submission-id small-1" in output
    assert head.requests == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("train", "small.yaml", "--no-such"), "No such option: --no-such"),
        (("train", "smal.yaml"), "smal.yaml does not exist"),
        (("train", "small.yaml", "--set", "optim.lrr=1"), "did you mean optim.lr"),
        (("train", "small.yaml", "--set", "train.global_batch_size=900"), "900"),
        (("train", "small.yaml", "--workers", "5"), "5 ranks with 1 CPUs each do not fit"),
        (("train", "small.yaml", "--run-dir", "taken"), "is not empty and holds no run"),
        (("train", "small.yaml", "--launcher", "torchrun"), "leave it out"),
        (("quickstart",), "quickstart cannot be submitted; give one of train, tune"),
    ],
)
def test_a_wrong_request_is_never_sent(
    words: tuple[str, ...], said: str, head: RayHead, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").touch()
    code, output = cli(*TO, "--", *words)
    assert code == 2, output
    assert said in output
    assert (head.jobs, head.packages) == ({}, {})
    assert not (tmp_path / "runs").exists()


def test_a_plan_without_data_is_not_checked(head: RayHead, cli: Cli) -> None:
    elsewhere = ("--set", "data.path=/nowhere")
    code, output = cli(*TO, "--detach", "--", "train", "small.yaml", *elsewhere)
    assert code == 0, output
    assert "the plan could not be checked here: data.path /nowhere has no index" in output
    assert "small-1" in head.jobs


def test_a_target_that_does_not_answer_is_asked_once(
    head: RayHead, cli: Cli, tmp_path: Path
) -> None:
    for _ in range(2):
        cli(*TO, "--detach", "--", "train", "small.yaml")
    for path in (tmp_path / "runs/.jobs").glob("*.json"):
        record = json.loads(path.read_text())
        record["target"]["address"] = "http://127.0.0.1:1"
        path.write_text(json.dumps(record))
    code, output = cli("job", "list")
    assert code == 0
    assert output.count("no Ray cluster answers") == 1
    assert output.count("unknown") == 2
    assert cli("job", "status", "small-1")[0] == 1
