"""Expected counts of a data set: used for dry runs, and checked on import."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from dml_dist.config.data import CountsConfig, FolderConfig, TableConfig
from dml_dist.data.sample import DatasetFacts, Sample, facts_of
from dml_dist.errors import DataError


def expected_facts(config: FolderConfig | TableConfig) -> DatasetFacts | None:
    """Return the expected counts of a source that does not exist.

    None if the source exists, or no counts are configured.
    """
    if config.expected is None or os.path.exists(config.source):
        return None
    sizes = {
        split: spread(counts.classes, counts.images) for split, counts in config.expected.items()
    }
    return DatasetFacts(sizes, exact=False)


def check_expected(
    expected: Mapping[str, CountsConfig] | None, samples: Sequence[Sample], source: str
) -> None:
    """Check the number of classes and images of each split.

    Raises:
        DataError: If any differs from the expected number; all differences are listed.
    """
    if expected is None:
        return
    sizes = facts_of(samples).class_sizes
    problems = []
    for split in [*expected, *(split for split in sizes if split not in expected)]:
        wanted = _counts(expected[split]) if split in expected else "nothing"
        of_split = sizes.get(split)
        found = "nothing" if of_split is None else _count_text(len(of_split), sum(of_split))
        if wanted != found:
            problems.append(f"{split}: expected {wanted}, found {found}")
    if problems:
        raise DataError(
            f"{source} differs from data.dataset.expected in {'; '.join(problems)}; correct the "
            "source or the expected counts"
        )


def spread(num_classes: int, num_images: int) -> tuple[int, ...]:
    """Return an estimate of class sizes: images spread evenly, sizes differ by at most one."""
    each, rest = divmod(num_images, num_classes)
    return (each + 1,) * rest + (each,) * (num_classes - rest)


def _counts(counts: CountsConfig) -> str:
    return _count_text(counts.classes, counts.images)


def _count_text(num_classes: int, num_images: int) -> str:
    return f"{num_images:,} images of {num_classes:,} classes"
