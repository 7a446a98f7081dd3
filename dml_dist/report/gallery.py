"""The retrieval gallery: a few queries with their nearest images, saved as thumbnails.

report/retrieval.json    queries and neighbors: row, class, distance, hit, file of the image; and
                         the best and the worst classes, each with some of its queries
report/images/           one thumbnail per image, named after its row
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dml_dist.config.data import ExifRule
from dml_dist.data.pixels import open_image, rgb_image
from dml_dist.errors import DataError
from dml_dist.files import read_json, write_bytes_atomic, write_json_atomic
from dml_dist.random_streams import Stream, generator_of
from dml_dist.runs.folder import RunFolder

THUMBNAIL_SIZE = 160  # pixels of the longer side: sharp at 80 CSS pixels on a phone
_SMALL = 64  # up to this side an image is saved without loss
_KEPT_FORMATS = {"PNG": "png", "JPEG": "jpg"}
_PLAIN_MODES = ("1", "L", "P", "RGB")


@dataclass(frozen=True, eq=False)
class GalleryNeighbor:
    """An image that a query found.

    Attributes:
        row: Its row of the index.
        class_name: Its class.
        distance: Its distance from the query.
        hit: Whether it is of the query's class.
        image: An encoded image, or uint8 pixels (H, W) or (H, W, 3).
    """

    row: int
    class_name: str
    distance: float
    hit: bool
    image: bytes | np.ndarray


@dataclass(frozen=True, eq=False)
class GalleryQuery:
    """A query with its nearest images, the nearest first; `image` as in GalleryNeighbor."""

    row: int
    class_name: str
    image: bytes | np.ndarray
    neighbors: tuple[GalleryNeighbor, ...]

    @property
    def is_hit(self) -> bool:
        """Whether the nearest image is a hit."""
        return bool(self.neighbors) and self.neighbors[0].hit


@dataclass(frozen=True, eq=False)
class GalleryClass:
    """A class whose queries hit most often, or least often.

    Attributes:
        class_name: Its name.
        recall_at_1: Share of its queries that hit, in [0, 1].
        num_queries: Its counted queries.
        worst: Whether it is one of the worst classes, else of the best.
        queries: Some of its queries.
    """

    class_name: str
    recall_at_1: float
    num_queries: int
    worst: bool
    queries: tuple[GalleryQuery, ...]


@dataclass(frozen=True, eq=False)
class Gallery:
    """Queries and classes that the report shows.

    Attributes:
        queries: Queries of any class, misses and hits.
        classes: The worst classes, the worst first, then the best ones, the best first.
    """

    queries: tuple[GalleryQuery, ...]
    classes: tuple[GalleryClass, ...] = ()


def choose_queries(first_hit: np.ndarray, count: int, seed: int, *indices: int) -> np.ndarray:
    """Draw the queries of a gallery: as far as possible as many misses as hits.

    Args:
        first_hit: (Q,) bool, whether each query's nearest image is a hit.
        count: Number of queries wanted.
        seed: Seed of the draw.
        indices: Tell draws with the same seed apart.

    Returns:
        (min(count, Q),) int64 positions, misses first, in rising order each.
    """
    generator = generator_of(Stream.GALLERY, seed, *indices)
    misses, hits = (generator.permutation(np.flatnonzero(first_hit == hit)) for hit in (0, 1))
    num_misses = min(len(misses), max(count // 2, count - len(hits)))
    chosen = np.sort(misses[:num_misses]), np.sort(hits[: count - num_misses])
    return np.concatenate(chosen).astype(np.int64)


def write_gallery(
    run_dir: Path,
    queries: Sequence[GalleryQuery],
    classes: Sequence[GalleryClass] = (),
    *,
    exif: ExifRule = "apply",
) -> None:
    """Write queries and classes, with thumbnails of their images, to a run's folder.

    Args:
        run_dir: The folder.
        queries: Queries of any class.
        classes: The best and the worst classes.
        exif: Whether encoded images are turned by their EXIF orientation, as for the network.

    Raises:
        DataError: If an image cannot be decoded.
        ValueError: If pixels are not uint8 of shape (H, W) or (H, W, 3).
    """
    report_dir = RunFolder(run_dir).report_dir
    images = report_dir / "images"
    images.mkdir(parents=True, exist_ok=True)
    written: dict[int, str] = {}

    def entry(item: GalleryQuery | GalleryNeighbor) -> dict[str, Any]:
        if item.row not in written:
            data, extension = _thumbnail(item.image, item.row, exif)
            written[item.row] = f"{item.row}.{extension}"
            write_bytes_atomic(images / written[item.row], data)
        return {
            "row": item.row,
            "class": item.class_name,
            "image": f"images/{written[item.row]}",
        }

    def content(some: Sequence[GalleryQuery]) -> list[dict[str, Any]]:
        return [
            {
                "query": entry(query),
                "neighbors": [
                    {**entry(neighbor), "distance": neighbor.distance, "hit": neighbor.hit}
                    for neighbor in query.neighbors
                ],
            }
            for query in some
        ]

    of_classes = [
        {
            "class": item.class_name,
            "recall_at_1": item.recall_at_1,
            "num_queries": item.num_queries,
            "worst": item.worst,
            "queries": content(item.queries),
        }
        for item in classes
    ]
    whole = {"queries": content(queries), "classes": of_classes}
    write_json_atomic(report_dir / "retrieval.json", whole)
    for path in images.iterdir():  # of an earlier gallery
        if path.name not in written.values():
            path.unlink()


def read_gallery(run_dir: Path) -> Gallery | None:
    """Return the gallery that `write_gallery` wrote, None when there is none.

    A thumbnail that is missing reads as empty bytes.

    Raises:
        DataError: If retrieval.json is damaged.
    """
    report_dir = RunFolder(run_dir).report_dir
    path = report_dir / "retrieval.json"
    if not path.is_file():
        return None

    def image(entry: dict[str, Any]) -> bytes:
        # Only the name is used, so that no file outside of the folder gets into the page.
        file = report_dir / "images" / Path(entry["image"]).name
        return file.read_bytes() if file.is_file() else b""

    def neighbor(entry: dict[str, Any]) -> GalleryNeighbor:
        distance, hit = float(entry["distance"]), bool(entry["hit"])
        return GalleryNeighbor(int(entry["row"]), entry["class"], distance, hit, image(entry))

    def queries(entries: list[dict[str, Any]]) -> tuple[GalleryQuery, ...]:
        return tuple(
            GalleryQuery(
                int(entry["query"]["row"]),
                entry["query"]["class"],
                image(entry["query"]),
                tuple(neighbor(found) for found in entry["neighbors"]),
            )
            for entry in entries
        )

    try:
        content = read_json(path)
        classes = tuple(
            GalleryClass(
                entry["class"],
                float(entry["recall_at_1"]),
                int(entry["num_queries"]),
                bool(entry["worst"]),
                queries(entry["queries"]),
            )
            for entry in content.get("classes", ())
        )
        return Gallery(queries(content["queries"]), classes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"the retrieval gallery {path} is damaged ({error!r}); resume the run to write it "
            "again, or delete the file"
        ) from None


def _is_plain(picture: Image.Image) -> bool:
    """Whether a browser shows an image as training sees it: not blended, not rotated."""
    return (
        picture.format in _KEPT_FORMATS
        and picture.mode in _PLAIN_MODES
        and "transparency" not in picture.info
        and not picture.getexif()
    )


def _thumbnail(image: bytes | np.ndarray, row: int, exif: ExifRule) -> tuple[bytes, str]:
    """Return an image of THUMBNAIL_SIZE at most, encoded, and its file extension."""
    if isinstance(image, np.ndarray):
        shape = image.shape
        if image.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[2] == 3)):
            raise ValueError(
                f"pixels of row {row} must be uint8 of shape (H, W) or (H, W, 3), got "
                f"{image.dtype} {shape}"
            )
        picture: Image.Image = Image.fromarray(image)
    else:
        try:
            picture = open_image(image)
            picture.load()
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(
                f"the image of row {row} cannot be decoded for the retrieval gallery ({error}; "
                f"{len(image)} bytes); run `dml-dist data verify` on the data set"
            ) from None
        if max(picture.size) <= THUMBNAIL_SIZE and _is_plain(picture):
            return image, _KEPT_FORMATS[str(picture.format)]
    picture = rgb_image(picture, exif)
    picture.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.LANCZOS)
    kind = "PNG" if max(picture.size) <= _SMALL else "JPEG"
    file = io.BytesIO()
    picture.save(file, kind, quality=85)
    return file.getvalue(), _KEPT_FORMATS[kind]
