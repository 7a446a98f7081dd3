"""`dml-dist search`: finds the images of a bundle that are nearest to given images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dml_dist.data.decode import decode_image
from dml_dist.data.transforms import build_transform
from dml_dist.errors import ConfigError, DataError
from dml_dist.export.bundle import (
    INPUT,
    ONNX,
    OUTPUT,
    WEIGHTS,
    Bundle,
    Embedder,
    read_bundle,
)
from dml_dist.export.search_figure import Tile, write_picture
from dml_dist.models.build_model import build_model
from dml_dist.parallel.comm import Comm
from dml_dist.report.figures import new_picture_path
from dml_dist.search.exact import store_rows
from dml_dist.search.gallery_shard import GalleryShard, Queries
from dml_dist.search.propose import resolve_backend
from dml_dist.search.sharded import norm_bound

Runtime = Literal["auto", "onnxruntime", "torch"]

_BATCH = 32
_MEMORY_BYTES = 256 << 20


@dataclass(frozen=True)
class Found:
    """A gallery image found for a query.

    Attributes:
        row: Its row of the bundle's gallery.
        key: Key of the sample.
        class_name: Its class.
        distance: Squared Euclidean distance of the stored rows; for cosine 2 - 2 cos.
    """

    row: int
    key: str
    class_name: str
    distance: float


def run_search(
    path: Path,
    images: Sequence[Path],
    console: Console,
    *,
    top: int = 10,
    out: Path | None = None,
    runtime: Runtime = "auto",
    trust: bool = False,
) -> list[list[Found]]:
    """Print the nearest images of a bundle and write a picture of them.

    Args:
        path: The bundle's folder.
        images: Image files, at least one.
        console: Where the table goes.
        top: Neighbors of each image, >= 1.
        out: The picture, a new PNG file; None is search.png, or search-2.png and so on.
        runtime: Computes the embeddings; auto is onnxruntime if it is installed, else torch.
        trust: Whether the bundle may name code, which is then run.

    Returns:
        For each image its neighbors, nearest first.

    Raises:
        ConfigError: If `out` exists, the bundle names code and is not trusted, or onnxruntime is
            requested and not installed.
        DataError: If the bundle or an image cannot be read.
    """
    out = new_picture_path(out, "search")
    encoded = [_read_image(image) for image in images]
    bundle = read_bundle(path, trust=trust)
    inputs = _inputs(bundle, encoded, images)
    found = nearest(bundle, embed_images(bundle, inputs, runtime), top)
    for image, neighbors in zip(images, found, strict=True):
        _print(image, bundle, neighbors, console)
    tiles = [
        [Tile(data, image.name, "query", bundle.exif), *(_tile(bundle, item) for item in neighbors)]
        for image, data, neighbors in zip(images, encoded, found, strict=True)
    ]
    title = f"{bundle.manifest.name}: nearest of {len(bundle.keys):,} images, {_measure(bundle)}"
    is_whole = write_picture(out, tiles, title)
    cut = "" if is_whole else " (the first rows; the tables are complete)"
    console.print(f"picture: {out}{cut}", highlight=False, soft_wrap=True)
    return found


def nearest(bundle: Bundle, embeddings_QD: Tensor, top: int) -> list[list[Found]]:
    """Return the nearest gallery images of embeddings, in the exact order of an evaluation.

    Args:
        bundle: The gallery.
        embeddings_QD: (Q, D) floats, normalised or not.
        top: Neighbors of each, >= 1; fewer if the gallery is smaller.

    Raises:
        DataError: If an embedding is not finite.
    """
    if not bool(embeddings_QD.isfinite().all()):
        raise DataError(
            f"the network of the bundle {bundle.path} gives embeddings that are not finite; train "
            "the run with a lower learning rate and export it again"
        )
    stored_QD = store_rows(embeddings_QD, bundle.manifest.distance)
    comm = Comm.single()
    gallery_ND = bundle.stored_ND
    shard = GalleryShard(
        gallery_ND,
        torch.arange(len(gallery_ND)),
        torch.tensor(bundle.labels),
        radius=norm_bound(torch.cat([gallery_ND, stored_QD]), comm),
        backend=resolve_backend("auto", comm.device),
        memory_bytes=_MEMORY_BYTES,
    )
    # Queries are not rows of the gallery, so that no row number may exclude a gallery row.
    number_Q = torch.full((len(stored_QD),), -1)
    lists = shard.nearest(Queries(stored_QD, number_Q, number_Q), min(top, len(gallery_ND)))
    return [
        [
            Found(
                row,
                bundle.keys[row],
                bundle.class_names[int(bundle.labels[row])],
                distance,
            )
            for row, distance in zip(rows, distances, strict=True)
        ]
        for rows, distances in zip(lists.row_QK.tolist(), lists.distance_QK.tolist(), strict=True)
    ]


def embed_images(bundle: Bundle, images: Tensor, runtime: Runtime = "auto") -> Tensor:
    """Return the embeddings of preprocessed images, (Q, D) float32.

    Args:
        bundle: The bundle with the network.
        images: (Q, 3, H, W) float32.
        runtime: As in `run_search`.

    Raises:
        ConfigError: If the runtime is not installed.
    """
    installed = importlib.util.find_spec("onnxruntime") is not None
    match runtime:
        case "onnxruntime" if not installed:
            raise ConfigError(
                "--runtime onnxruntime needs the package onnxruntime, which is not installed; run "
                "`pip install 'dml-dist[export]'`, or give --runtime torch"
            )
        case "onnxruntime":
            network = _onnx(bundle)
        case "torch":
            network = _torch(bundle)
        case "auto":
            network = _onnx(bundle) if installed else _torch(bundle)
        case _:
            assert_never(runtime)
    return torch.cat([network(part) for part in images.split(_BATCH)])


def _onnx(bundle: Bundle) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        str(bundle.path / ONNX), providers=["CPUExecutionProvider"]
    )
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def _torch(bundle: Bundle) -> Callable[[Tensor], Tensor]:
    model = build_model(bundle.model, seed=0, pretrained=False)
    try:
        model.load_state_dict(torch.load(bundle.path / WEIGHTS, weights_only=True))
    except RuntimeError as error:
        raise DataError(
            f"the weights in {bundle.path / WEIGHTS} are not those of the bundle's network "
            f"({str(error)[:300]}); export the run again"
        ) from None
    embedder = Embedder(model, bundle.manifest.normalized).eval()
    return torch.no_grad()(embedder)


# ---------------------------------------------------------------- input and output


def _read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the image {path} cannot be read: {error.strerror or error}; give the path of a JPEG, "
            "PNG or another image file"
        ) from None


def _inputs(bundle: Bundle, encoded: Sequence[bytes], images: Sequence[Path]) -> Tensor:
    transform = build_transform(bundle.transform)
    views = [
        transform.evaluation(decode_image(data, str(path), bundle.exif))
        for data, path in zip(encoded, images, strict=True)
    ]
    return torch.stack(views)


def _tile(bundle: Bundle, found: Found) -> Tile:
    return Tile(bundle.thumbnails[found.row], found.class_name, _shown(found.distance))


def _measure(bundle: Bundle) -> str:
    return "2 - 2 cosine" if bundle.manifest.distance == "cosine" else "squared distance"


def _shown(distance: float) -> str:
    """Return a distance with four digits; below 1e-9 the rows are equal up to rounding."""
    return f"{distance:.4f}" if distance >= 0.01 or distance < 1e-9 else f"{distance:.1e}"


def _print(image: Path, bundle: Bundle, neighbors: Sequence[Found], console: Console) -> None:
    # Not the table's title, which would break a path that is longer than the table is wide.
    console.print(str(image), highlight=False, markup=False, soft_wrap=True)
    table = Table("#")
    table.add_column("class", overflow="fold")
    table.add_column(_measure(bundle))
    table.add_column("key", overflow="fold")
    for place, item in enumerate(neighbors, start=1):
        texts = (item.class_name, _shown(item.distance), item.key)
        table.add_row(str(place), *texts)
    console.print(table)
