"""A bundle: everything that image search needs, in one self-contained folder.

    manifest.json         metadata, and every other file with its size and crc32
    model.onnx            (batch, 3, H, W) float32 images -> (batch, D) float32 embeddings
                          (weights beyond 2 GB are in model.onnx.data)
    model.pt              the network's state dict, for torch
    preprocessing.json    how to make an input of the network from an image
    labels.json           label -> class name, of the classes in the gallery
    gallery.faiss         Faiss IndexFlatL2 of the gallery's embeddings
    gallery.parquet       one row for each of them, in the same order: key, label, super_class,
                          tar_shard, thumbnail (encoded image or null)

It is written into a hidden folder, which is renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from dml_dist.config.custom import named_targets
from dml_dist.config.data import ExifRule, TransformConfig
from dml_dist.config.model import ModelConfig
from dml_dist.errors import ConfigError, DataError
from dml_dist.files import read_json, sync_folder, write_json_atomic
from dml_dist.models.embedding import EmbeddingModel

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
ONNX = "model.onnx"
WEIGHTS = "model.pt"
PREPROCESSING = "preprocessing.json"
LABELS = "labels.json"
INDEX = "gallery.faiss"
GALLERY = "gallery.parquet"

INPUT, OUTPUT = "images", "embeddings"
"""Names of the ONNX network's input and output."""

_BLOCK_BYTES = 1 << 22
_FLAT_L2 = b"IxF2"  # first bytes of an IndexFlatL2


@dataclass(frozen=True)
class Manifest:
    """Content of manifest.json.

    Attributes:
        name: Name of the run.
        created: UTC time, ISO 8601.
        run: Origin of the network: folder, seed, checkpoint, step, split, git, versions.
        metrics: The run's metrics; empty if it has none.
        model: The model section of the run's configuration.
        distance: Distance between embeddings.
        normalized: Whether the ONNX network divides embeddings by their norm (for cosine).
        embedding_size: D.
        onnx: Opset, exporter, and the largest difference of its output from torch's.
        gallery: Number of images and classes, their location, and their thumbnails.
        files: Name -> size in bytes and crc32.
        format_version: Version of this format.
    """

    name: str
    created: str
    run: Mapping[str, Any]
    metrics: Mapping[str, Any]
    model: Mapping[str, Any]
    distance: Literal["cosine", "euclidean"]
    normalized: bool
    embedding_size: int
    onnx: Mapping[str, Any]
    gallery: Mapping[str, Any]
    files: Mapping[str, Mapping[str, int]]
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True, eq=False)
class Bundle:
    """A bundle that was read and verified.

    Attributes:
        path: Its folder.
        manifest: Content of manifest.json.
        model: Configuration of the network.
        transform: Configuration of the preprocessing.
        exif: Whether images are turned by their EXIF orientation.
        stored_ND: The gallery's float32 rows, (N, D), as in the index.
        keys: N keys of the samples.
        labels: (N,) int64.
        class_names: Label -> name.
        thumbnails: N encoded images or None.
    """

    path: Path
    manifest: Manifest
    model: ModelConfig
    transform: TransformConfig
    exif: ExifRule
    stored_ND: Tensor
    keys: list[str]
    labels: np.ndarray
    class_names: Mapping[int, str]
    thumbnails: list[bytes | None]


class Embedder(nn.Module):
    """The module in the ONNX file: the network, with normalization for cosine distance."""

    def __init__(self, model: EmbeddingModel, normalized: bool) -> None:
        super().__init__()
        self.model = model
        self.normalized = normalized

    def forward(self, images: Tensor) -> Tensor:
        """Return embeddings, (B, D), of unit length if `normalized`."""
        embeddings: Tensor = self.model(images)
        return F.normalize(embeddings, dim=1) if self.normalized else embeddings


# ---------------------------------------------------------------- writing


def require_new(path: Path) -> None:
    """Check that a path is free or an empty folder.

    Raises:
        ConfigError: If `path` is a file or a folder that is not empty.
    """
    if path.is_dir() and not any(path.iterdir()):
        return
    if path.exists() or path.is_symlink():
        what = "a file" if path.is_file() else "a folder that is not empty"
        raise ConfigError(
            f"a bundle needs a new folder, but {path} is {what}; give another --out, or remove it"
        )


@contextmanager
def new_bundle(path: Path) -> Iterator[Path]:
    """Yield a hidden folder next to `path`, renamed to `path` when the block ends without error.

    Raises:
        ConfigError: If `path` is a file or a folder that is not empty.
    """
    require_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.iterdir():
            _flush(file)
        sync_folder(temporary)
        require_new(path)
        os.rename(temporary, path)  # onto nothing or an empty folder, else it fails
        sync_folder(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_gallery(
    folder: Path,
    stored_ND: Tensor,
    *,
    keys: list[str],
    labels: np.ndarray,
    super_classes: list[str],
    tar_shards: list[str],
    thumbnails: list[bytes | None],
) -> None:
    """Write the gallery's index and table.

    Args:
        folder: The bundle's folder.
        stored_ND: Rows that distances are computed from, (N, D) float32.
        keys: N keys of the samples; all further arguments have N items.
        labels: (N,) int64.
        super_classes: Names, "" for none.
        tar_shards: The files with the images.
        thumbnails: Encoded images.
    """
    import faiss

    index = faiss.IndexFlatL2(stored_ND.shape[1])
    index.add(np.ascontiguousarray(stored_ND.cpu().numpy()))
    faiss.write_index(index, str(folder / INDEX))
    table = pa.table(
        {
            "key": pa.array(keys, pa.string()),
            "label": pa.array(labels, pa.int64()),
            "super_class": pa.array(super_classes, pa.string()).dictionary_encode(),
            "tar_shard": pa.array(tar_shards, pa.string()).dictionary_encode(),
            "thumbnail": pa.array(thumbnails, pa.binary()),
        }
    )
    pq.write_table(table, folder / GALLERY, compression="zstd")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, with the sizes and checksums of all files in the folder."""
    files = {file.name: _facts_of(file) for file in sorted(folder.iterdir())}
    write_json_atomic(folder / MANIFEST, {**asdict(manifest), "files": files})


def _facts_of(file: Path) -> dict[str, int]:
    checksum = 0
    with open(file, "rb") as stream:
        while block := stream.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return {"num_bytes": file.stat().st_size, "crc32": checksum}


def _flush(file: Path) -> None:
    with open(file, "rb") as stream:
        os.fsync(stream.fileno())


# ---------------------------------------------------------------- reading


def read_bundle(path: Path, *, trust: bool = False) -> Bundle:
    """Read and verify a bundle.

    Args:
        path: Its folder.
        trust: Whether it may name a custom network or transform: code that is then run.

    Raises:
        ConfigError: If it names code and is not trusted.
        DataError: If the folder is no bundle, of another version, or damaged.
    """
    manifest = _read_manifest(path)
    for name, facts in manifest.files.items():
        file = path / Path(name).name
        if not file.is_file() or _facts_of(file) != facts:
            state = "is missing" if not file.is_file() else "was changed or damaged"
            raise DataError(
                f"the file {name} of the bundle {path} {state} since the export; copy the bundle "
                "again, or export it again"
            )
    try:
        steps = read_json(path / PREPROCESSING)
        preprocessing = steps["transform"]
        if not trust:
            _refuse_code(path, {MANIFEST: manifest.model, PREPROCESSING: preprocessing})
        model = ModelConfig.model_validate_json(json.dumps(manifest.model))
        transform: TransformConfig = TypeAdapter(TransformConfig).validate_json(
            json.dumps(preprocessing)
        )
        # Bundles of older versions have no such entry and were embedded without turning.
        exif = TypeAdapter[ExifRule](ExifRule).validate_python(steps.get("exif", "ignore"))
        table = pq.read_table(path / GALLERY)
        stored_ND = _read_index(path / INDEX)
        names = {int(label): name for label, name in read_json(path / LABELS).items()}
        bundle = Bundle(
            path=path,
            manifest=manifest,
            model=model,
            transform=transform,
            exif=exif,
            stored_ND=stored_ND,
            keys=table.column("key").to_pylist(),
            labels=table.column("label").to_numpy(),
            class_names=names,
            thumbnails=table.column("thumbnail").to_pylist(),
        )
    except (KeyError, TypeError, ValueError, ValidationError, RuntimeError, pa.ArrowException) as e:
        raise DataError(
            f"this version cannot read the bundle {path}: its files do not fit together ({e!r}); "
            "export it again"
        ) from None
    if len(bundle.keys) != len(stored_ND) or not bundle.keys:
        raise DataError(
            f"{GALLERY} and {INDEX} must have the same number of rows, at least one, but have "
            f"{len(bundle.keys)} and {len(stored_ND)} in {path}; export the bundle again"
        )
    return bundle


def _refuse_code(path: Path, sections: Mapping[str, Any]) -> None:
    """Refuse a bundle that is a program: search would import and run what it names.

    Raises:
        ConfigError: If a section names a target.
    """
    if named := [found for name, value in sections.items() for found in named_targets(value, name)]:
        raise ConfigError(
            f"the bundle {path} names code that search would run ({', '.join(named)}); if you "
            "trust its author and that code, give --trust"
        )


def _read_manifest(path: Path) -> Manifest:
    found = "it does not exist"
    if path.exists():
        empty = path.is_dir() and not any(path.iterdir())
        found = "it is empty" if empty else f"it has no {MANIFEST}"
    if not (path / MANIFEST).is_file():
        raise DataError(
            f"{path} is not the folder of a bundle: {found}; make one with `dml-dist export RUN "
            "--out BUNDLE`"
        )
    values = read_json(path / MANIFEST)
    version = values.get("format_version") if isinstance(values, dict) else None
    if version != FORMAT_VERSION or "onnx" not in values:
        raise DataError(
            f"{path / MANIFEST} has format {version}, but this version of dml-dist reads format "
            f"{FORMAT_VERSION}; export the run again with this version"
        )
    try:
        return Manifest(**values)
    except TypeError as error:
        raise DataError(
            f"the manifest {path / MANIFEST} is damaged ({error}); export the run again"
        ) from None


def _read_index(path: Path) -> Tensor:
    """Return the rows in an index, (N, D) float32."""
    import faiss

    # Other kinds may name files that Faiss opens, such as inverted lists on disk.
    with open(path, "rb") as file:
        if (kind := file.read(len(_FLAT_L2))) != _FLAT_L2:
            raise ValueError(f"{path.name} begins with {kind!r}, not with {_FLAT_L2!r}")
    index = faiss.read_index(str(path))
    return torch.from_numpy(index.reconstruct_n(0, index.ntotal))
