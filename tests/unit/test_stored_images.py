"""Images in tar shards: broken ones are skipped and named, large ones are shrunk once."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as transforms
from PIL import Image

from dml_dist.config.data import FolderConfig
from dml_dist.data import tar_shard, write_shards
from dml_dist.data.build_index import build_index
from dml_dist.data.datasets.folder import FolderImporter
from dml_dist.data.decode import decode_image
from dml_dist.data.import_summary import read_summary
from dml_dist.data.index import Index
from dml_dist.data.reader import ShardReader
from dml_dist.data.sample import FileSource
from dml_dist.data.verify import verify
from dml_dist.data.write_shards import import_dataset
from dml_dist.errors import DataError
from tests.oracles_data import encoded_image, folder_bytes, write_images

BROKEN = ("1/1.png", "2/0.png", "2/1.png", "2/2.png", "2/3.png", "3/2.png", "5/0.png")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Six classes of four images; all of class 2 are broken."""
    folder = tmp_path / "raw"
    write_images(folder, [f"{i}/{j}.png" for i in range(6) for j in range(4)])
    for at, name in enumerate(BROKEN):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes([b"", b"no image", data[: len(data) // 2]][at % 3])
    return folder


def run(raw: Path, out: Path, on_broken: tar_shard.OnBroken = "skip") -> Index:
    importer = FolderImporter(FolderConfig(source=str(raw)))
    return import_dataset(importer, out, samples_per_shard=2, on_broken=on_broken, processes=1)


def keys_of(index: Index) -> set[str]:
    return set(index.keys.tolist())


def test_broken_images_are_left_out_and_named(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = run(raw, out)
    good = {f"{i}/{j}" for i in range(6) for j in range(4)} - {name[:-4] for name in BROKEN}
    assert keys_of(index) == good
    assert verify(out, processes=1).problems == []
    summary = read_summary(out)
    assert summary is not None
    assert (summary.num_skipped, summary.lost_classes) == (7, ("2",))
    with open(out / "skipped.csv", newline="") as file:
        rows = {row["key"]: row for row in csv.DictReader(file)}
    assert set(rows) == {name[:-4] for name in BROKEN}
    assert rows["1/1"]["reason"] == f"{raw / '1/1.png'}: the image is empty (0 bytes)"
    assert (rows["5/0"]["split"], rows["5/0"]["class"]) == ("test", "5")
    text = "\n".join(summary.lines(out))
    assert f"skipped 7 broken images, all in {out / 'skipped.csv'}, first:" in text
    assert "1 classes have only broken images and are left out: 2" in text
    # Labels close the gap, as they do when the tar shards are indexed again.
    assert index.class_names == ("0", "1", "3", "4", "5")
    labels = dict(zip(index.keys, index.label, strict=True))
    shutil.copytree(out, tmp_path / "copy")
    anew = build_index(tmp_path / "copy", processes=1)
    assert dict(zip(anew.keys, anew.label, strict=True)) == labels


def test_a_tar_shard_of_broken_images_only_is_not_written(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_images(raw, [f"train/a/{i}.png" for i in range(4)] + ["test/b/0.png", "test/c/0.png"])
    write_images(raw, ["train/d/0.png"])
    for name in ("b", "c"):
        (raw / f"test/{name}/0.png").write_bytes(b"")
    index = run(raw, out)
    assert {path.name for path in out.glob("*.tar")} == set(index.tar_shards)
    assert set(index.split) == {"train"}
    assert verify(out, processes=1).problems == []
    for path in raw.glob("train/*/*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"at least one of 7 images must be readable, none is"):
        run(raw, tmp_path / "none")


def test_skipped_images_are_recorded(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"7 are not:(.|\n)*leave them out \(--on-broken skip\)"):
        run(raw, out, "raise")
    before = keys_of(run(raw, out))
    assert keys_of(run(raw, out)) == before
    with pytest.raises(
        DataError, match=r"skipped 7 broken images, listed in skipped.csv; accept that"
    ):
        run(raw, out, "raise")


def test_raise_after_skip_checks_images_again(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tar shards that an unfinished import wrote without broken images do not count for raise."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            run(raw, out)
    with pytest.raises(DataError, match="7 are not"):
        run(raw, out, "raise")
    for name in BROKEN:
        (raw / name).write_bytes(encoded_image(50 + BROKEN.index(name)))
    assert len(run(raw, out, "raise")) == 24
    assert not (out / "skipped.csv").exists()
    assert verify(out, processes=1).problems == []


def test_a_tar_shard_of_images_that_broke_since_is_removed(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unfinished import continues after images were replaced, here by broken ones."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(write_shards, "write_index", stop)
        with pytest.raises(KeyboardInterrupt):
            run(raw, out)
    for path in raw.glob("[345]/*.png"):  # all of the split test
        path.write_bytes(b"")
    index = run(raw, out)
    assert set(index.split) == {"train"}
    assert {path.name for path in out.glob("*.tar")} == set(index.tar_shards)
    assert verify(out, processes=1).problems == []


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def killed(raw: str, out: str) -> None:
    """Import and be killed by SIGKILL between the fifth tar shard and its record."""
    written = []
    complete = tar_shard.write_json_atomic

    def fifth_record(path: Path, value: object) -> None:
        written.append(path)
        if len(written) == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        complete(path, value)

    tar_shard.write_json_atomic = fifth_record  # type: ignore[assignment]
    run(Path(raw), Path(out))


@pytest.mark.parametrize("where", ["before a record", "before the summary", "before the index"])
def test_an_interrupted_import_that_skips_ends_as_one_that_was_not(
    raw: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(raw, whole)
    if where == "before a record":
        process = multiprocessing.get_context("forkserver").Process(
            target=killed, args=(str(raw), str(out))
        )
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    else:
        with monkeypatch.context() as patch:
            patch.setattr(write_shards, where.replace("before the ", "write_"), stop)
            with pytest.raises(KeyboardInterrupt):
                run(raw, out)
    assert not (out / "index.parquet").exists()
    run(raw, out)
    assert folder_bytes(out) == folder_bytes(whole)


def test_errors_of_the_system_are_not_broken_images(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = FileSource.read

    def failing(self: FileSource) -> tuple[bytes, str]:
        if self.name == "0/0.png":
            raise OSError(5, "Input/output error")
        return read(self)

    monkeypatch.setattr(FileSource, "read", failing)
    with pytest.raises(DataError, match=r"1 are not:\n.*0/0.png: \[Errno 5\] Input/output error"):
        run(raw, tmp_path / "out")


# ---------------------------------------------------------------- shrinking

SIZES = {"a/wide": (300, 120), "a/high": (90, 257), "a/fits": (256, 31), "b/thin": (2000, 3)}


def smooth(size: tuple[int, int]) -> Image.Image:
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 5, size[1]))
    waves = np.stack([np.sin(x), np.cos(y + x), np.sin(y)], axis=-1)
    return Image.fromarray(np.uint8(127 + 120 * waves))


def shrunk(raw: Path, out: Path, max_side: int | None) -> Index:
    importer = FolderImporter(FolderConfig(source=str(raw)))
    return import_dataset(importer, out, max_side=max_side, processes=1)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    folder = tmp_path / "large"
    for name, size in SIZES.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth(size).save(path)
    return folder


def test_larger_images_are_shrunk_and_others_kept(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    index = shrunk(large, out, 256)
    reader = ShardReader(index)
    sizes, data = {}, {}
    for row, key in enumerate(index.keys):
        sizes[key] = (int(index.width[row]), int(index.height[row]), str(index.extension[row]))
        data[key] = reader.read(row)
    reader.close()
    assert sizes == {
        "a/wide": (256, 102, "jpg"),
        "a/high": (90, 256, "jpg"),
        "a/fits": (256, 31, "png"),
        "b/thin": (256, 1, "jpg"),
    }
    assert data["a/fits"] == (large / "a/fits.png").read_bytes()
    for key in ("a/wide", "a/high"):
        width, height, _ = sizes[key]
        original = torch.from_numpy(np.array(Image.open(large / f"{key}.png"))).permute(2, 0, 1)
        expected = transforms.resize(
            original, [height, width], transforms.InterpolationMode.BICUBIC, antialias=True
        )
        difference = (decode_image(data[key], key).int() - expected.int()).abs()
        assert difference.float().mean() < 1.5
        with Image.open(io.BytesIO(data[key])) as image:
            assert image.quantization == jpeg_tables(95)
    assert verify(out, processes=1).problems == []


def jpeg_tables(quality: int) -> object:
    stream = io.BytesIO()
    smooth((16, 16)).save(stream, "JPEG", quality=quality)
    with Image.open(stream) as image:
        return image.quantization  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "I;16"])
def test_images_of_every_mode_are_shrunk_to_rgb(tmp_path: Path, mode: str) -> None:
    raw = tmp_path / "raw"
    (raw / "a").mkdir(parents=True)
    picture = smooth((80, 60))
    if mode == "I;16":
        levels = np.asarray(picture.convert("L"), dtype=np.uint16) * 257
        picture, expected = Image.fromarray(levels), picture.convert("L").convert("RGB")
    else:
        picture = picture.convert(mode)
        expected = picture.convert("RGB")
    picture.save(raw / "a/0.tif")
    write_images(raw, ["b/0.png"])
    index = shrunk(raw, tmp_path / "out", 40)
    (row,) = np.flatnonzero(index.keys == "a/0")
    reader = ShardReader(index)
    image = decode_image(reader.read(int(row)), "here").permute(1, 2, 0).numpy()
    reader.close()
    small = np.asarray(expected.resize((40, 30), Image.Resampling.BICUBIC))
    assert np.abs(image.astype(int) - small.astype(int)).mean() < 6


def test_max_side_is_part_of_the_import_identity(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shrunk(large, out, 256)
    shrunk(large, out, 256)
    for other in (None, 128):
        with pytest.raises(DataError, match="or this one with other settings"):
            shrunk(large, out, other)
    with pytest.raises(DataError, match="max_side must be at least 1 pixel, got 0"):
        shrunk(large, tmp_path / "other", 0)


def test_a_truncated_large_image_is_broken(large: Path, tmp_path: Path) -> None:
    path = large / "a/wide.png"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"a/wide.png: the image cannot be decoded"):
        shrunk(large, tmp_path / "out", 64)
