"""Jobs on a real SLURM cluster of two nodes: trained, queued again, cancelled, refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from dml_dist.errors import RunError
from dml_dist.jobs.slurm import SlurmTarget, SlurmTargetConfig
from dml_dist.jobs.target import FINISHED, JobRequest, JobStatus
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.records import read_records
from tests.faults.forked import command, forked
from tests.faults.runs import ENVIRONMENT, act, attempts, evaluations, wait_for, weights
from tests.slurm import KILL_WAIT_SECONDS, slurm_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE = 300.0
MINUTES = 30


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Path]:
    with slurm_cluster() as folder:
        yield folder


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SlurmTarget:
    """A target whose jobs begin in a folder with white space."""
    folder = tmp_path / "my runs 100%"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", ENVIRONMENT["PYTHONPATH"])
    return SlurmTarget(SlurmTargetConfig(nodes=2, time=str(MINUTES)))


def request(config_file: Path, name: str = "small-1") -> JobRequest:
    """Two ranks of a CPU each; the run's folder is runs/small."""
    run_dir = Path("runs/small").absolute()
    ray = ("--launcher", "ray", "--workers", "2", "--run-dir", str(run_dir))
    arguments = ("train", str(config_file), *ray)
    return JobRequest(name, arguments, run_dir, 2, 2, 1.0, uses_gpu=False)


def output(target: SlurmTarget, job: str) -> str:
    return "".join(target.logs(job, follow=False))


def until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait for a condition without keeping a core busy with questions."""
    wait_for(lambda: condition() or time.sleep(0.3), seconds=seconds, what=what)


def ended(target: SlurmTarget, job: str) -> JobStatus:
    """Wait for the end of a job; nothing of it may be left."""

    until(lambda: target.status(job).state in FINISHED, f"the end of the job {job}")
    until(lambda: not processes_of(job), "the end of its processes", seconds=5)
    assert list(Path("/tmp").glob(f"dml-{job}-*")) == []
    assert [
        path.name for path in Path(target.config.log_dir).iterdir() if path.name[0] == "."
    ] == []
    return target.status(job)


def processes_of(job: str) -> list[str]:
    """Return the command lines of all processes that belong to a job of this cluster."""
    mine = {f"SLURM_JOB_ID={job}", f"SLURM_CONF={os.environ['SLURM_CONF']}"}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mine <= set((process / "environ").read_text().split("\0")):
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except (OSError, UnicodeDecodeError):
            continue
    return found


def steps(run_dir: Path) -> int:
    """Return the last recorded step."""
    path = RunFolder(run_dir).records("steps")
    records = list(read_records(path)) if path.is_file() else []
    return records[-1]["step"] if records else 0


def dml_dist(*arguments: object) -> tuple[int, str]:
    """Run a command and return its exit code and output."""
    words = [sys.executable, "-m", "dml_dist", *map(str, arguments)]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=PATIENCE
    )
    return done.returncode, done.stdout


def test_two_nodes_train(config_file: Path, target: SlurmTarget) -> None:
    """Submitted, followed and asked for as a user does."""
    start = time.monotonic()
    settings = ("--set", "nodes=2", "--set", f"time='{MINUTES}'")
    code, text = dml_dist("submit", "--to", "slurm", *settings, "--", "train", config_file,
                          "--workers", 2, "--set", "name=nodes")  # fmt: skip
    print(f"\ntwo nodes of SLURM: {time.monotonic() - start:.0f} s")
    assert code == 0, text
    run_dir = Path("runs/nodes").absolute()
    assert f"results: {run_dir}" in text
    (attempt,) = attempts(run_dir)
    assert (attempt["world_size"], attempt["launcher"]) == (2, "ray")
    code, text = dml_dist("job", "status", "nodes-1")
    assert code == 0, text
    assert "succeeded" in text
    job = re.findall(r"slurm, as (\d+)", text)[0]
    assert ended(target, job) == JobStatus("succeeded", "COMPLETED", 0)
    assert "nodes-1" in dml_dist("job", "list")[1]
    assert f"results: {run_dir}" in dml_dist("job", "logs", "nodes-1")[1]
    code, text = dml_dist("job", "stop", "nodes-1")
    assert f"The job {job} has already ended: COMPLETED." in text


def test_queued_again_twice(config_file: Path, target: SlurmTarget, tmp_path: Path) -> None:
    """Once at its time limit and once by a job of a higher priority; the weights are the same."""
    # SLURM looks at time limits every 30 s.
    wanted = request(act(config_file, pause=0.4))
    job = target.submit(wanted)
    until(lambda: steps(wanted.run_dir) >= 3, "step 3")
    start = time.monotonic()
    # Less than `seconds_before_end` are left: SLURM sends its signal now.
    subprocess.run(["scontrol", "update", f"jobid={job}", "timelimit=4"], check=True)
    until(lambda: target.status(job).state == "queued", "the requeue")
    subprocess.run(["scontrol", "update", f"jobid={job}", f"timelimit={MINUTES}"], check=True)
    until(lambda: len(attempts(wanted.run_dir)) == 2, "the resumption")
    print(f"\ntraining again after the time limit: {time.monotonic() - start:.0f} s")
    until(lambda: steps(wanted.run_dir) >= 9, "step 9")
    start = time.monotonic()
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null")
    subprocess.run(["sbatch", *urgent, "--wrap=true"], check=True, capture_output=True)
    until(lambda: len(attempts(wanted.run_dir)) == 3, "the resumption")
    print(f"training again after a preemption: {time.monotonic() - start:.0f} s")
    assert ended(target, job) == JobStatus("succeeded", "COMPLETED", 0)
    said = output(target, job)
    assert "SLURM ends the job (its time limit is near)" in said
    assert "SLURM ends the job (it is preempted)" in said
    assert said.count("the job is queued again") == 2
    assert said.count("with a checkpoint (SIGINT)") == 2, said
    done = forked(
        *(command, "train", str(config_file), "--run-dir", "whole"), folder=tmp_path, world_size=2
    )
    assert not any(done.codes), done.output
    one, two = weights(wanted.run_dir), weights(tmp_path / "whole")
    assert one.keys() == two.keys()
    assert [name for name in two if not torch.equal(one[name], two[name])] == []
    assert evaluations(wanted.run_dir) == evaluations(tmp_path / "whole")


def test_stopped_with_a_checkpoint(config_file: Path, target: SlurmTarget) -> None:
    wanted = request(act(config_file, pause=0.15))
    job = target.submit(wanted)
    until(lambda: steps(wanted.run_dir) >= 6, "step 6")
    assert f"its ranks have {KILL_WAIT_SECONDS} s" in target.stop(job)
    status = ended(target, job)
    assert (status.state, status.exit_code) == ("stopped", None)
    folder = RunFolder(wanted.run_dir)
    stopped = folder.info().status
    assert stopped.state == "stopped"
    # Checkpoints are due at steps 4, 8 and 12.
    assert stopped.step == folder.last_checkpoint_step() in (6, 7, 9), output(target, job)
    assert "queued again" not in output(target, job)


def test_a_job_that_fails_at_its_start(target: SlurmTarget) -> None:
    job = target.submit(request(Path("missing.yaml")))
    status = ended(target, job)
    assert (status.state, status.exit_code) == ("failed", 2)
    assert "missing.yaml" in output(target, job)


def test_what_slurm_refuses(config_file: Path, target: SlurmTarget) -> None:
    wanted = request(config_file)
    changes = {
        "Invalid partition name specified": {"partition": "nope"},
        "Requested node configuration is not available": {"nodes": 3},
        "Invalid feature specification": {"constraint": "nope"},
        "above the limit of the partition batch": {"time": "2-00:00:00"},
    }
    for message, change in changes.items():
        config = SlurmTargetConfig.model_validate({**target.config.model_dump(), **change})
        with pytest.raises(Exception, match=message):
            SlurmTarget(config).check(wanted)
    wrong = SlurmTarget(target.config.model_copy(update={"partition": "nope"}))
    with pytest.raises(RunError, match=r"Invalid partition name specified.*partition: nope"):
        wrong.submit(wanted)
    assert target.status("999999").state == "lost"
    with pytest.raises(RunError, match="does not know the job 999999"):
        target.stop("999999")


def test_a_queued_job_is_removed(config_file: Path, target: SlurmTarget) -> None:
    busy = ("--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 60", "--parsable")
    other = subprocess.run(["sbatch", *busy], check=True, capture_output=True, text=True)
    job = target.submit(request(config_file))
    assert target.status(job).state == "queued"
    with pytest.raises(RunError, match="has no output yet"):
        output(target, job)
    assert target.stop(job) == (f"The job {job} was still queued and has been removed.")
    assert target.status(job).state == "stopped"
    subprocess.run(["scancel", other.stdout.strip()], check=True)
