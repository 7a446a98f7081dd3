"""Search for duplicate images: the same bytes, or nearly the same picture across splits.

A test image that training has seen, or a second copy of it in the gallery, is a hit that says
nothing about a model. Every image is listed once for each other split, with its nearest copy there,
so lists stay as short as the data set, however many copies there are of one image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dml_dist.data.fingerprint import NEAR_BITS, NEAR_SHARE

# Fingerprints compared at once: 2^18 pairs, whose intermediate results fit into a core's cache.
_QUERIES, _OTHERS = 64, 4096


@dataclass(frozen=True, eq=False)
class Copies:
    """Images of a split that have a copy in another split, or an earlier one in their own."""

    split: str
    other_split: str

    num_images: int
    """Of `split`, with and without copies."""

    rows: np.ndarray
    """(n,) int64 rising rows of images in `split`."""

    other_rows: np.ndarray
    """(n,) int64, the nearest image in `other_split`; the lowest row of equally near ones."""

    bits: np.ndarray
    """(n,) int64 differing bits of the fingerprints, 0 .. NEAR_BITS; -1: the same bytes."""

    @property
    def num_exact(self) -> int:
        """Number of images whose very bytes are in the other split."""
        return int((self.bits < 0).sum())

    @property
    def num_near(self) -> int:
        """Number of the others."""
        return int((self.bits >= 0).sum())


def find_copies(
    split: np.ndarray, digests: np.ndarray, fingerprints: np.ndarray, has_fingerprint: np.ndarray
) -> list[Copies]:
    """Find exact copies everywhere and near-duplicates across splits.

    Of two splits the images of the later one are looked for in the earlier one: `train` first, the
    others by name. Fingerprints of two splits are compared in blocks, all pairs whose numbers of
    set bits are near: of two splits of 60,000 in 1 s on one core, 40 s if all images are alike.

    Args:
        split: Split of each image, (N,) str.
        digests: Digest of each image's bytes, (N,) bytes or str.
        fingerprints: (N, 2) uint64.
        has_fingerprint: (N,) bool; images without are compared by their bytes only.

    Returns:
        One item for each split and each pair of splits, those without copies included.
    """
    names = sorted(set(split.tolist()), key=lambda name: (name != "train", name))
    rows_of = {name: np.flatnonzero(split == name) for name in names}
    found = []
    for later, name in enumerate(names):
        rows = rows_of[name]
        found.append(_repeated(name, rows, digests))
        for other_name in names[:later]:
            others = rows_of[other_name]
            exact = _same_bytes(digests[rows], digests[others])
            left = has_fingerprint[rows] & (exact < 0)
            seen = has_fingerprint[others]
            near, bits = nearest(fingerprints[rows[left]], fingerprints[others[seen]])
            partner = np.where(exact >= 0, others[exact], -1)
            distance = np.full(len(rows), -1, dtype=np.int64)
            partner[left] = np.where(near >= 0, others[seen][near], -1) if seen.any() else -1
            distance[left] = bits
            hit = partner >= 0
            found.append(
                Copies(name, other_name, len(rows), rows[hit], partner[hit], distance[hit])
            )
    return found


def nearest(queries: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest fingerprint of each query that counts as a near-duplicate.

    Args:
        queries: (n, 2) uint64.
        others: (m, 2) uint64.

    Returns:
        (n,) int64 positions in `others`, the lowest of equally near ones, -1 where none is near
        enough; (n,) int64 differing bits.
    """
    found = np.full(len(queries), -1, dtype=np.int64)
    bits = np.full(len(queries), NEAR_BITS + 1, dtype=np.int64)
    # Fingerprints that differ in d bits have numbers of set bits that differ by at most d, so
    # sorted by it most pairs need not be looked at.
    query_ones, other_ones = _ones(queries), _ones(others)
    query_order = np.argsort(query_ones, kind="stable")
    other_order = np.argsort(other_ones, kind="stable")
    sorted_others, sorted_ones = others[other_order], other_ones[other_order]
    for low in range(0, len(queries), _QUERIES):
        at = query_order[low : low + _QUERIES]
        first, last = int(query_ones[at[0]]), int(query_ones[at[-1]])
        begin = int(np.searchsorted(sorted_ones, first - NEAR_BITS))
        end = int(np.searchsorted(sorted_ones, last + NEAR_BITS, side="right"))
        for start in range(begin, end, _OTHERS):
            stop = min(start + _OTHERS, end)
            block = sorted_others[start:stop]
            difference = np.bitwise_count(queries[at, None, 0] ^ block[None, :, 0])
            difference += np.bitwise_count(queries[at, None, 1] ^ block[None, :, 1])
            for query in np.flatnonzero(difference.min(axis=1) <= NEAR_BITS).tolist():
                row = difference[query].astype(np.int64)
                simpler = np.minimum(query_ones[at[query]], sorted_ones[start:stop])
                near = np.flatnonzero(row <= np.minimum(NEAR_BITS, simpler // NEAR_SHARE))
                if near.size:
                    distance = int(row[near].min())
                    other = int(other_order[start:stop][near[row[near] == distance]].min())
                    best = (int(bits[at[query]]), int(found[at[query]]))
                    bits[at[query]], found[at[query]] = min(best, (distance, other))
    return found, bits


def _ones(fingerprints: np.ndarray) -> np.ndarray:
    return np.bitwise_count(fingerprints).sum(axis=1, dtype=np.int64)


def _same_bytes(digests: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the first position in `others` of each digest, (n,) int64, -1 where there is none."""
    first: dict[object, int] = {}
    for at, digest in enumerate(others.tolist()):
        first.setdefault(digest, at)
    return np.array([first.get(digest, -1) for digest in digests.tolist()], dtype=np.int64)


def _repeated(name: str, rows: np.ndarray, digests: np.ndarray) -> Copies:
    """Return the images of a split whose bytes an earlier image of it has."""
    first = _same_bytes(digests[rows], digests[rows])
    again = first < np.arange(len(rows))
    return Copies(
        name,
        name,
        len(rows),
        rows[again],
        rows[first[again]],
        np.full(int(again.sum()), -1, dtype=np.int64),
    )
