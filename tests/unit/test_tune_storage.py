"""Optuna's storage of a search: its kind, its study, changes of ranges, starting points."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from dml_dist.config.schema import RunConfig
from dml_dist.errors import ConfigError, DataError
from dml_dist.runs.tuning import TuningFolder, tune_section
from dml_dist.studies import storage_files
from dml_dist.studies.storage import (
    check_tuning,
    load_study,
    open_trials,
    trials_left,
)
from dml_dist.studies.storage_files import choose_storage, mounted_type, open_storage
from dml_dist.studies.trials import Trials
from tests.tuning import LR, add, begin, configuration


@pytest.fixture
def folder(tmp_path: Path) -> TuningFolder:
    return TuningFolder(tmp_path / "study")


# ---------------------------------------------------------------- the file


MOUNTS = [
    "overlay / overlay rw,relatime 0 0",
    "server:/data /home/data nfs4 rw,vers=4.2 0 0",
    "/dev/sda1 /home ext4 rw 0 0",
    r"lustre /mnt/two\040words\134 lustre rw 0 0",
    "/dev/sdb1 /mnt/over ext4 rw 0 0",
    "//server/share /mnt/over cifs rw 0 0",
]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/tmp/study", "overlay"),
        ("/home/me/study", "ext4"),
        ("/home/data", "nfs4"),
        ("/home/data/runs/study", "nfs4"),
        ("/home/data2/study", "ext4"),
        ("/mnt/two words\\/study", "lustre"),
        ("/mnt/over/study", "cifs"),
    ],
)
def test_the_longest_mount_point_counts(path: str, expected: str) -> None:
    assert mounted_type(Path(path), MOUNTS) == expected
    assert mounted_type(Path(path), MOUNTS[2:3]) == ("ext4" if "/home/" in path else None)


@pytest.mark.parametrize(
    ("type_", "name", "reason"),
    [
        ("ext4", "optuna.db", "on a local disk (ext4)"),
        *(
            (shared, "optuna.journal", f"since {shared} may be shared between machines")
            for shared in ("nfs4", "cifs", "lustre", "fuse.sshfs", "9p", "new_one")
        ),
        (None, "optuna.journal", "since the file system is not known"),
    ],
)
def test_auto_chooses_by_the_file_system(
    folder: TuningFolder,
    monkeypatch: pytest.MonkeyPatch,
    type_: str | None,
    name: str,
    reason: str,
) -> None:
    monkeypatch.setattr(storage_files, "file_system", lambda path: type_)
    assert choose_storage(folder, "auto") == (folder.path / name, f"storage: {name}, {reason}")
    assert not folder.path.exists()


def test_without_mounts_the_file_system_is_not_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert storage_files.file_system(tmp_path) is not None
    monkeypatch.setattr(storage_files, "_MOUNTS", tmp_path / "none")
    assert storage_files.file_system(tmp_path) is None


def test_an_existing_file_decides(folder: TuningFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(configuration(), folder)
    monkeypatch.setattr(storage_files, "file_system", lambda path: "ext4")
    path, reason = choose_storage(folder, "auto")
    assert (path, reason) == (folder.journal_path, "storage: optuna.journal, which is there")
    assert check_tuning(configuration(storage="auto"), folder) == []
    with pytest.raises(ConfigError, match=r"is sqlite, but .* in optuna.journal; set .* journal"):
        check_tuning(configuration(storage="sqlite"), folder)
    folder.sqlite_path.touch()
    with pytest.raises(ConfigError, match="holds two storages"):
        check_tuning(configuration(), folder)


@pytest.mark.parametrize("kind", ["sqlite", "journal"])
def test_folders_of_any_name(tmp_path: Path, kind: str) -> None:
    """Names that mean something in a URL, in Optuna's URL templates, or in SQLite's URIs."""
    folder = TuningFolder(tmp_path / "two words 50% #1? {x} é")
    trials, _ = begin(configuration(storage=kind), folder)
    number = add(trials, 0.5, lr=0.01)
    study = load_study(folder)
    assert study.study_name == "demo"
    assert study.trials[number].params == {"optim.lr": 0.01}
    assert {path.name for path in folder.path.iterdir()} == {
        "tune.yaml",
        {"sqlite": "optuna.db", "journal": "optuna.journal"}[kind],
    }
    assert {path.name for path in tmp_path.iterdir()} == {folder.path.name}


def test_optunas_own_tools_open_sqlite(folder: TuningFolder) -> None:
    """As optuna-dashboard does, by URL."""
    trials, _ = begin(configuration(storage="sqlite"), folder)
    add(trials, 0.5)
    url = f"sqlite:///{folder.sqlite_path}"
    assert optuna.get_all_study_names(url) == ["demo"]
    assert len(optuna.load_study(study_name="demo", storage=url).trials) == 1


def _garbage(path: Path) -> None:
    path.write_bytes(b"no storage at all\n" * 100)


def _foreign_line(path: Path) -> None:
    path.write_bytes(b'{"step": 1}\n')


def _foreign_text(path: Path) -> None:
    path.write_bytes(b"notes")


def _lost_first_line(path: Path) -> None:
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])


def _damaged_middle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    half = len(data) // 2
    data[half : half + 20] = b"\xff" * 20
    path.write_bytes(data)


def _lost_end(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _foreign_table(path: Path) -> None:
    path.unlink()
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE notes (text TEXT)")
    connection.close()


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *(("sqlite", one) for one in (_garbage, _lost_end, _foreign_table)),
        *(
            ("journal", one)
            for one in (_garbage, _foreign_line, _foreign_text, _lost_first_line, _damaged_middle)
        ),
    ],
)
def test_damaged_and_foreign_storages_are_refused_and_kept(
    folder: TuningFolder, kind: str, damage: Callable[[Path], None]
) -> None:
    config = configuration(storage=kind)
    trials, _ = begin(config, folder)
    add(trials, 0.5)
    path = {"sqlite": folder.sqlite_path, "journal": folder.journal_path}[kind]
    damage(path)
    data = path.read_bytes()
    with pytest.raises(DataError, match=r"as Optuna's storage .*; restore it") as error:
        open_trials(config, folder, 20)
    assert str(path) in str(error.value)
    assert path.read_bytes() == data


def test_a_line_that_was_cut_by_a_kill_is_removed(folder: TuningFolder) -> None:
    """Otherwise Optuna joins the next line to it, and the journal is never read again."""
    config = configuration()
    trials, _ = begin(config, folder)
    add(trials, 0.5)
    data = folder.journal_path.read_bytes()
    folder.journal_path.write_bytes(data + b'{"op_code":4,"worker_id":"x')
    assert len(load_study(folder).trials) == 1  # Readers leave it: it may be being written.
    assert folder.journal_path.read_bytes() != data
    trials, _ = open_trials(config, folder, 20)
    assert b'"worker_id":"x' not in folder.journal_path.read_bytes()
    assert folder.journal_path.read_bytes().startswith(data)
    add(trials, 0.6)
    assert [trial.value for trial in load_study(folder).trials] == [0.5, 0.6]


def test_there_is_nothing_to_load(folder: TuningFolder) -> None:
    with pytest.raises(ConfigError, match="holds no trials"):
        load_study(folder)
    assert not folder.path.exists()
    folder.path.mkdir()
    open_storage(folder, "journal")
    with pytest.raises(ConfigError, match="holds no trials"):
        load_study(folder)


# ---------------------------------------------------------------- the folder


def test_a_search_begins_in_an_empty_folder_alone(folder: TuningFolder) -> None:
    config = configuration()
    assert check_tuning(config, folder) == []
    assert not folder.path.exists()
    folder.path.mkdir()
    (folder.path / ".lock").touch()
    assert check_tuning(config, folder) == []
    (folder.path / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"not empty and holds no tune.yaml.*another --run-dir"):
        check_tuning(config, folder)


def test_only_ranges_and_free_fields_change(folder: TuningFolder) -> None:
    scale = {"type": "int", "low": 1, "high": 9, "step": 2}
    choice = {"type": "categorical", "choices": ["adamw", "sgd"]}
    space = {"optim.lr": LR, "train.global_batch_size": scale, "optim.name": choice}
    begin(configuration(space=space), folder)
    same = configuration("launch.launcher=inprocess", space=space, trials=99, parallel=3)
    assert check_tuning(same, folder) == []
    wider = {
        **space,
        "optim.lr": {**LR, "high": 1.0},
        "train.global_batch_size": {**scale, "low": 3},
    }
    assert check_tuning(configuration(space=wider), folder) == [
        "optim.lr: 0.0001 to 0.1 (log) -> 0.0001 to 1 (log)",
        "train.global_batch_size: 1 to 9 in steps of 2 -> 3 to 9 in steps of 2",
    ]
    for path, other in {
        "optim.lr": {**LR, "log": False, "high": 1.0},
        "train.global_batch_size": {**scale, "step": 4},
        "optim.name": {**choice, "choices": ["adamw"]},
        "optim.weight_decay": LR,
    }.items():
        with pytest.raises(ConfigError, match=f"tune.space.{path}: .*--from") as error:
            check_tuning(configuration(space={**wider, path: other}), folder)
        # Beside (there -> now), since ranges that may change are not named.
        assert str(error.value).count(" -> ") == 2
    del wider["optim.lr"]
    with pytest.raises(ConfigError, match=r"tune.space.optim.lr: "):
        check_tuning(configuration(space=wider), folder)
    for changed in (
        configuration("seed=7", space=space),
        configuration(space=space, seed=7),
        configuration(space=space, folds=2),
    ):
        with pytest.raises(ConfigError, match=r"seed: 0 -> 7|folds: 1 -> 2"):
            check_tuning(changed, folder)


# ---------------------------------------------------------------- making and continuing


def test_a_study_continues(folder: TuningFolder) -> None:
    start = [{"optim.lr": 0.05}, {"optim.lr": 0.001}]
    config = configuration("optim.lr=0.001", start=start, trials=4)
    trials, notes = begin(config, folder)
    assert notes == ["storage: optuna.journal, as tune.storage says"]
    assert trials_left(tune_section(config), trials) == 4
    values = []
    for _ in range(3):
        one = trials.suggest()
        values.append(one.values["optim.lr"])
        if one.number < 2:
            trials.complete(one.number, [0.5])
    assert values[:2] == [0.001, 0.05]  # Its own ones first, and once.
    trials, notes = begin(config, folder)
    assert notes == [
        "storage: optuna.journal, which is there",
        "3 trials so far: 2 complete, 1 interrupted, to be continued first",
    ]
    assert trials.interrupted() == one
    assert trials_left(tune_section(config), trials) == 1
    more = configuration("optim.lr=0.001", start=start, trials=6)
    trials, _ = begin(more, folder)
    assert trials_left(tune_section(more), trials) == 3
    assert trials.suggest().values["optim.lr"] not in values
    assert load_study(folder).study_name == "demo"


def test_a_command_that_was_killed_while_it_began(
    folder: TuningFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the last of three starting points was there; the next one has other ranges."""
    start = [{"optim.lr": 0.001}, {"optim.lr": 0.05}, {"optim.lr": 0.002}]
    enqueue = Trials.enqueue

    def killed(self: Trials, points: Any, limit: int | None = None) -> None:
        enqueue(self, points, limit=2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trials, "enqueue", killed)
        with pytest.raises(KeyboardInterrupt):
            begin(configuration(start=start), folder)
    assert load_study(folder).trials[0].state == TrialState.WAITING
    folder.config_path.unlink()
    higher = configuration(start=start[1:], space={"optim.lr": {**LR, "low": 0.002}})
    folder.write_config(higher)
    trials, _ = open_trials(higher, folder, 20)
    assert [trials.suggest().values["optim.lr"] for _ in range(2)] == [0.05, 0.002]
    assert trials.waiting() == 0
    assert [
        study.study_name for study in optuna.get_all_study_summaries(trials.study._storage)
    ] == ["demo"]


def test_a_grid_is_enqueued_as_far_as_trials_go(folder: TuningFolder) -> None:
    steps = {"type": "float", "low": 0.1, "high": 0.3, "step": 0.1}
    sizes = {"type": "int", "low": 8, "high": 16, "step": 8}

    def config(trials: int, high: float = 0.3) -> RunConfig:
        space = {"optim.lr": {**steps, "high": high}, "train.global_batch_size": sizes}
        return configuration(space=space, sampler={"name": "grid"}, trials=trials)

    found = []

    def search(one: RunConfig) -> None:
        trials, _ = begin(one, folder)
        while trials_left(tune_section(one), trials):
            suggestion = trials.suggest()
            found.append(tuple(round(value, 6) for value in suggestion.values.values()))
            trials.complete(suggestion.number, [0.5])

    search(config(4))
    assert found == [(0.1, 8), (0.1, 16), (0.2, 8), (0.2, 16)]
    search(config(32))
    assert found[4:] == [(0.3, 8), (0.3, 16)]
    search(config(32))
    search(config(32, high=0.4))
    assert found[6:] == [(0.4, 8), (0.4, 16)]
