"""Append-only records of a run."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dml_dist.errors import RunError
from dml_dist.runs.records import RecordWriter, read_every_record, read_records


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "steps.jsonl"


def write(path: Path, attempt: int, *records: tuple[int, float]) -> None:
    with RecordWriter(path, attempt) as writer:
        for step, loss in records:
            writer.write(step, loss=loss)


def test_a_record_is_one_line_with_attempt_step_and_time(path: Path) -> None:
    before = time.time()
    with RecordWriter(path, 3) as writer:
        writer.write(7, loss=0.5, note="line\nbreak é", ok=True, nothing=None, list=[1, {"a": 2}])
        assert path.read_bytes().endswith(b"\n")  # visible before the writer is closed
    assert len(path.read_text().splitlines()) == 1
    [record] = read_records(path)
    assert before <= record.pop("time") <= time.time()
    assert record == {
        "attempt": 3, "step": 7, "loss": 0.5, "note": "line\nbreak é", "ok": True,
        "nothing": None, "list": [1, {"a": 2}],
    }  # fmt: skip


def test_no_file_has_no_records(path: Path) -> None:
    assert read_records(path) == []


def test_non_finite_floats_are_stored_as_text(path: Path) -> None:
    with RecordWriter(path, 0) as writer:
        writer.write(1, a=math.nan, b=math.inf, c=[-math.inf, {"d": math.nan}])
    line = json.loads(path.read_text())
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", ["-inf", {"d": "nan"}])
    [record] = read_records(path)
    assert math.isnan(record["a"])
    assert (record["b"], record["c"][0]) == (math.inf, -math.inf)
    assert math.isnan(record["c"][1]["d"])


def test_values_of_numpy(path: Path) -> None:
    with RecordWriter(path, 0) as writer:
        writer.write(
            1, a=np.float32(0.5), b=np.int64(3), c=np.array([1, 2]), d=np.float64("nan"),
            e=np.bool_(True),
        )  # fmt: skip
    [record] = read_records(path)
    assert (record["a"], record["b"], record["c"], record["e"]) == (0.5, 3, [1, 2], True)
    assert math.isnan(record["d"])


def test_records_come_in_the_order_of_steps(path: Path) -> None:
    write(path, 0, (3, 0.3), (1, 0.1), (2, 0.2))
    assert [record["loss"] for record in read_records(path)] == [0.1, 0.2, 0.3]


def test_the_last_attempt_of_a_step_counts(path: Path) -> None:
    write(path, 0, (1, 0.1), (2, 0.2), (3, 0.3))
    write(path, 1, (2, 1.2))
    records = [(record["attempt"], record["loss"]) for record in read_records(path)]
    assert records == [(0, 0.1), (1, 1.2), (0, 0.3)]


def test_attempts_count_whatever_the_order_of_lines(path: Path) -> None:
    write(path, 2, (1, 2.0))
    write(path, 1, (1, 1.0))
    assert [record["loss"] for record in read_records(path)] == [2.0]


def test_evaluations_of_two_splits_at_one_step(path: Path) -> None:
    with RecordWriter(path, 0) as writer:
        for split, protocol, value in (
            ("validation", "final", 0.1), ("test", "final", 0.2), ("test", "literature", 0.3),
            ("test", "final", 0.4),
        ):  # fmt: skip
            writer.write(5, split=split, protocol=protocol, value=value)
    assert [record["value"] for record in read_records(path)] == [0.1, 0.4, 0.3]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_truncated_line_is_skipped_and_terminated(path: Path, cut: int) -> None:
    write(path, 0, (1, 0.1), (2, 0.2))
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    path.write_bytes(whole[: first + cut])
    assert [record["step"] for record in read_records(path)] == [1]
    write(path, 1, (2, 1.2), (3, 1.3))
    records = [(record["attempt"], record["step"]) for record in read_records(path)]
    assert records == [(0, 1), (1, 2), (1, 3)]
    assert path.read_bytes()[: first + cut + 1] == whole[: first + cut] + b"\n"


def test_last_line_without_newline_is_read(path: Path) -> None:
    write(path, 0, (1, 0.1))
    path.write_bytes(path.read_bytes()[:-1])
    write(path, 1, (2, 1.2))
    assert [record["step"] for record in read_records(path)] == [1, 2]


@pytest.mark.parametrize(
    "line", [b"\xff\xfe", b"[1]", b"3", b'{"step": 1}', b'{"attempt": 0, "step": true}', b"{", b""]
)
def test_lines_that_are_no_records_are_skipped(path: Path, line: bytes) -> None:
    path.write_bytes(line + b"\n")
    write(path, 0, (1, 0.1))
    assert [record["loss"] for record in read_records(path)] == [0.1]


def test_reserved_names_are_rejected(path: Path) -> None:
    with RecordWriter(path, 0) as writer, pytest.raises(ValueError, match="named attempt; rename"):
        writer.write(1, attempt=3)
    assert read_records(path) == []


def test_every_record_is_one_write(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = RecordWriter(path, 0)
    calls: list[bytes] = []

    class File:
        def write(self, data: bytes) -> int:
            calls.append(data)
            return len(data)

    writer.close()
    monkeypatch.setattr(writer, "_file", File())
    writer.write(1, text="x" * 1_000_000)
    assert len(calls) == 1
    assert calls[0].endswith(b"\n")


def test_full_disk_raises_and_truncates_at_most_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RecordWriter(path, 0) as writer:
        file: Any = writer._file

        class Full:
            def write(self, data: bytes) -> int:
                return int(file.write(data[:10]))

        monkeypatch.setattr(writer, "_file", Full())
        with pytest.raises(RunError, match=r"only 10 of \d+ bytes .*; free some disk space"):
            writer.write(1, loss=0.1)
        monkeypatch.setattr(writer, "_file", file)
        writer.write(2, loss=0.2)
    assert [record["step"] for record in read_records(path)] == [2]


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be opened: .*; make its folder writable"):
        RecordWriter(tmp_path / "missing" / "steps.jsonl", 0)


def test_every_record_keeps_steps_that_were_made_again(path: Path) -> None:
    write(path, 1, (1, 0.1), (2, 0.2))
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo\n')
    write(path, 2, (2, 0.3))
    records = [(record["attempt"], record["step"]) for record in read_every_record(path)]
    assert records == [(1, 1), (1, 2), (2, 2)]
    assert read_every_record(path.parent / "missing.jsonl") == []
