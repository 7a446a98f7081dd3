"""Files are replaced as a whole: a failure leaves the old content and no other file."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dml_dist import files
from dml_dist.errors import DataError
from dml_dist.runs.records import RecordWriter


def test_text_bytes_and_json_come_back(tmp_path: Path) -> None:
    files.write_text_atomic(tmp_path / "a.txt", "Łódź\r\n北京\n")
    assert (tmp_path / "a.txt").read_bytes() == "Łódź\r\n北京\n".encode()
    files.write_bytes_atomic(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    value = {"name": "é", "list": [1, 2.5, None, True], "nested": {"k": "v"}}
    files.write_json_atomic(tmp_path / "c.json", value)
    assert files.read_json(tmp_path / "c.json") == value
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b", "c.json"]


def test_json_supports_numpy_paths_and_non_finite_floats(tmp_path: Path) -> None:
    value = {
        "scalar": np.float32(0.5),
        "count": np.int64(3),
        "flag": np.bool_(True),
        "array": np.array([[1.0, np.nan]]),
        "floats": (float("inf"), float("-inf"), float("nan")),
        "path": Path("a") / "b",
        7: "key",
    }
    files.write_json_atomic(tmp_path / "x.json", value)
    # The strict reader: NaN and Infinity are not JSON.
    text = (tmp_path / "x.json").read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {
        "scalar": 0.5,
        "count": 3,
        "flag": True,
        "array": [[1.0, "nan"]],
        "floats": ["inf", "-inf", "nan"],
        "path": str(Path("a") / "b"),
        "7": "key",
    }


def test_files_and_records_support_the_same_values(tmp_path: Path) -> None:
    value = {
        "numpy": [np.float64("nan"), np.arange(2), np.bool_(True)],
        "tensor": torch.tensor([1.5, float("inf")]),
        "path": Path("a") / "b",
        "text": "ü",
    }
    files.write_json_atomic(tmp_path / "x.json", value)
    with RecordWriter(tmp_path / "x.jsonl", attempt=1) as writer:
        writer.write(step=1, value=value)
    stored = files.read_json(tmp_path / "x.json")
    assert json.loads((tmp_path / "x.jsonl").read_bytes())["value"] == stored
    assert stored == {
        "numpy": ["nan", [0, 1], True], "tensor": [1.5, "inf"], "path": "a/b", "text": "ü"
    }  # fmt: skip


def test_a_failing_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    files.write_bytes_atomic(path, b"old")

    def write_half() -> None:
        with files.open_atomic(path) as file:
            file.write(b"new but h")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        write_half()
    with pytest.raises(TypeError):
        files.write_json_atomic(path, {"object": object()})
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


def test_the_new_content_appears_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with files.open_atomic(path) as file:
        file.write(b"abc")
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == b"abc"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        files.write_bytes_atomic(tmp_path / "x", b"")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.write_text_atomic(tmp_path / "no" / "x", "")


def test_damaged_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text('{"a": 1,')
    with pytest.raises(DataError, match=r"run\.json.*line 1 column 9"):
        files.read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"run\.json"):
        files.read_json(path)
    with pytest.raises(FileNotFoundError):
        files.read_json(tmp_path / "none.json")


def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    loop = (
        "for n in itertools.count(): files.write_json_atomic(pathlib.Path(sys.argv[1]), [n] * 2000)"
    )
    program = f"import itertools, pathlib, sys\nfrom dml_dist import files\n{loop}"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)])
    deadline = time.monotonic() + 20
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    for _ in range(20):
        assert len(set(files.read_json(path))) == 1  # read while it is being replaced
    process.kill()
    process.wait()
    numbers = files.read_json(path)
    assert len(numbers) == 2000
    assert len(set(numbers)) == 1
