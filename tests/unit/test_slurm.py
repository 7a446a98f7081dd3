"""The SLURM target: its script and settings, and what SLURM's commands say."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dml_dist.errors import ConfigError, RunError, TopologyError
from dml_dist.jobs import slurm
from dml_dist.jobs.slurm import SlurmTarget, SlurmTargetConfig
from dml_dist.jobs.slurm_commands import partition_limits, seconds_of, status_of
from dml_dist.jobs.slurm_script import Shape, script, shape_of
from dml_dist.jobs.target import JobRequest, JobStatus


def request(*arguments: str, run_dir: str = "/data/runs/a", **changes: Any) -> JobRequest:
    values: dict[str, Any] = {
        "id": "a-1",
        "arguments": arguments or ("train", "a.yaml"),
        "run_dir": Path(run_dir),
        "min_workers": 4,
        "max_workers": 8,
        "cpus_per_rank": 1.5,
        "uses_gpu": True,
    }
    return JobRequest(**(values | changes))


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str) -> None:
    """Put a command into PATH."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def test_the_script_asks_for_what_the_settings_say() -> None:
    config = SlurmTargetConfig(
        ranks_per_node=4,
        gpu_type="a100",
        partition="gpu",
        account="lab",
        qos="long",
        time="1-00:00:00",
        constraint="nvlink&ib",
        memory="64G",
        exclusive=True,
        extra=("--mail-type=END", "--exclude=n[1-3]"),
        setup=("module load cuda", "source 'my env/bin/activate'"),
        log_dir="/data/logs",
    )
    text = script(config, request(), Path("/home/me"))
    options = {line[8:] for line in text.splitlines() if line.startswith("#SBATCH ")}
    assert options == {
        *("--job-name=a-1", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=6"),
        *("--gpus-per-node=a100:4", "--mem=64G", "--partition=gpu", "--account=lab", "--qos=long"),
        *("--constraint=nvlink&ib", "--time=1-00:00:00", '--output="/data/logs/a-1-%j.log"'),
        *("--open-mode=append", "--signal=TERM@300", "--exclusive", "--requeue"),
        *("--mail-type=END", "--exclude=n[1-3]"),
    }
    assert text.index("module load cuda\nsource 'my env/bin/activate'\n") < text.index("srun")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def test_values_arrive_as_they_were_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bash runs the script with an srun that keeps its folder and its arguments."""
    cwd = tmp_path / 'it\'s $HOME `x` "q" 50%'
    cwd.mkdir()
    fake(tmp_path, monkeypatch, "srun", 'printf "%s\\0" "$PWD" "$@" > "$OUT"')
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    arguments = ("train", "my 'run'.yaml", "--set", 'name="a b"; rm -rf $HOME', "--set", "*")
    config = SlurmTargetConfig(log_dir=str(tmp_path / "my logs 50%"), python="/opt/my py/python")
    text = script(config, request(*arguments, run_dir=f"{cwd}/run"), cwd)
    subprocess.run(["bash"], input=text, text=True, check=True)
    found = (tmp_path / "out").read_text().split("\0")[:-1]
    assert found[0] == str(cwd)
    at = found.index("/opt/my py/python")
    assert found[at + 1 : at + 3] == ["-m", "dml_dist.jobs.slurm_node"]
    assert f"--log-dir={tmp_path}/my logs 50%" in found
    assert f"--run-dir={cwd}/run" in found
    assert tuple(found[found.index("--") + 1 :]) == arguments
    # sbatch writes a single % for two.
    assert f'--output="{tmp_path}/my logs 50%%/a-1-%j.log"' in text


@pytest.mark.parametrize(
    "values",
    [
        {"partition": "gpu\n#SBATCH --account=other"},
        {"account": "a b"},
        {"extra": ("--mail-type=END\nrm -rf /",)},
        {"extra": ("mail-type=END",)},
        {"setup": ("module load cuda\nrm",)},
        {"python": "python\n"},
        {"time": "tomorrow"},
        {"time": "6"},  # Not more than `seconds_before_end`.
        {"time": "12:00:00\n"},
        {"memory": "64 GB"},
        {"log_dir": '/logs/"a'},
        {"log_dir": "/logs\n/a"},
        {"seconds_before_end": 10},
        {"partitions": "gpu"},
    ],
)
def test_wrong_settings_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SlurmTargetConfig(**values)


def test_the_log_folder_does_not_depend_on_a_later_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = SlurmTargetConfig().model_dump_json()
    monkeypatch.chdir("/")
    assert SlurmTargetConfig.model_validate_json(kept).log_dir == str(tmp_path / "runs/slurm")


@pytest.mark.parametrize(
    ("config", "changes", "shape"),
    [
        ({}, {}, Shape(1, 12, 8)),
        ({"nodes": 3}, {}, Shape(3, 5, 3)),
        ({"ranks_per_node": 3}, {}, Shape(3, 5, 3)),
        ({"nodes": 2, "cpus_per_node": 32}, {"uses_gpu": False}, Shape(2, 32, 0)),
        ({"nodes": 4, "ranks_per_node": 4}, {}, Shape(4, 6, 4)),
    ],
)
def test_the_shape_of_a_job(config: dict[str, Any], changes: dict[str, Any], shape: Shape) -> None:
    assert shape_of(SlurmTargetConfig(**config), request(**changes)) == shape


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TopologyError, match="8 ranks do not fit 2 nodes with 3 ranks each"):
        shape_of(SlurmTargetConfig(nodes=2, ranks_per_node=3), request())
    with pytest.raises(TopologyError, match=r"cpus_per_node: 4 .*raise it to 6"):
        shape_of(SlurmTargetConfig(nodes=2, cpus_per_node=4), request())


# ---------------------------------------------------------------- SLURM's commands

INFO = """JobId=7 JobName=a-1
   JobState={state} Reason={reason} Dependency=(null)
   Requeue=1 Restarts=0 BatchFlag=1 Reboot=0 ExitCode={code}
   RunTime=00:00:12 TimeLimit=00:30:00 TimeMin=N/A
   StdIn=/dev/null
   StdOut={path}
   Power=
"""


def info(state: str, *, reason: str = "None", code: str = "0:0", path: object = "/x") -> str:
    return INFO.format(state=state, reason=reason, code=code, path=path)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        (info("PENDING", reason="Resources"), JobStatus("queued", "PENDING (Resources)")),
        (info("REQUEUE_HOLD"), JobStatus("queued", "REQUEUE_HOLD")),
        (info("RUNNING"), JobStatus("running", "RUNNING")),
        (info("COMPLETING"), JobStatus("running", "COMPLETING")),
        (info("COMPLETED"), JobStatus("succeeded", "COMPLETED", 0)),
        (
            info("FAILED", reason="NonZeroExitCode", code="2:0"),
            JobStatus("failed", "FAILED (NonZeroExitCode)", 2),
        ),
        (info("FAILED", code="0:9"), JobStatus("failed", "FAILED", 137)),
        (info("TIMEOUT", code="0:15"), JobStatus("failed", "TIMEOUT", 143)),
        (info("CANCELLED", code="0:15"), JobStatus("stopped", "CANCELLED")),
        (info("NODE_FAIL", code="1:0"), JobStatus("failed", "NODE_FAIL", 1)),
    ],
)
def test_states(text: str, status: JobStatus) -> None:
    assert status_of(text) == status


def test_old_jobs_are_looked_up_in_the_accounting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(tmp_path, monkeypatch, "scontrol", "echo 'error: Invalid job id specified' >&2; exit 1")
    fake(tmp_path, monkeypatch, "sacct", "echo 'CANCELLED by 1000|0:15'")
    target = SlurmTarget(SlurmTargetConfig())
    assert target.status("7") == JobStatus("stopped", "CANCELLED by 1000")
    fake(tmp_path, monkeypatch, "sacct", "echo 'accounting storage is disabled' >&2; exit 1")
    assert target.status("7").state == "lost"
    with pytest.raises(RunError, match="does not know the job 7"):
        target.stop("7")


def test_failures_of_sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    target = SlurmTarget(SlurmTargetConfig(partition="nope"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="sbatch was not found on this machine"):
        target.submit(request())
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    fake(tmp_path, monkeypatch, "sbatch", "echo 'sbatch: error: no such thing' >&2; exit 1")
    with pytest.raises(RunError, match=r"job a-1: sbatch failed: no such thing.*partition: nope"):
        target.submit(request())
    # A full queue: sbatch tries again for minutes.
    busy = "sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying."
    fake(tmp_path, monkeypatch, "sbatch", f"echo '{busy}' >&2; exec sleep 20")
    monkeypatch.setattr(slurm, "_SECONDS_OF_SBATCH", 0.3)
    with pytest.raises(RunError, match=r"no answer within 0.3 s: Slurm temporarily unable"):
        target.submit(request())


def test_a_submitted_script_is_the_rendered_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fake(tmp_path, monkeypatch, "sbatch", f"cat > {shlex.quote(str(tmp_path))}/sent; echo '12;c1'")
    target = SlurmTarget(SlurmTargetConfig())
    assert target.submit(request()) == "12"
    assert (tmp_path / "sent").read_text() == target.render(request())
    assert (tmp_path / "runs/slurm").is_dir()


def test_logs_are_followed_to_the_end_of_the_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, state = tmp_path / "my 50% log", "RUNNING"
    shown = str(log).replace("%", "%%")  # As scontrol shows it.
    monkeypatch.setattr(slurm, "job_info", lambda job: info(state, path=shown))
    monkeypatch.setattr(slurm, "_SECONDS_BETWEEN_READS", 0.01)
    monkeypatch.setattr(slurm, "_SECONDS_BETWEEN_STATES", 0.0)
    target = SlurmTarget(SlurmTargetConfig())
    log.write_text("one\nhal")
    pieces = target.logs("7", follow=True)
    assert next(pieces) == "one\n"
    log.write_text("one\nhalf\nthr")
    assert next(pieces) == "half\n"
    state = "COMPLETED"
    log.write_text("one\nhalf\nthree")
    assert list(pieces) == ["three"]
    assert list(target.logs("7", follow=False)) == ["one\nhalf\nthree"]


def test_time_limits_of_partitions() -> None:
    texts = ["30", "30:30", "1:00:00", "1-0", "2-01:30:00", "infinite"]
    assert [seconds_of(text) for text in texts] == [1800, 1830, 3600, 86400, 178200, float("inf")]
    rows = "batch*|1:00:00\nurgent|30:00\nlong|infinite\n"
    assert partition_limits(rows, None) == {"batch": 3600}
    assert partition_limits(rows, "urgent,batch") == {"batch": 3600, "urgent": 1800}
