"""What is beside a measurement: load of other programs, the web server of remote points."""

from __future__ import annotations

import math
import os
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from dml_dist.errors import RunError
from dml_dist.studies.scale.load import LoadMeter, Sample, busy_seconds, others, process_seconds
from dml_dist.studies.scale.serve import served

TICKS = os.sysconf("SC_CLK_TCK")


def test_load_is_what_others_use() -> None:
    samples = [Sample(0, 100, 50), Sample(1, 101, 51), Sample(2, 103, 52), Sample(4, 107, 54)]
    assert others(samples, 0, 1) == 0
    assert others(samples, 1, 2) == 1  # Two processors were busy, one with the study.
    assert others(samples, 1.5, 3) == pytest.approx((6 - 3) / 3)  # The samples around it.
    assert others(samples, -5, 9) == pytest.approx((7 - 4) / 4)
    assert others([Sample(0, 0, 0), Sample(1, 1, 2)], 0, 1) == 0  # Counts of ticks are rough.
    assert math.isnan(others(samples[:1], 0, 1))
    assert math.isnan(others([], 0, 1))


def stat(proc: Path, number: int, parent: int, ticks: int, name: str = "python") -> None:
    (proc / str(number)).mkdir()
    fields = ["S", str(parent), *["0"] * 9, str(ticks), str(ticks), *["0"] * 5]
    (proc / str(number) / "stat").write_text(f"{number} ({name}) {' '.join(fields)}\n")


def test_processes_of_a_study_are_those_below_it(tmp_path: Path) -> None:
    stat(tmp_path, 10, 1, TICKS)
    stat(tmp_path, 5, 12, 2 * TICKS, "a) S (b 1")  # A grandchild with a lower number.
    stat(tmp_path, 12, 10, 3 * TICKS)
    stat(tmp_path, 13, 1, 4 * TICKS)
    (tmp_path / "self").mkdir()
    (tmp_path / "99").mkdir()  # It ended just now.
    assert process_seconds(10, tmp_path) == {10: 2, 12: 6, 5: 4}
    # user, nice, system, steal; neither idle nor waiting nor interrupts.
    values = [value * TICKS for value in (1, 2, 4, 100, 100, 100, 100, 8, 0, 0)]
    (tmp_path / "stat").write_text(f"cpu  {' '.join(map(str, values))}\ncpu0 1\n")
    assert busy_seconds(tmp_path) == 15


def test_the_own_work_is_no_load() -> None:
    with LoadMeter() as meter:
        start, used = time.time(), time.process_time()
        while time.process_time() < used + 0.1:
            pass
    samples = meter._samples
    assert samples[-1].own - samples[0].own > 0.05
    assert meter.load(start, time.time()) >= 0


def test_a_server_that_is_late(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "a.tar").write_bytes(b"0123456789")
    (tmp_path / "secret").write_text("x")
    with served(folder, 50.0) as url:
        start = time.monotonic()
        assert urllib.request.urlopen(f"{url}/a.tar").read() == b"0123456789"
        assert time.monotonic() - start >= 0.05
        for wanted, body in (("bytes=2-4", b"234"), ("bytes=7-", b"789"), ("bytes=8-99", b"89")):
            request = urllib.request.Request(f"{url}/a.tar", headers={"Range": wanted})
            with urllib.request.urlopen(request) as response:
                assert (response.status, response.read()) == (206, body)
        for name in ("missing.tar", "../secret", ""):
            with pytest.raises(urllib.error.HTTPError, match="404"):
                urllib.request.urlopen(f"{url}/{name}")
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/a.tar", timeout=1)


def test_a_server_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/true")
    with pytest.raises(RunError, match="did not start"), served(tmp_path, 1.0):
        pass
