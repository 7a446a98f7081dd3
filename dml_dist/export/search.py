"""`dml-dist search`: the images of a bundle that are nearest to given images."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, assert_never

import torch
from rich.console import Console
from rich.markup import escape
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
from dml_dist.search.exact import store_rows
from dml_dist.search.gallery_shard import GalleryShard, Queries
from dml_dist.search.propose import resolve_backend
from dml_dist.search.sharded import norm_bound

Runtime = Literal["auto", "onnxruntime", "torch"]

_BATCH = 32
_MEMORY_BYTES = 256 << 20


@dataclass(frozen=True)
class Found:
    """A gallery image that a query found.

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
) -> list[list[Found]]:
    """Print the nearest images of a bundle and write a picture of them.

    Args:
        path: The bundle's folder.
        images: Image files, at least one.
        console: Where the table goes.
        top: Neighbours of each image, >= 1.
        out: File of the picture, PNG, which must be new; None takes a free name, search.png.
        runtime: What computes embeddings; auto is onnxruntime where it is installed, else torch.

    Returns:
        For each image its neighbours, nearest first.

    Raises:
        ConfigError: If `out` exists, or onnxruntime is asked for and not installed.
        DataError: If the bundle or an image cannot be read.
    """
    out = _new_picture(out)
    encoded = [_read_image(image) for image in images]
    bundle = read_bundle(path)
    inputs = _inputs(bundle, encoded, images)
    found = nearest(bundle, embed_images(bundle, inputs, runtime), top)
    for image, neighbors in zip(images, found, strict=True):
        _print(image, bundle, neighbors, console)
    tiles = [
        [Tile(data, image.name, "query"), *(_tile(bundle, item) for item in neighbors)]
        for image, data, neighbors in zip(images, encoded, found, strict=True)
    ]
    title = f"{bundle.manifest.name}: nearest of {len(bundle.keys):,} images, {_measure(bundle)}"
    is_whole = write_picture(out, tiles, title)
    cut = "" if is_whole else " (its beginning; the tables hold all)"
    console.print(f"picture: {out}{cut}", highlight=False, soft_wrap=True)
    return found


def nearest(bundle: Bundle, embeddings_QD: Tensor, top: int) -> list[list[Found]]:
    """Return the nearest gallery images of embeddings, exactly as an evaluation orders them.

    Args:
        bundle: The gallery.
        embeddings_QD: (Q, D) floats, normalised or not.
        top: Neighbours of each, >= 1; fewer where the gallery ends.

    Raises:
        DataError: If an embedding is not finite.
    """
    if not bool(embeddings_QD.isfinite().all()):
        raise DataError(
            f"required finite embeddings, got others from the network of {bundle.path}; train the "
            "run with a lower learning rate and export it anew"
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
    # The queries are no rows of the gallery: their numbers are none of its own.
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
        bundle: Whose network.
        images: (Q, 3, H, W) float32.
        runtime: As in `run_search`.

    Raises:
        ConfigError: If the runtime is not installed.
    """
    installed = importlib.util.find_spec("onnxruntime") is not None
    match runtime:
        case "onnxruntime" if not installed:
            raise ConfigError(
                "required the package onnxruntime, which is not installed; install the extra: "
                "pip install 'dml-dist[export]', or give --runtime torch"
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
            f"required the weights of the bundle's network in {bundle.path / WEIGHTS}, got other "
            f"ones ({str(error)[:300]}); export the run anew"
        ) from None
    embedder = Embedder(model, bundle.manifest.normalized).eval()
    return torch.no_grad()(embedder)


# ---------------------------------------------------------------- in and out


def _new_picture(out: Path | None) -> Path:
    """Return where the picture goes; nothing that exists is written over."""
    if out is None:
        names = ["search.png", *(f"search-{number}.png" for number in range(2, 10_000))]
        return next(path for name in names if not (path := Path(name).absolute()).exists())
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out must be the name of a PNG file, got {out}; end it in .png")
    if out.exists():
        raise ConfigError(
            f"required a new file for the picture, got {out}, which exists; give another --out, "
            "or remove it"
        )
    if not out.absolute().parent.is_dir():
        raise ConfigError(
            f"required a folder for the picture, got {out}, whose folder does not exist; make it"
        )
    return out.absolute()


def _read_image(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"required an image file, got {path}: {error.strerror or error}; give the path of a "
            "JPEG, PNG or another image"
        ) from None


def _inputs(bundle: Bundle, encoded: Sequence[bytes], images: Sequence[Path]) -> Tensor:
    transform = build_transform(bundle.transform)
    views = [
        transform.evaluation(decode_image(data, str(path)))
        for data, path in zip(encoded, images, strict=True)
    ]
    return torch.stack(views)


def _tile(bundle: Bundle, found: Found) -> Tile:
    return Tile(bundle.thumbnails[found.row], found.class_name, _shown(found.distance))


def _measure(bundle: Bundle) -> str:
    return "2 - 2 cosine" if bundle.manifest.distance == "cosine" else "squared distance"


def _shown(distance: float) -> str:
    """Return a distance with four digits; below 1e-9 rows are equal but for rounding."""
    return f"{distance:.4f}" if distance >= 0.01 or distance < 1e-9 else f"{distance:.1e}"


def _print(image: Path, bundle: Bundle, neighbors: Sequence[Found], console: Console) -> None:
    table = Table("#", title=escape(str(image)), title_justify="left")
    table.add_column("class", overflow="fold")
    table.add_column(_measure(bundle))
    table.add_column("key", overflow="fold")
    for place, item in enumerate(neighbors, start=1):
        texts = (escape(item.class_name), _shown(item.distance), escape(item.key))
        table.add_row(str(place), *texts)
    console.print(table)
