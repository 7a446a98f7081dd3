"""Contiguous partition of a range: the only rule for sharding rows, batches and classes.

Part `r` of `W` of `n` items is `floor(r n / W) .. floor((r + 1) n / W) - 1`. Part
sizes differ by at most one, parts cover every item once, and depend on these three integers only.
"""

from __future__ import annotations


def part_bounds(total: int, num_parts: int, part: int) -> tuple[int, int]:
    """Return the half-open bounds `(low, high)` of one part.

    Args:
        total: Number of items, >= 0.
        num_parts: Number of parts, >= 1.
        part: Index of the part, 0 .. num_parts - 1.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if total < 0 or num_parts < 1 or not 0 <= part < num_parts:
        raise ValueError(
            "total must be >= 0 and part in 0 .. num_parts - 1, but they are "
            f"total={total}, num_parts={num_parts}, part={part}"
        )
    return part * total // num_parts, (part + 1) * total // num_parts


def all_bounds(total: int, num_parts: int) -> list[tuple[int, int]]:
    """Return the bounds of every part, in order."""
    return [part_bounds(total, num_parts, part) for part in range(num_parts)]


def part_sizes(total: int, num_parts: int) -> list[int]:
    """Return the number of items of every part, in order."""
    return [high - low for low, high in all_bounds(total, num_parts)]


def part_of(item: int, total: int, num_parts: int) -> int:
    """Return the part that holds `item`: the inverse of `part_bounds`."""
    if not 0 <= item < total:
        raise ValueError(f"item {item} is not in 0 .. total - 1 with total {total}")
    return ((item + 1) * num_parts - 1) // total
