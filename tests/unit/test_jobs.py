"""Jobs apart from their target: commands, records, settings, following and exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dml_dist.errors import ConfigError, RunError, RunStopped
from dml_dist.jobs import follow as following
from dml_dist.jobs.build_target import build_target, load_target
from dml_dist.jobs.follow import follow, job_of, status_of
from dml_dist.jobs.ray_jobs import RayTargetConfig
from dml_dist.jobs.records import JobRecord, JobRecords
from dml_dist.jobs.submit import data_is_here, name_of, read_command, request_of, send
from dml_dist.jobs.target import JobRequest, JobStatus
from tests.e2e.conftest import REPOSITORY, write_config

REQUEST = JobRequest(
    id="small-1",
    arguments=("train", "small.yaml"),
    run_dir=Path("/shared/small"),
    min_workers=2,
    max_workers=4,
    cpus_per_rank=1.5,
    uses_gpu=True,
)
SETTINGS = {"target": "ray", "address": "http://head:8265"}

# ---------------------------------------------------------------- commands


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with the configurations of a run, a search and a comparison."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("tune_glyphs", "compare_omniglot"):
        shutil.copy(REPOSITORY / "configs" / f"{name}.yaml", tmp_path / "configs")
    write_config(Path("data/small"), tmp_path)
    return tmp_path


def request(name: str, *words: str, **values: Any) -> JobRequest:
    options = {"changes": None, "workers": None, "launcher": None, "run_dir": None, "resume": False}
    command = read_command(name, words, {**options, "config": words[0], **values})
    return request_of(command, f"{name_of(command)}-1")


def test_a_training_gets_absolute_folders_and_the_cluster(folder: Path) -> None:
    made = request("train", "small.yaml", "--workers", "2", workers=2)
    assert made.id == "small-1"
    assert made.run_dir == folder / "runs/small"
    assert made.arguments == (
        *("train", "small.yaml", "--workers", "2", "--launcher", "ray"),
        *("--set", "launch.address=auto", "--run-dir", str(folder / "runs/small")),
        *("--set", f'data.path="{folder}/data/small"'),
    )
    assert (made.min_workers, made.max_workers) == (2, 2)


def test_an_elastic_training_starts_with_its_fewest_ranks(folder: Path) -> None:
    elastic = ["launch.num_workers=4", "launch.min_workers=2"]
    made = request("train", "small.yaml", changes=elastic)
    assert (made.min_workers, made.max_workers) == (2, 4)


def test_an_absolute_run_folder_and_remote_data_stay_as_they_are(folder: Path) -> None:
    words = ("small.yaml", "--run-dir", "/shared/x", "--set", "data.path=s3://bucket/x")
    made = request("train", *words, run_dir="/shared/x", changes=["data.path=s3://bucket/x"])
    assert made.run_dir == Path("/shared/x")
    added = made.arguments[1 + len(words) :]
    assert added == ("--launcher", "ray", "--set", "launch.address=auto")


def test_a_configuration_is_named_from_the_current_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ("./small.yaml", f"{folder}/small.yaml", "configs/../small.yaml"):
        assert request("train", given).arguments[1] == "small.yaml"
    monkeypatch.chdir(folder / "configs")
    assert request("train", "../small.yaml").arguments[1] == str(folder / "small.yaml")


def test_ray_places_the_trials_of_a_search(folder: Path) -> None:
    made = request("tune", "configs/tune_glyphs.yaml", "--parallel", "3", parallel=3)
    assert "--launcher" not in made.arguments
    assert "launch.address=auto" in made.arguments
    assert (made.min_workers, made.max_workers) == (1, 3)
    words = ("configs/tune_glyphs.yaml", "--launcher", "ray", "--workers", "2")
    made = request("tune", *words, launcher="ray", workers=2, parallel=3)
    assert (made.min_workers, made.max_workers) == (2, 6)


def test_parallel_runs_of_a_comparison_have_one_rank_each(folder: Path) -> None:
    made = request("compare", "configs/compare_omniglot.yaml", parallel=2, workers=2)
    assert "--launcher" not in made.arguments
    assert (made.min_workers, made.max_workers) == (1, 2)
    made = request("compare", "configs/compare_omniglot.yaml", parallel=1, workers=2)
    assert "--launcher" in made.arguments
    assert (made.min_workers, made.max_workers) == (2, 2)


def test_a_run_to_evaluate_may_be_elsewhere(folder: Path) -> None:
    command = read_command(
        *("evaluate", ("runs/x", "--split", "test")),
        {"run": "runs/x", "changes": None, "workers": 2, "launcher": None},
    )
    made = request_of(command, "x-1")
    assert made.arguments[:2] == ("evaluate", str(folder / "runs/x"))
    assert (name_of(command), made.min_workers, data_is_here(command)) == ("x", 2, False)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"launcher": "torchrun"}, "--launcher torchrun: on a cluster Ray starts the ranks"),
        ({"dry_run": True}, "leave --dry-run out"),
        ({"changes": ["optim.lrr=1"]}, "did you mean optim.lr"),
    ],
)
def test_refused_commands(values: Any, words: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        request("train", "small.yaml", **values)


# ---------------------------------------------------------------- settings of targets


def test_settings_by_name_by_file_and_by_option(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("target: ray\naddress: http://head:8265\n")
    config, _ = load_target(str(path), ["upload=false", "env.A=b"])
    assert config == RayTargetConfig(address="http://head:8265", upload=False, env={"A": "b"})
    assert load_target("ray")[0] == RayTargetConfig()
    assert build_target(config.model_dump(mode="json"))[0] == config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("target: ray\naddres: http://head:8265", r"addres \(line 2\): unknown key; did you mean "),
        ("target: ray\naddress: head", r"address \(line 2\): must be text"),
        ("target: slrum", "one of ray, slurm, kuberay, got 'slrum'; did you mean slurm"),
        ("address: http://head:8265", "needs the key target"),
        ("- 1", "needs the key target"),
    ],
)
def test_wrong_settings(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_target(str(path))
    assert "--explain" not in str(caught.value)  # It explains runs alone.


def test_a_word_that_is_no_target() -> None:
    with pytest.raises(ConfigError, match=r"--to kuberey is no target.*did you mean kuberay"):
        load_target("kuberey")


# ---------------------------------------------------------------- records


@pytest.fixture
def records(tmp_path: Path) -> JobRecords:
    return JobRecords(tmp_path / "runs/.jobs")


def keep(records: JobRecords, id: str) -> JobRecord:
    with records.sending(replace(REQUEST, id=id), SETTINGS) as record:
        pass
    return records.write(replace(record, job=f"{id}-there"))


def test_identifiers_count_by_name(records: JobRecords) -> None:
    assert records.next_id("small") == "small-1"
    for id in ("small-1", "small-9", "small-10", "small-x", "smaller-30", "sm.all-40"):
        keep(records, id)
    assert records.next_id("small") == "small-11"
    assert records.next_id("sm.all") == "sm.all-41"
    assert records.next_id("s") == "s-1"


def test_a_record_comes_back(records: JobRecords) -> None:
    record = keep(records, "small-1")
    assert records.read("small-1") == record
    ended = records.end(record, JobStatus("failed", "FAILED", 3))
    assert records.read("small-1") == ended
    assert ended.ended == JobStatus("failed", "FAILED", 3)


def test_a_job_that_could_not_be_sent_leaves_no_record(records: JobRecords) -> None:
    target: Any = FakeTarget(error=RunError("no answer"))
    with pytest.raises(RunError, match="no answer"):
        send(target, RayTargetConfig(), REQUEST, records, Console())
    assert records.ids() == []


def test_a_command_that_was_killed_while_sending_is_told(records: JobRecords) -> None:
    with records.sending(REQUEST, SETTINGS):
        pass
    with pytest.raises(ConfigError, match="killed before the target had answered"):
        job_of(records.read("small-1"))


def test_identifiers_are_used_once(records: JobRecords) -> None:
    keep(records, "small-1")
    with pytest.raises(ConfigError, match="there is a job small-1 already"):
        keep(records, "small-1")
    with pytest.raises(ConfigError, match=r"--id '\.\./x' must be a name"):
        records.require_new("../x")


def test_unknown_and_damaged_records(records: JobRecords, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no job x was sent from here\. Jobs in .*: none"):
        records.read("x")
    keep(records, "small-1")
    with pytest.raises(ConfigError, match=r"did you mean small-1\? Jobs in .*: small-1"):
        records.read("smal-1")
    path = tmp_path / "runs/.jobs/small-1.json"
    values = json.loads(path.read_text())
    del values["submitted"]
    path.write_text(json.dumps(values))
    with pytest.raises(Exception, match=r"small-1\.json is damaged, or of another version"):
        records.read("small-1")


# ---------------------------------------------------------------- following


class FakeTarget:
    """Gives prepared states, one at a time and then the last again, and a log."""

    def __init__(
        self,
        *states: JobStatus,
        log: tuple[str, ...] = ("a", "b\n"),
        error: RunError | None = None,
    ) -> None:
        self.states = list(states)
        self.error = error
        self.log = log
        self.asked: list[str] = []

    def submit(self, request: JobRequest) -> str:
        if self.error is not None:
            raise self.error
        return f"{request.id}-there"

    def status(self, job: str) -> JobStatus:
        self.asked.append(job)
        return self.states.pop(0) if len(self.states) > 1 else self.states[0]

    def logs(self, job: str, *, follow: bool) -> Iterator[str]:
        for text in self.log:
            if text == "ctrl-c":
                raise KeyboardInterrupt
            yield text


QUEUED, RUNNING = JobStatus("queued", "PENDING"), JobStatus("running", "RUNNING")


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    monkeypatch.setattr(following, "_SECONDS_BETWEEN_LOOKS", 0.0)
    monkeypatch.setattr(following.signal, "signal", lambda number, handler: None)
    return Console(width=200)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (JobStatus("succeeded", "", 0), 0),
        (JobStatus("failed", "", 2), 2),
        (JobStatus("failed", "", None), 1),
        (JobStatus("stopped", "", None), 1),
        (JobStatus("stopped", "", 0), 1),
        (JobStatus("lost", ""), 1),
    ],
)
def test_the_exit_code_is_that_of_the_job(
    status: JobStatus,
    code: int,
    records: JobRecords,
    console: Console,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target: Any = FakeTarget(QUEUED, QUEUED, RUNNING, status)
    record = keep(records, "small-1")
    assert follow(record, target, records, console) == code
    output = capsys.readouterr().out
    assert output.splitlines() == ["small-1 is queued: PENDING", "ab", f"small-1 {status.state}"]
    assert set(target.asked) == {"small-1-there"}
    # The state is kept: the cluster need not be asked again.
    later: Any = FakeTarget(RUNNING)
    assert status_of(records.read("small-1"), later, records) == status


def test_the_end_of_a_log_is_no_end_of_a_job(records: JobRecords, console: Console) -> None:
    target: Any = FakeTarget(RUNNING)
    assert follow(keep(records, "small-1"), target, records, console) == 1
    assert records.read("small-1").ended is None


def test_a_job_without_output_tells_why_it_failed(
    records: JobRecords, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    target: Any = FakeTarget(JobStatus("failed", "no such image"), log=())
    assert follow(keep(records, "small-1"), target, records, console) == 1
    assert "small-1 failed: no such image" in capsys.readouterr().out


def test_ctrl_c_leaves_the_job(records: JobRecords, console: Console) -> None:
    target: Any = FakeTarget(RUNNING, log=("a\n", "ctrl-c"))
    with pytest.raises(RunStopped, match="goes on in the cluster") as caught:
        follow(keep(records, "small-1"), target, records, console)
    assert "dml-dist job logs small-1 --follow" in str(caught.value)
    assert "dml-dist job stop small-1" in str(caught.value)
    assert records.read("small-1").ended is None


def test_the_record_holds_what_later_commands_need(
    records: JobRecords, console: Console, capsys: pytest.CaptureFixture[str]
) -> None:
    target: Any = FakeTarget(RUNNING)
    config = RayTargetConfig(address="http://head:8265")
    record = send(target, config, REQUEST, records, console)
    assert records.read("small-1") == record
    assert (record.job, record.request) == ("small-1-there", REQUEST)
    assert build_target(record.target)[0] == config
    assert "submitted small-1 to ray, as small-1-there" in capsys.readouterr().out
