"""What indexing does not read is counted and named; what it can read, it reads."""

from __future__ import annotations

import gzip
import io
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import features

from dml_dist.config.data import FolderConfig
from dml_dist.data.build_index import build_index
from dml_dist.data.datasets.folder import FolderImporter
from dml_dist.data.index import Index
from dml_dist.data.reader import ShardReader
from dml_dist.data.verify import verify
from dml_dist.errors import DataError
from tests.oracles_data import encoded_image, write_images, write_tar

KINDS = {
    "jfif": "jpeg",
    "jpe": "jpeg",
    "JPEG": "jpeg",
    "jp2": "jpeg2000",
    "j2k": "jpeg2000",
    "pbm": "ppm",
    **({"avif": "avif"} if features.check("avif") else {}),
}


def samples(*keys: str, label: str = "1") -> list[tuple[str, bytes]]:
    return [
        member
        for at, key in enumerate(keys)
        for member in ((f"{key}.png", encoded_image(at)), (f"{key}.cls", label.encode()))
    ]


def indexed(root: Path, caplog: pytest.LogCaptureFixture) -> tuple[Index, str]:
    with caplog.at_level(logging.WARNING):
        index = build_index(root, processes=1)
    return index, caplog.text


@pytest.mark.parametrize("gap", [0, 10240, 3 << 20])
def test_members_behind_an_end_block_are_read_and_counted(
    tmp_path: Path, gap: int, caplog: pytest.LogCaptureFixture
) -> None:
    parts = (samples("a", "b"), samples("c"), samples("d", "e", label="2"))
    data = b""
    for number, members in enumerate(parts):
        write_tar(tmp_path / f"{number}", members)
        data += (tmp_path / f"{number}").read_bytes() + bytes(gap)
    (tmp_path / "all.tar").write_bytes(data)
    index, text = indexed(tmp_path, caplog)
    assert index.keys.tolist() == ["a", "b", "c", "d", "e"]
    reader = ShardReader(index)
    assert reader.read(3) == encoded_image(0)
    assert "6 members stand behind an end-of-archive block" in text
    assert "c.png in all.tar, c.cls in all.tar, d.png in all.tar, ..." in text
    assert verify(tmp_path, processes=1).problems == []
    (tmp_path / "all.tar").write_bytes(data + b"no header".ljust(1024, b"x"))
    with pytest.raises(DataError, match=rf"all.tar: truncated or damaged at byte {len(data)}"):
        build_index(tmp_path, processes=1)


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_links_inside_of_a_tar_file_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.addfile(link("x/early.png", "../y/one.png", tarfile.SYMTYPE))
        tar.addfile(link("x/early.cls", "./../y/one.cls", tarfile.SYMTYPE))
        for name, data in (("y/one.png", encoded_image(5)), ("y/one.cls", b"7")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for extension in ("png", "cls"):
            tar.addfile(link(f"hard.{extension}", f"y/one.{extension}", tarfile.LNKTYPE))
        for extension in ("png", "cls"):
            tar.addfile(link(f"chain.{extension}", f"hard.{extension}", tarfile.SYMTYPE))
        tar.addfile(link("readme", "/etc/passwd", tarfile.SYMTYPE))
    index = build_index(tmp_path, processes=1)
    assert index.keys.tolist() == ["x/early", "y/one", "hard", "chain"]
    assert len(set(index.offset.tolist())) == 1
    assert ShardReader(index).read(0) == encoded_image(5)
    assert verify(tmp_path, processes=1).problems == []


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("target", ["../b.png", "/etc/passwd", "loop.png", "none.png"])
def test_links_out_of_a_tar_file_are_refused(tmp_path: Path, kind: bytes, target: str) -> None:
    write_tar(tmp_path / "a.tar", samples("a"))
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        tar.addfile(link("loop.png", target, kind))
    with pytest.raises(DataError, match=r"'loop.png' is a link to .* which is not in this tar"):
        build_index(tmp_path, processes=1)


@pytest.mark.parametrize("extension", KINDS)
def test_every_image_type_that_pil_reads(tmp_path: Path, extension: str) -> None:
    write_tar(
        tmp_path / "a.tar",
        [(f"k.{extension}", encoded_image(0, KINDS[extension], (40, 30))), ("k.cls", b"1")],
    )
    index = build_index(tmp_path, processes=1)
    assert (index.width[0], index.height[0]) == (40, 30)
    photos = tmp_path / "photos"
    for name in ("a", "b"):
        (photos / name).mkdir(parents=True)
        (photos / name / f"1.{extension}").write_bytes(b"")
    assert len(FolderImporter(FolderConfig(source=str(photos))).samples()) == 2


def test_labels_without_an_image_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(
        tmp_path / "a.tar",
        [
            *samples("a"),
            ("lost.cls", b"1"),
            ("alone.json", b'{"label": 1}'),
            ("phone.heic", b"..."),
            ("phone.cls", b"2"),
            ("array.npy", np.zeros(3).tobytes()),
            ("array.json", b"3"),
            ("notes.txt", b"no label"),
            ("._a.png", b"macOS"),
            ("b/.hidden.png", encoded_image(1)),
        ],
    )
    write_tar(tmp_path / "b.tar", [*samples("b"), ("lost2.cls", b"1")])
    index, text = indexed(tmp_path, caplog)
    assert index.keys.tolist() == ["a", "b"]
    assert (
        "3 members are labels without an image and are left out: lost.cls in a.tar, alone.json in "
        "a.tar, lost2.cls in b.tar\n" in text
    )
    assert "4 members belong to labelled samples without an image of a known type" in text
    assert "phone.heic in a.tar, phone.cls in a.tar, array.npy in a.tar, ..." in text
    assert "2 images have no key (a hidden file) and are left out: ._a.png in a.tar" in text
    report = verify(tmp_path, processes=1)
    assert report.problems == []
    assert [note.split(" ", 1)[0] for note in report.notes] == ["3", "4", "2"]


def test_without_any_image_the_error_names_what_is_there(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.heic", b"..."), ("a.cls", b"1"), ("b.cls", b"2")])
    with pytest.raises(DataError, match=r"hold no image") as caught:
        build_index(tmp_path, processes=1)
    assert "2 members belong to labelled samples" in str(caught.value)
    assert "1 members are labels without an image" in str(caught.value)


@pytest.mark.parametrize("name", ["b.tar.gz", "x/b.tgz", "b.tar.bz2", "b.TAR.XZ", "b.tar.zst"])
def test_compressed_tar_files_are_refused(tmp_path: Path, name: str) -> None:
    write_tar(tmp_path / "a.tar", samples("a"))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(gzip.compress((tmp_path / "a.tar").read_bytes()))
    with pytest.raises(DataError, match=rf"compressed tar files .*{name}; decompress them"):
        build_index(tmp_path, processes=1)
    (tmp_path / name).rename(tmp_path / "b.tar")
    with pytest.raises(DataError, match=r"b.tar: it is compressed with gzip.* decompress it"):
        build_index(tmp_path, processes=1)
    (tmp_path / "b.tar").rename(tmp_path / "aside")
    build_index(tmp_path, processes=1)
    (tmp_path / "aside").rename(tmp_path / name)
    assert verify(tmp_path, processes=1).problems == [
        f"{name}: it is compressed, so its images are in no index"
    ]


def test_tar_files_in_capitals_and_hidden_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "A.TAR", samples("a"))
    write_tar(tmp_path / ".cache" / "b.tar", samples("b"))
    index, text = indexed(tmp_path, caplog)
    assert index.tar_shards == ("A.TAR",)
    assert "1 hidden tar files are left out: .cache/b.tar" in text


def test_hidden_class_folders_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, ["a/1.png", "b/1.png", ".NET/1.png", ".NET/2.jpg", "b/.2.png"])
    (tmp_path / "a" / "._1.png").write_bytes(b"macOS")
    (tmp_path / ".NET" / "notes.txt").write_text("")
    with caplog.at_level(logging.WARNING):
        samples = FolderImporter(FolderConfig(source=str(tmp_path))).samples()
    assert len(samples) == 2
    assert (
        "3 images in hidden folders or files are left out: .NET/1.png, .NET/2.jpg, b/.2.png"
        in caplog.text
    )
