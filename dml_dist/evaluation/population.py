"""The rows to evaluate: validation of this rank's part, and facts about the rows of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dml_dist.errors import DataError
from dml_dist.parallel.comm import Comm

Array = np.ndarray | Tensor

_ROLE_BITS = {"query": 1, "gallery": 2, "both": 3}


@dataclass(frozen=True, eq=False)
class LocalRows:
    """One rank's validated rows, in global row order.

    Attributes:
        embeddings_ND: Finite rows of a floating type, on the search device.
        labels_N: int64.
        role_N: int64; bit 0 is a query, bit 1 is in the gallery.
    """

    embeddings_ND: Tensor
    labels_N: Tensor
    role_N: Tensor


@dataclass(frozen=True, eq=False)
class Population:
    """Facts about the rows of all ranks, the same on every rank; rows are global.

    Attributes:
        sizes: Rows of each rank.
        label_C: Label of each dense class, int64, increasing.
        class_N: Dense class of each row, int64, in increasing order of labels.
        num_relevant_N: Gallery rows of the same class without the row itself, int64.
        is_query_N: Whether the row is a query, lone ones included.
        is_gallery_N: Whether the row is in the gallery.
    """

    sizes: tuple[int, ...]
    label_C: np.ndarray
    class_N: np.ndarray
    num_relevant_N: np.ndarray
    is_query_N: np.ndarray
    is_gallery_N: np.ndarray

    def part(self, rank: int) -> tuple[int, int]:
        """Return the bounds of a rank's rows."""
        low = sum(self.sizes[:rank])
        return low, low + self.sizes[rank]

    def counted_queries(self, rank: int) -> np.ndarray:
        """Return a rank's queries with R >= 1, those with small R first."""
        low, high = self.part(rank)
        counted = self.is_query_N[low:high] & (self.num_relevant_N[low:high] > 0)
        row_Q = low + np.flatnonzero(counted)
        return row_Q[np.argsort(self.num_relevant_N[row_Q], kind="stable")]

    @property
    def num_gallery(self) -> int:
        """Rows of the gallery."""
        return int(np.count_nonzero(self.is_gallery_N))

    @property
    def num_lone_queries(self) -> int:
        """Queries without any other gallery row of their class."""
        return int(np.count_nonzero(self.is_query_N & (self.num_relevant_N == 0)))


def check_rows(
    embeddings: Array, labels: Array, roles: Sequence[str] | np.ndarray | None, device: torch.device
) -> LocalRows:
    """Validate one rank's rows, and return them as tensors on the search device.

    Raises:
        DataError: If shapes or types are wrong, or a value is not finite.
    """
    embeddings_ND = torch.as_tensor(embeddings).detach()
    if embeddings_ND.ndim != 2 or not embeddings_ND.is_floating_point():
        raise DataError(
            "embeddings must be a floating-point matrix (rows, width), but have shape "
            f"{tuple(embeddings_ND.shape)} and dtype {embeddings_ND.dtype}; pass one row per image"
        )
    num_rows = embeddings_ND.shape[0]
    embeddings_ND = embeddings_ND.to(device)
    _check_finite(embeddings_ND)
    role_N = np.full(num_rows, 3) if roles is None else _check_roles(roles, num_rows)
    labels_N = _check_labels(labels, num_rows).to(device)
    return LocalRows(embeddings_ND, labels_N, torch.from_numpy(role_N).to(device))


def gather_population(local: LocalRows, comm: Comm) -> Population:
    """Return the facts about all rows; every rank calls this.

    Raises:
        DataError: If ranks disagree on the width, or no query has a gallery row of its class.
    """
    shapes = comm.gather_objects(tuple(local.embeddings_ND.shape), what="gather shapes")
    sizes = tuple(rows for rows, _ in shapes)
    if len({width for rows, width in shapes if rows}) > 1:
        raise DataError(
            f"the embedding width differs between ranks; the shapes in rank order are {shapes}; "
            "embed every part with the same model"
        )
    labels_N = comm.all_gather_rows(local.labels_N, sizes, what="gather labels").cpu().numpy()
    role_N = comm.all_gather_rows(local.role_N, sizes, what="gather roles").cpu().numpy()
    is_query_N, is_gallery_N = (role_N & 1) > 0, (role_N & 2) > 0
    label_C, class_N = np.unique(labels_N, return_inverse=True)
    class_N = class_N.astype(np.int64)
    in_gallery = np.bincount(class_N[is_gallery_N], minlength=len(label_C))
    num_relevant_N = in_gallery[class_N] - is_gallery_N
    population = Population(sizes, label_C, class_N, num_relevant_N, is_query_N, is_gallery_N)
    if population.num_lone_queries == np.count_nonzero(is_query_N):
        raise DataError(
            "nothing to evaluate: no query has another gallery row of its class, with "
            f"{np.count_nonzero(is_query_N)} queries and {population.num_gallery} gallery rows; "
            "check labels and roles"
        )
    return population


def check_super_classes(
    super_classes: Sequence[str] | np.ndarray | None, num_rows: int
) -> np.ndarray:
    """Return the super-class of each row of this rank, "" for none.

    Raises:
        DataError: If their number is not that of the rows.
    """
    if super_classes is None:
        return np.full(num_rows, "")
    names = np.asarray(super_classes, dtype=str)
    if names.shape != (num_rows,):
        raise DataError(
            f"super_classes must have one super-class for each of {num_rows} embeddings, but has "
            f'shape {names.shape}; use "" for rows without one'
        )
    return names


def gather_super_classes(names: np.ndarray, population: Population, comm: Comm) -> np.ndarray:
    """Return the super-class of each row of all ranks, int64, -1 for none; every rank calls this.

    Args:
        names: Super-class of each row of this rank, "" for none.
        population: The rows of all ranks.
        comm: The ranks.
    """
    distinct, local_N = np.unique(names, return_inverse=True)
    gathered = comm.gather_objects(distinct.tolist(), what="gather names of super-classes")
    every = sorted({name for part in gathered for name in part if name})
    code = {name: number for number, name in enumerate(every)} | {"": -1}
    codes = np.array([code[str(name)] for name in distinct], dtype=np.int64)
    part_N = torch.from_numpy(codes[local_N]).to(comm.device)
    super_N = comm.all_gather_rows(part_N, population.sizes, what="gather super-classes")
    return super_N.cpu().numpy()


def _check_finite(embeddings_ND: Tensor) -> None:
    # Rows are stored as float32, so a float64 value beyond its range is an error as well.
    finite_N = torch.isfinite(embeddings_ND.to(torch.float32)).all(dim=1)
    if bool(finite_N.all()):
        return
    bad = (~finite_N).nonzero()[:, 0]
    row = embeddings_ND[bad[0]]
    column = int((~torch.isfinite(row.to(torch.float32))).nonzero()[0, 0])
    raise DataError(
        f"embeddings are not finite: {float(row[column])} in row {int(bad[0])}, column {column} "
        f"({len(bad)} of {len(finite_N)} rows are affected); check for a diverged model or a "
        "broken image"
    )


def _check_labels(labels: Array, num_rows: int) -> Tensor:
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.size == 0:
        values = values.astype(np.int64)
    if values.dtype.kind == "f" and values.shape == (num_rows,):
        values = _whole_labels(values)
    if values.shape != (num_rows,) or values.dtype.kind not in "iu":
        raise DataError(
            f"labels must be one integer for each of {num_rows} embeddings, but have shape "
            f"{values.shape} and dtype {values.dtype}; pass int64 labels"
        )
    if values.dtype == np.uint64 and (values > np.iinfo(np.int64).max).any():
        raise DataError(f"label {values.max()} does not fit into int64; renumber the classes")
    return torch.from_numpy(values.astype(np.int64))


def _whole_labels(values: np.ndarray) -> np.ndarray:
    """Return floats that are whole numbers as int64: 3.0 is the label 3, as in data sets."""
    # Beyond this, neighboring integers are one float.
    largest = 2.0 ** (np.finfo(values.dtype).nmant + 1)
    wide = values.astype(np.float64)
    whole = np.isfinite(wide) & (np.floor(wide) == wide) & (np.abs(wide) <= largest)
    if not whole.all():
        row = int(np.flatnonzero(~whole)[0])
        raise DataError(
            f"label {values[row]} in row {row} is not a whole number; pass int64 labels"
        )
    return values.astype(np.int64)


def _check_roles(roles: Sequence[str] | np.ndarray, num_rows: int) -> np.ndarray:
    if len(roles) != num_rows:
        raise DataError(
            f"roles has {len(roles)} entries for {num_rows} embeddings; pass query, gallery or "
            "both for each row"
        )
    names, inverse = np.unique(np.asarray(roles, dtype=str), return_inverse=True)
    unknown = [str(name) for name in names if name not in _ROLE_BITS]
    if unknown:
        row = int(np.flatnonzero(np.asarray(roles, dtype=str) == unknown[0])[0])
        raise DataError(f"unknown role {unknown[0]!r} in row {row}; use query, gallery or both")
    return np.array([_ROLE_BITS[str(name)] for name in names], dtype=np.int64)[inverse]
