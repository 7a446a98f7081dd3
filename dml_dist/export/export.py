"""`dml-dist export`: writes a run's network and a gallery as a bundle (`export/bundle.py`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from dml_dist.config.data import ExifRule, StandardTransformConfig, TransformConfig
from dml_dist.config.schema import RunConfig
from dml_dist.data.decode import decode_image
from dml_dist.data.pixels import open_image, rgb_image
from dml_dist.data.reader import ShardReader
from dml_dist.errors import DataError
from dml_dist.export import bundle as files
from dml_dist.export.onnx import EXTRA, export_onnx, require_extra
from dml_dist.files import write_json_atomic
from dml_dist.models.embedding import EmbeddingModel
from dml_dist.models.timm_backbone import network_transform
from dml_dist.orchestration.evaluate import evaluation_config
from dml_dist.orchestration.launch import uses_gpu
from dml_dist.parallel.comm import Comm
from dml_dist.runs.artifacts import read_metrics
from dml_dist.runs.code_note import say_if_code
from dml_dist.runs.folder import RunFolder
from dml_dist.runs.provenance import git_revision, installed_versions
from dml_dist.runtime.context import RunContext, open_context
from dml_dist.runtime.progress import Display, Emit, note, phase
from dml_dist.search.exact import store_rows
from dml_dist.train.checkpoint_choice import load_model, select_checkpoint
from dml_dist.train.checkpoint_files import MODEL, read_manifest
from dml_dist.train.state import resolve_precision
from dml_dist.urls import output_path, shown_url

THUMBNAIL_SIDE = 96
"""Pixels of the longer side of a thumbnail."""

_CHECKED_IMAGES = 5


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        split: `validation`, or the split of the index whose images are the gallery.
        checkpoint: `best`, `last` or the folder of a checkpoint.
        thumbnails_mb: Largest size of all thumbnails in MiB; 0 for none.
    """

    split: str = "test"
    checkpoint: str = "best"
    thumbnails_mb: float = 200.0


def run_export(
    run_dir: Path,
    out: Path,
    console: Console,
    options: ExportOptions,
    overrides: Sequence[str] = (),
) -> Path:
    """Write a run's bundle and return its folder.

    Args:
        run_dir: The run's folder.
        out: The bundle's folder, new or empty.
        console: Where progress goes.
        options: Split, checkpoint and thumbnails.
        overrides: Changes to the run's configuration: evaluation, launch, paths.

    Raises:
        ConfigError: If the folder is no run, `out` is not free, or a package is missing.
        CheckpointError: If the checkpoint is missing or damaged.
        DataError: If the data is missing or damaged, or the split has no gallery image.
        RunError: If torch cannot export the network, or ONNX gives different embeddings.
    """
    out = output_path(out).absolute()
    files.require_new(out)
    require_extra()
    folder = RunFolder.open(run_dir)
    say_if_code(folder.path, console)
    config = evaluation_config(folder, overrides)
    checkpoint = select_checkpoint(folder.checkpoints, options.checkpoint)
    device = "cuda:0" if uses_gpu(config.launch, 1) else "cpu"
    comm = Comm.single(device)
    with Display(console) as emit:
        context = open_context(config, comm.topology, comm, emit)
        rows = _gallery_rows(context, options.split)
        with files.new_bundle(out) as target:
            _write(target, context, rows, folder, checkpoint, options, emit)
    console.print(
        f"bundle: {out} ({len(rows):,} images; search it with `dml-dist search {out} IMAGE...`)",
        highlight=False,
        soft_wrap=True,
    )
    return out


def _gallery_rows(context: RunContext, split: str) -> np.ndarray:
    rows = context.rows_of(split)
    rows = rows[context.index.role[rows] != "query"]
    if not len(rows):
        raise DataError(
            f"the split {split!r} of {context.index.root} has queries only, no gallery images; "
            "give another --split"
        )
    return rows


def _write(
    target: Path,
    context: RunContext,
    rows: np.ndarray,
    folder: RunFolder,
    checkpoint: Path,
    options: ExportOptions,
    emit: Emit,
) -> None:
    """Write all files of a bundle, the manifest last."""
    config = context.config
    dtype = resolve_precision(config.train.precision, context.topology.device_type).dtype
    model = load_model(checkpoint, config.model, seed=config.seed, dtype=dtype)
    model = model.to(context.topology.device)
    reader = ShardReader(context.index)
    gallery = _write_gallery(target, context, rows, model, reader, options, emit)
    transform = network_transform(config.data.transform, config.model.backbone)
    write_json_atomic(target / files.PREPROCESSING, preprocessing(transform, config.data.exif))
    cast(Any, model.cpu().float().eval()).to(memory_format=torch.contiguous_format)
    model.channels_last = False
    torch.save(model.state_dict(), target / files.WEIGHTS)
    embedder = files.Embedder(model, config.evaluation.distance == "cosine").eval()
    images = torch.stack(
        [
            context.transform.evaluation(
                decode_image(reader.read(row), reader.describe(row), context.index.exif)
            )
            for row in (int(rows[i % len(rows)]) for i in range(_CHECKED_IMAGES))
        ]
    )
    reader.close()
    onnx = export_onnx(embedder, images, target / files.ONNX)
    emit(note(f"ONNX and torch differ by at most {onnx['largest_difference']:.1e}"))
    files.write_manifest(
        target,
        files.Manifest(
            name=config.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            run=_origin(config, folder, checkpoint, options),
            metrics=read_metrics(folder.metrics_path),
            model=config.model.model_dump(mode="json"),
            distance=config.evaluation.distance,
            normalized=embedder.normalized,
            embedding_size=config.model.embedding_size,
            onnx=onnx,
            gallery=gallery,
            files={},
        ),
    )


def _write_gallery(
    target: Path,
    context: RunContext,
    rows: np.ndarray,
    model: EmbeddingModel,
    reader: ShardReader,
    options: ExportOptions,
    emit: Emit,
) -> dict[str, Any]:
    """Write index, table and label map; return their entry of the manifest."""
    index, config = context.index, context.config
    embeddings, labels, _ = context.embed(model, rows, f"embed {options.split}")
    small = thumbnails(reader, rows, int(options.thumbnails_mb * 2**20), emit)
    files.write_gallery(
        target,
        store_rows(torch.from_numpy(embeddings), config.evaluation.distance),
        keys=index.keys[rows].tolist(),
        labels=labels,
        super_classes=index.super_class[rows].tolist(),
        tar_shards=[index.tar_shards[number] for number in index.tar_shard[rows]],
        thumbnails=small,
    )
    used = np.unique(labels).tolist()
    names = {str(label): index.class_names[label] for label in used}
    write_json_atomic(target / files.LABELS, names)
    kept = [data for data in small if data is not None]
    precision = resolve_precision(config.train.precision, context.topology.device_type)
    return {
        "num_images": len(rows),
        "num_classes": len(used),
        "data": shown_url(config.data.path),
        "embedded_in": str(precision.autocast or precision.dtype).removeprefix("torch."),
        "thumbnails": {
            "number": len(kept),
            "num_bytes": sum(map(len, kept)),
            "longer_side": THUMBNAIL_SIDE,
            "source": "the samples of `data`, resized; tar_shard and key identify them",
        },
    }


def _origin(
    config: RunConfig, folder: RunFolder, checkpoint: Path, options: ExportOptions
) -> dict[str, Any]:
    """Return the origin of the network, for the manifest."""
    info = folder.info()
    git = git_revision(Path(__file__).parent)
    trained = info.attempts[-1] if info.attempts else None
    versions = {package: metadata.version(package) for package in EXTRA}
    return {
        "folder": str(folder.path),
        "seed": config.seed,
        "checkpoint": checkpoint.name,
        "checkpoint_file": MODEL,
        "step": read_manifest(checkpoint).step,
        "split": options.split,
        "trained_with": {
            "git_revision": trained.git.revision if trained else None,
            "git_dirty": trained.git.dirty if trained else None,
            "versions": dict(trained.versions) if trained else {},
        },
        "exported_with": {
            "git_revision": git.revision,
            "git_dirty": git.dirty,
            "versions": {**installed_versions(), **versions},
        },
    }


def preprocessing(config: TransformConfig, exif: ExifRule) -> dict[str, Any]:
    """Return the steps from an image to an input of the network, as plain JSON values."""
    values: dict[str, Any] = {"transform": config.model_dump(mode="json"), "exif": exif}
    if isinstance(config, StandardTransformConfig):
        values["steps"] = [
            {
                "decode": "RGB, 8 bits a channel; of 16 the high byte; EXIF orientation "
                f"{'applied' if exif == 'apply' else 'not applied'}"
            },
            {
                "resize": {
                    "shorter_side": config.resize or config.size,
                    "interpolation": config.resize_mode,
                    "antialias": True,
                }
            },
            {"center_crop": {"height": config.size, "width": config.size}},
            {"scale": "value / 255"},
            {"normalize": {"mean": list(config.mean), "std": list(config.std)}},
        ]
        values["input"] = {"shape": ["batch", 3, config.size, config.size], "dtype": "float32"}
    return values


# ---------------------------------------------------------------- thumbnails


def thumbnails(reader: ShardReader, rows: np.ndarray, bound: int, emit: Emit) -> list[bytes | None]:
    """Return a thumbnail of each row, None once their total size has reached a bound.

    Args:
        reader: Reads the images.
        rows: (N,) int64 index rows.
        bound: Bytes; the last thumbnail may exceed it.
        emit: Takes progress events.
    """
    found: list[bytes | None] = []
    total = 0
    for number, row in enumerate(rows):
        if total >= bound:
            emit(note(f"thumbnails of the first {number:,} images only: they take {total:,} bytes"))
            return found + [None] * (len(rows) - number)
        data = thumbnail(reader.read(row), reader.index.exif)
        found.append(data)
        total += len(data)
        if number % 100 == 0 or number + 1 == len(rows):
            emit(phase("thumbnails", number + 1, len(rows)))
    return found


def thumbnail(data: bytes, exif: ExifRule = "apply") -> bytes:
    """Return an image as a JPEG of THUMBNAIL_SIDE pixels at most, as a PNG if it is small.

    Args:
        data: An encoded image that can be decoded.
        exif: Whether it is turned by its EXIF orientation.
    """
    with open_image(data) as opened:
        picture = rgb_image(opened, exif)
    small = max(picture.size) <= THUMBNAIL_SIDE // 2
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "PNG" if small else "JPEG", quality=85)
    return file.getvalue()
