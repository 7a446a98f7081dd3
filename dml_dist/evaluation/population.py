"""The rows that are evaluated: this rank's part, checked, and what every rank knows of all rows."""

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
    """One rank's checked rows, in global row order.

    Attributes:
        embeddings_ND: Finite rows of a floating type, on the device that searches.
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
        label_C: Label of each dense class, int64, rising.
        class_N: Dense class of each row, int64, in rising order of labels.
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
    """Return one rank's rows as tensors on the device that searches.

    Raises:
        DataError: If shapes or types are wrong, or a value is not finite.
    """
    embeddings_ND = torch.as_tensor(embeddings).detach()
    if embeddings_ND.ndim != 2 or not embeddings_ND.is_floating_point():
        raise DataError(
            f"required embeddings of shape (rows, width) and a floating type, got "
            f"{tuple(embeddings_ND.shape)} of {embeddings_ND.dtype}; pass one row an image"
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
            f"required embeddings of one width on all ranks, got shapes {shapes} in rank order; "
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
            "required at least one query with another gallery row of its class, got "
            f"{np.count_nonzero(is_query_N)} queries, {population.num_gallery} gallery "
            "rows and no such pair; check labels and roles"
        )
    return population


def check_super_classes(
    super_classes: Sequence[str] | np.ndarray | None, num_rows: int
) -> np.ndarray:
    """Return the super-class of each row of this rank, "" for none.

    Raises:
        DataError: If there is not one for each row.
    """
    if super_classes is None:
        return np.full(num_rows, "")
    names = np.asarray(super_classes, dtype=str)
    if names.shape != (num_rows,):
        raise DataError(
            f"required one super-class for each of {num_rows} embeddings, got an array of shape "
            f'{names.shape}; give a name, or "" for none'
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
    # The float32 form is what is stored: a float64 value beyond its range is refused as well.
    finite_N = torch.isfinite(embeddings_ND.to(torch.float32)).all(dim=1)
    if bool(finite_N.all()):
        return
    bad = (~finite_N).nonzero()[:, 0]
    row = embeddings_ND[bad[0]]
    column = int((~torch.isfinite(row.to(torch.float32))).nonzero()[0, 0])
    raise DataError(
        f"required finite embeddings, got {float(row[column])} in row {int(bad[0])}, column "
        f"{column} ({len(bad)} of {len(finite_N)} rows are affected); look for a diverged model "
        "or a broken image"
    )


def _check_labels(labels: Array, num_rows: int) -> Tensor:
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.size == 0:
        values = values.astype(np.int64)
    if values.shape != (num_rows,) or values.dtype.kind not in "iu":
        raise DataError(
            f"required one integer label for each of {num_rows} embeddings, got an array of shape "
            f"{values.shape} and type {values.dtype}; give int64 labels"
        )
    if values.dtype == np.uint64 and (values > np.iinfo(np.int64).max).any():
        raise DataError(
            f"required labels that fit int64, got {values.max()}; number the classes anew"
        )
    return torch.from_numpy(values.astype(np.int64))


def _check_roles(roles: Sequence[str] | np.ndarray, num_rows: int) -> np.ndarray:
    if len(roles) != num_rows:
        raise DataError(
            f"required one role for each of {num_rows} embeddings, got {len(roles)}; "
            "give query, gallery or both"
        )
    names, inverse = np.unique(np.asarray(roles, dtype=str), return_inverse=True)
    unknown = [str(name) for name in names if name not in _ROLE_BITS]
    if unknown:
        row = int(np.flatnonzero(np.asarray(roles, dtype=str) == unknown[0])[0])
        raise DataError(
            f"required roles out of query, gallery, both, got {unknown[0]!r} in row {row}; "
            "correct the role column"
        )
    return np.array([_ROLE_BITS[str(name)] for name in names], dtype=np.int64)[inverse]
