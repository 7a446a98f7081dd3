from __future__ import annotations

import contextlib
import fcntl
import gc
import io
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dml_dist.config.data import FolderConfig
from dml_dist.data import tar_shard, write_shards
from dml_dist.data.build_index import build_index
from dml_dist.data.datasets.folder import FolderImporter
from dml_dist.data.index import (
    INDEX_NAME,
    PROGRESS_FOLDER,
    import_description,
    read_index,
)
from dml_dist.data.sample import FileSource, Sample
from dml_dist.data.verify import verify
from dml_dist.data.write_shards import import_dataset
from dml_dist.errors import DataError
from tests.oracles_data import (
    ListImporter,
    encoded_image,
    folder_bytes,
    noise_importer,
    write_images,
)

PER_SHARD = 8
CONTEXT = multiprocessing.get_context("forkserver")


def write(out: Path, importer: ListImporter | None = None, **settings: int) -> None:
    settings = {"samples_per_shard": PER_SHARD, "processes": 1, **settings}
    import_dataset(importer or noise_importer(), out, **settings)


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_pipeline_reads_the_shards(tmp_path: Path) -> None:
    import webdataset as wds

    write(tmp_path)
    index = read_index(tmp_path)
    names = [str(tmp_path / name) for name in index.tar_shards]
    pipeline = wds.WebDataset(names, shardshuffle=False).decode("rgb8")
    rows = {key: row for row, key in enumerate(index.keys)}
    seen = []
    for sample in pipeline:
        row = rows[sample["__key__"]]
        seen.append(row)
        with Image.open(io.BytesIO(encoded_image(int(sample["__key__"][2:])))) as image:
            assert np.array_equal(sample["png"], np.asarray(image))
        assert sample["cls"] == index.label[row]
        assert sample["json"] == {
            "label": index.label[row],
            "class": index.class_names[index.label[row]],
            "super_class": index.super_class[row],
            "split": index.split[row],
            "role": index.role[row],
        }
    assert seen == list(range(len(index))) == list(range(40))
    del pipeline, sample
    gc.collect()


def test_shards_hold_one_split_and_are_mixed(tmp_path: Path) -> None:
    write(tmp_path, noise_importer(90, 5))
    index = read_index(tmp_path)
    assert [name.rpartition("-")[0] for name in index.tar_shards] == ["test"] * 5 + ["train"] * 7
    for at in range(len(index.tar_shards)):
        rows = np.flatnonzero(index.tar_shard == at)
        assert 7 <= len(rows) <= PER_SHARD
        assert len(set(index.split[rows])) == 1
        assert len(set(index.label[rows])) > 1
    assert index.keys.tolist() != sorted(index.keys)


def test_bytes_depend_on_samples_seed_and_size_only(tmp_path: Path) -> None:
    reports: list[tuple[int, int]] = []
    import_dataset(
        noise_importer(),
        tmp_path / "a",
        samples_per_shard=PER_SHARD,
        processes=2,
        progress=lambda done, total: reports.append((done, total)),
    )
    assert reports[0] == (0, 40)
    assert reports[-1] == (40, 40)
    assert reports == sorted(reports)
    assert len(reports) == 6
    write(tmp_path / "b")
    write(tmp_path / "c", seed=1)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    assert folder_bytes(tmp_path / "a") != folder_bytes(tmp_path / "c")
    assert INDEX_NAME in folder_bytes(tmp_path / "a")


def test_finished_import_is_read_and_others_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    before = folder_bytes(tmp_path)
    stamps = [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())]
    write(tmp_path)
    assert [path.stat().st_mtime_ns for path in sorted(tmp_path.iterdir())] == stamps
    for importer, settings in [
        (noise_importer(41), {}),
        (noise_importer(40, 4), {}),
        (noise_importer(), {"seed": 1}),
        (noise_importer(), {"samples_per_shard": 9}),
    ]:
        with pytest.raises(DataError, match=r"holds another data set.*choose another folder"):
            write(tmp_path, importer, **settings)
    assert folder_bytes(tmp_path) == before
    (tmp_path / INDEX_NAME).unlink()
    with pytest.raises(DataError, match="holds tar shards that no import of this program wrote"):
        write(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="must be a folder"):
        write(tmp_path / "file")


def test_the_description_of_an_import_is_kept_and_renewed(tmp_path: Path) -> None:
    assert import_description(tmp_path) == ""
    texts = ['{"name": "glyphs"}', "", "Łódź"]
    for given, kept in zip(texts, [texts[0], texts[0], texts[2]], strict=True):
        index = import_dataset(noise_importer(), tmp_path, processes=1, description=given)
        assert import_description(tmp_path) == kept
        assert read_index(tmp_path).keys.tolist() == index.keys.tolist()
    (tmp_path / INDEX_NAME).unlink()
    build_index(tmp_path, processes=1)
    assert import_description(tmp_path) == ""
    (tmp_path / INDEX_NAME).write_bytes(b"no parquet")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        import_description(tmp_path)


def killed_import(
    out: str, where: str, kill_at: int, switch: str, pids: str, processes: int
) -> None:
    """Import and be killed by SIGKILL: inside a tar shard, or between two steps."""

    def die() -> None:
        children = [child.pid for child in multiprocessing.active_children()]
        Path(pids).write_text(json.dumps(children))
        os.kill(os.getpid(), signal.SIGKILL)

    def progress(done: int, total: int) -> None:
        if where == "after two shards" and done >= 2 * PER_SHARD:
            die()

    importer = noise_importer(kill_at=kill_at, kill_switch=switch)
    if where == "inside a shard":
        Path(switch).write_bytes(b"")
    if where == "before a record":
        tar_shard.write_json_atomic = lambda *_: die()  # type: ignore[assignment]
    if where == "before the index":
        write_shards.write_index = lambda *_, **__: die()  # type: ignore[assignment]
    if where == "after the index":
        write_shards.shutil.rmtree = lambda *_, **__: die()  # type: ignore[assignment]
    import_dataset(
        importer, Path(out), samples_per_shard=PER_SHARD, processes=processes, progress=progress
    )


@pytest.mark.parametrize(
    ("where", "processes"),
    [
        ("inside a shard", 1),
        ("before a record", 1),
        ("after two shards", 1),
        ("after two shards", 2),
        ("before the index", 1),
        ("after the index", 1),
    ],
)
def test_killed_import_continues_to_the_same_bytes(
    tmp_path: Path, where: str, processes: int
) -> None:
    switch, pids, out = tmp_path / "switch", tmp_path / "pids", tmp_path / "out"
    write(tmp_path / "whole")
    whole = folder_bytes(tmp_path / "whole")
    kill_at = int(read_index(tmp_path / "whole").keys[3 * PER_SHARD][2:])
    process = CONTEXT.Process(
        target=killed_import, args=(str(out), where, kill_at, str(switch), str(pids), processes)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    if processes > 1:
        assert_ended(json.loads(pids.read_text()))
    assert (out / INDEX_NAME).exists() == (where == "after the index")
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 0 < len(kept) <= 5
    # A file named as a tar shard is complete, even before the import continues.
    assert all((out / name).read_bytes() == whole[name] for name in kept)
    switch.unlink(missing_ok=True)
    if where != "after the index":
        with pytest.raises(DataError, match="was not finished; run the import again"):
            read_index(out)
        with pytest.raises(DataError, match="was not finished; run the import again"):
            build_index(out, processes=1)
        with pytest.raises(DataError, match="unfinished import of another data set"):
            write(out, noise_importer(39))
    write(out, noise_importer(kill_at=kill_at, kill_switch=str(switch)))
    assert folder_bytes(out) == whole
    rewritten = {n for n, stamp in kept.items() if (out / n).stat().st_mtime_ns != stamp}
    if processes == 1:
        assert len(rewritten) == (1 if where == "before a record" else 0)
    else:  # other writers may have been between a tar shard and its record
        assert len(rewritten) <= processes
    assert verify(out, processes=1).problems == []


def assert_ended(pids: list[int]) -> None:
    """Writer processes of a killed import end by themselves."""
    assert pids
    deadline = time.monotonic() + 10
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, "writer processes outlive the import"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_second_import_at_the_same_time_is_refused(tmp_path: Path) -> None:
    (tmp_path / PROGRESS_FOLDER).mkdir()
    with open(tmp_path / PROGRESS_FOLDER / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is importing into"):
            write(tmp_path)
    write(tmp_path)


def test_shards_indexed_by_hand_are_not_an_import(tmp_path: Path) -> None:
    write(tmp_path)
    build_index(tmp_path, processes=1)
    with pytest.raises(DataError, match=r"not imported by this program; choose another folder"):
        write(tmp_path)


def test_an_import_that_ended_before_the_lock_was_held_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, others = write_shards._lock, [noise_importer(41), noise_importer()]

    @contextlib.contextmanager
    def late_lock(folder: Path) -> Iterator[None]:
        monkeypatch.setattr(write_shards, "_lock", lock)
        write(folder.parent, others.pop())
        with lock(folder):
            yield

    monkeypatch.setattr(write_shards, "_lock", late_lock)
    write(tmp_path / "same")
    monkeypatch.setattr(write_shards, "_lock", late_lock)
    with pytest.raises(DataError, match="holds another data set"):
        write(tmp_path / "other")
    assert len(read_index(tmp_path / "other")) == 41
    for name in ("same", "other"):
        assert not (tmp_path / name / PROGRESS_FOLDER).exists()
        assert verify(tmp_path / name, processes=1).problems == []


def folder_importer(source: Path) -> FolderImporter:
    return FolderImporter(FolderConfig(source=str(source)))


def test_replaced_images_are_noticed_and_moved_folders_are_not(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_images(raw, [f"{i % 2}/{i}.png" for i in range(6)])
    import_dataset(folder_importer(raw), out, processes=1)
    raw = raw.rename(tmp_path / "moved")
    import_dataset(folder_importer(raw), out, processes=1)
    (raw / "0/2.png").write_bytes(encoded_image(99))
    with pytest.raises(DataError, match=r"holds another data set, or this one .*changed images"):
        import_dataset(folder_importer(raw), out, processes=1)


def test_unfinished_import_reads_replaced_images(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_images(raw, [f"{i % 4}/{i}.png" for i in range(16)])
    broken = raw / "0/0.png"
    broken.write_bytes(b"not an image")
    settings = {"samples_per_shard": 2, "processes": 1}
    with pytest.raises(DataError, match="1 are not"):
        import_dataset(folder_importer(raw), out, **settings)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(kept) == 7
    broken.write_bytes(encoded_image(50))
    replaced = raw / "3/3.png"  # by then in a tar shard
    replaced.write_bytes(encoded_image(51))
    index = import_dataset(folder_importer(raw), out, **settings)
    assert sum((out / name).stat().st_mtime_ns != stamp for name, stamp in kept.items()) == 1
    for path in (broken, replaced):
        (row,) = np.flatnonzero(index.keys == f"{path.parent.name}/{path.stem}")
        shard = (out / index.tar_shards[index.tar_shard[row]]).read_bytes()
        assert shard[index.offset[row] :][: index.length[row]] == path.read_bytes()
    assert verify(out, processes=1).problems == []


def test_broken_images_are_named_and_repaired_ones_taken(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    names = [f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(20)]
    write_images(raw, names)
    good = {name: (raw / name).read_bytes() for name in names}
    (raw / "3.jpg").write_bytes(b"")
    (raw / "4.png").write_bytes(b"not an image at all")
    (raw / "5.jpg").write_bytes(encoded_image(5, "jpeg", (90, 70))[:-900])
    (raw / "6.png").write_bytes(good["6.png"][:-30])
    (raw / "7.jpg").unlink()
    importer = ListImporter(
        tuple(
            Sample(f"k{i}", f"c{i % 2}", "train", FileSource(str(raw / n)))
            for i, n in enumerate(names)
        )
    )
    with pytest.raises(DataError) as caught:
        write(tmp_path / "out", importer)
    message = str(caught.value)
    assert "every image must be readable, 5 are not" in message
    for name, why in [
        ("3.jpg", "the image is empty"),
        ("4.png", "its format is not known"),
        ("5.jpg", "truncated"),
        ("6.png", "cannot be decoded"),
        ("7.jpg", "No such file"),
    ]:
        line = next(line for line in message.splitlines() if str(raw / name) in line)
        assert why in line
    assert not (tmp_path / "out" / INDEX_NAME).exists()
    for name, data in good.items():
        (raw / name).write_bytes(data)
    write(tmp_path / "out", importer)
    assert verify(tmp_path / "out", processes=1).num_samples == 20


def test_offsets_hold_for_keys_beyond_ascii(tmp_path: Path) -> None:
    samples = [
        Sample(f"é/{i}", "ü", "train", s.source) for i, s in enumerate(noise_importer(9).listed)
    ]
    write(tmp_path, ListImporter(tuple(samples)))
    assert verify(tmp_path, processes=1).problems == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": "a.b"}, "a key must be letters, digits"),
        ({"key": "x" * 200}, "at most 90 bytes"),
        ({"class_name": ""}, "sample .* the class name '' names no class"),
        ({"split": "a/b"}, "a split must be named by"),
        ({"role": "probe"}, "role must be one of both, query, gallery, got 'probe'"),
        ({"key": "n/0000"}, "keys must be unique"),
    ],
)
def test_samples_that_cannot_be_stored(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    first, second = noise_importer(2).listed
    changed = Sample(**{**vars(second), **change})
    with pytest.raises(DataError, match=message):
        write(tmp_path / "out", ListImporter((first, changed)))
    assert not (tmp_path / "out").exists()


def test_no_samples_and_wrong_size(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the data set has no images"):
        write(tmp_path, ListImporter(()))
    with pytest.raises(DataError, match="samples_per_shard must be at least 1"):
        write(tmp_path, samples_per_shard=0)
