"""Write a data set as tar shards with their index; an interrupted import continues.

The order of images is a seeded draw inside each split, so a tar shard mixes classes and holds one
split. Which bytes are in which tar shard depends on the samples, the seed and the shard size
only, never on the processes: an import that was cut off and continued ends byte for byte equal to
one that was not. Until the index is written, `.import/` holds the plan (plan.json) and, for each
finished tar shard, where its images are. With the index it writes a summary and its lists
(`dml_dist.data.import_summary`).

Labels are numbered before any image is read. Where every image of a class is skipped as broken, the
index closes the gap, as indexing such tar shards again would, and their .cls members keep it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dml_dist.data.duplicates import find_copies
from dml_dist.data.import_summary import (
    DUPLICATES_NAME,
    SKIPPED_NAME,
    SUMMARY_NAME,
    SkippedImage,
    read_summary,
    write_summary,
)
from dml_dist.data.index import (
    INDEX_NAME,
    PROGRESS_FOLDER,
    Index,
    import_description,
    import_digest,
    read_index,
    write_index,
)
from dml_dist.data.labels import class_text, class_texts, optional_texts
from dml_dist.data.pool import run_tasks
from dml_dist.data.sample import Importer, Sample, check_samples, class_order
from dml_dist.data.tar_shard import OnBroken, ShardTask, is_complete, write_tar_shard
from dml_dist.errors import DataError
from dml_dist.files import read_json, write_json_atomic
from dml_dist.partition import all_bounds
from dml_dist.random_streams import Stream, generator_of

# Part of the digest: an import begun by code that writes other bytes is not continued.
_FORMAT = 2
# An import continues after broken images, to list them in one run, up to this number.
_MAX_PROBLEMS = 20


@dataclass(frozen=True)
class _Plan:
    """The order of images in tar shards."""

    tasks: list[ShardTask]
    class_names: list[str]
    num_images: int

    digest: str
    """Of everything that the bytes depend on."""

    outline: str
    """The same without the images: an unfinished import may continue after one was replaced."""


def import_dataset(
    importer: Importer,
    out: Path,
    *,
    seed: int = 0,
    samples_per_shard: int = 1000,
    max_side: int | None = None,
    on_broken: OnBroken = "raise",
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    description: str = "",
) -> Index:
    """Write the images of a data set into tar shards, then their index.

    A folder that holds this import is read; one that holds a part of it is completed. What the
    import skipped and which images are duplicates is read with
    `dml_dist.data.import_summary.read_summary`.

    Args:
        importer: The data set.
        out: Folder to write into; made when missing.
        seed: Seed of the order of images.
        samples_per_shard: Largest number of images in a tar shard, >= 1.
        max_side: Images with a longer side of more pixels are shrunk to it once, bicubically, and
            stored as JPEG of quality 95; all others are stored byte for byte. None keeps all.
        on_broken: Whether an image that cannot be decoded or does not exist ends the import, or is
            skipped and named in the summary.
        processes: Number of writer processes; None takes one for each CPU core.
        progress: Called with (images written, all images), at the start and after each tar shard.
        description: Kept with the index (`dml_dist.data.index.import_description`); it does not
            tell one import from another.

    Returns:
        The index, also written to `out`/index.parquet.

    Raises:
        DataError: If a sample is not acceptable, an image is broken (all that were met are named)
            and not to be skipped, no image is left, or `out` holds another data set.
        RunError: If a writer process was killed.
    """
    if samples_per_shard < 1:
        raise DataError(f"samples_per_shard must be at least 1, got {samples_per_shard}")
    if max_side is not None and max_side < 1:
        raise DataError(f"max_side must be at least 1 pixel, got {max_side}")
    plan = _make_plan(importer.samples(), out, seed, samples_per_shard, max_side, on_broken)
    if (index := _finished(plan, out, description, progress)) is not None:
        return _accepted(index, on_broken)
    folder = out / PROGRESS_FOLDER
    with _lock(folder):
        if (out / INDEX_NAME).exists():  # another import has ended since
            shutil.rmtree(folder, ignore_errors=True)
        if (index := _finished(plan, out, description, progress)) is not None:
            return _accepted(index, on_broken)
        for name in ("*.tar", INDEX_NAME, SUMMARY_NAME, SKIPPED_NAME, DUPLICATES_NAME):
            for leftover in out.glob(f".{name}.*.tmp"):
                leftover.unlink()
        write_json_atomic(folder / "plan.json", {"outline": plan.outline})
        _write_missing(plan, processes, progress)
        index = _collect_index(plan, out)
        _summarise(plan, index)
        write_index(index, digest=plan.digest, description=description)
        shutil.rmtree(folder, ignore_errors=True)
    return index


def _finished(
    plan: _Plan, out: Path, description: str, progress: Callable[[int, int], None] | None
) -> Index | None:
    """Return the index if `out` holds this finished import, None if it is still to be made.

    Raises:
        DataError: If `out` holds something else.
    """
    if import_digest(out) != plan.digest:
        _refuse_other_data(out, plan.outline)
        return None
    shutil.rmtree(out / PROGRESS_FOLDER, ignore_errors=True)
    if progress is not None:
        progress(plan.num_images, plan.num_images)
    index = read_index(out)
    if description not in ("", import_description(out)):
        write_index(index, digest=plan.digest, description=description)
    return index


def _accepted(index: Index, on_broken: OnBroken) -> Index:
    """Refuse a finished import that skipped images where none may be skipped."""
    summary = read_summary(index.root)
    if on_broken == "raise" and summary is not None and summary.num_skipped:
        raise DataError(
            f"the import into {index.root} skipped {summary.num_skipped} broken images, listed in "
            f"{SKIPPED_NAME}; accept that with --on-broken skip, or repair them and import into a "
            "new folder"
        )
    return index


def _make_plan(
    given: Sequence[Sample],
    out: Path,
    seed: int,
    samples_per_shard: int,
    max_side: int | None,
    on_broken: OnBroken,
) -> _Plan:
    samples = _with_class_texts(given)
    check_samples(samples)
    class_names = class_order(sample.class_name for sample in samples)
    label_of = {name: label for label, name in enumerate(class_names)}
    by_split: dict[str, list[Sample]] = {}
    for sample in samples:
        by_split.setdefault(sample.split, []).append(sample)
    tasks: list[ShardTask] = []
    settings = (_FORMAT, seed, samples_per_shard, *(() if max_side is None else (max_side,)))
    digest = hashlib.sha256(repr(settings).encode())
    outline = digest.copy()
    for number, split in enumerate(sorted(by_split)):
        members = by_split[split]
        generator = generator_of(Stream.TAR_SHARD_CONTENTS, seed, number)
        ordered = [members[at] for at in generator.permutation(len(members)).tolist()]
        for sample in ordered:
            facts = (sample.key, sample.class_name, split, sample.super_class, sample.role)
            outline.update(repr(facts).encode("utf-8", "surrogateescape"))
            digest.update(repr(sample).encode("utf-8", "surrogateescape"))
        num_shards = -(-len(ordered) // samples_per_shard)
        for at, (low, high) in enumerate(all_bounds(len(ordered), num_shards)):
            chosen = tuple(ordered[low:high])
            name = f"{split}-{at:06d}"
            tasks.append(
                ShardTask(
                    out / f"{name}.tar",
                    out / PROGRESS_FOLDER / f"{name}.json",
                    chosen,
                    tuple(label_of[sample.class_name] for sample in chosen),
                    max_side,
                    on_broken,
                )
            )
    return _Plan(tasks, class_names, len(samples), digest.hexdigest(), outline.hexdigest())


def _with_class_texts(samples: Sequence[Sample]) -> list[Sample]:
    """Apply the label rule to what an importer gives."""
    for sample in samples:
        try:
            class_text(sample.class_name, "class name")
        except DataError as error:
            raise DataError(f"sample {sample.key!r} ({sample.source}): {error}") from error
    texts = class_texts([sample.class_name for sample in samples], "the data set", "class name")
    groups = [sample.super_class or "" for sample in samples]
    return [
        sample
        if (sample.class_name, sample.super_class or "") == (text, group)
        else dataclasses.replace(sample, class_name=text, super_class=group or None)
        for sample, text, group in zip(samples, texts, optional_texts(groups), strict=True)
    ]


def _refuse_other_data(out: Path, outline: str) -> None:
    """Raise a DataError if `out` holds tar shards that this import did not write."""
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} must be a folder to write tar shards into, it is a file")
    plan = out / PROGRESS_FOLDER / "plan.json"
    if import_digest(out) == "":
        what = "holds tar shards that were not imported by this program"
    elif (out / INDEX_NAME).exists():
        what = "holds another data set, or this one with other settings or changed images"
    elif plan.exists():
        if read_json(plan).get("outline") == outline:
            return
        what = "holds an unfinished import of another data set or with other settings"
    elif any(out.glob("*.tar")):
        what = "holds tar shards that no import of this program wrote"
    else:
        return
    raise DataError(
        f"an import needs a folder of its own, and {out} {what}; "
        "choose another folder, or remove this one first"
    )


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Make the folder and hold it against a second import; released however we end."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another process is importing into {folder.parent}; wait for it, "
                "or choose another folder"
            ) from error
        yield


def _write_missing(
    plan: _Plan, processes: int | None, progress: Callable[[int, int], None] | None
) -> None:
    missing = [task for task in plan.tasks if not is_complete(task)]
    done = plan.num_images - sum(len(task.samples) for task in missing)
    if progress is not None:
        progress(done, plan.num_images)
    problems: list[str] = []
    for at, found in run_tasks(write_tar_shard, missing, processes):
        problems += found
        if len(problems) >= _MAX_PROBLEMS:
            break
        done += len(missing[at].samples)
        if progress is not None:
            progress(done, plan.num_images)
    if problems:
        raise DataError(
            f"every image must be readable, {len(problems)} are not:\n  "
            + "\n  ".join(problems[:_MAX_PROBLEMS])
            + "\nrepair them and run the import again, leave them out (--on-broken skip), or "
            "remove them and start in a new folder"
        )


def _collect_index(plan: _Plan, out: Path) -> Index:
    """Combine the records of all tar shards; rows are in the order of the tar files."""
    found = [(task, read_json(task.record)) for task in _in_order(plan)]
    kept = [(task, record) for task, record in found if record["position"]]
    if not kept:
        raise DataError(
            f"{out}: at least one of {plan.num_images} images must be readable, none is; "
            f"the first: {found[0][1]['skipped'][0][1]}"
        )
    tasks = [task for task, _ in kept]
    records = [record for _, record in kept]
    samples = [task.samples[at] for task, record in kept for at in record["position"]]

    def numbers(name: str, kind: type[np.generic]) -> np.ndarray:
        return np.concatenate([np.asarray(record[name], dtype=kind) for record in records])

    def texts(values: Iterator[str]) -> np.ndarray:
        return np.array(list(values), dtype=object)

    class_names = class_order(sample.class_name for sample in samples)
    label_of = {name: label for label, name in enumerate(class_names)}
    return Index(
        root=out,
        tar_shards=tuple(task.path.name for task in tasks),
        keys=texts(sample.key for sample in samples),
        tar_shard=np.repeat(
            np.arange(len(tasks), dtype=np.int32), [len(record["position"]) for record in records]
        ),
        offset=numbers("offset", np.int64),
        length=numbers("length", np.int64),
        crc32=numbers("crc32", np.uint32),
        extension=texts(extension for record in records for extension in record["extension"]),
        width=numbers("width", np.int32),
        height=numbers("height", np.int32),
        label=np.array([label_of[sample.class_name] for sample in samples], dtype=np.int64),
        class_names=tuple(class_names),
        super_class=texts(sample.super_class or "" for sample in samples),
        split=texts(sample.split for sample in samples),
        role=texts(sample.role for sample in samples),
    )


def _in_order(plan: _Plan) -> list[ShardTask]:
    return sorted(plan.tasks, key=lambda task: task.path.name)


def _summarise(plan: _Plan, index: Index) -> None:
    """Write what the import skipped, and which images are there twice."""
    skipped: list[SkippedImage] = []
    prints: list[str | None] = []
    digests: list[str] = []
    num_turned = 0
    for task in _in_order(plan):
        record = read_json(task.record)
        prints += record["fingerprint"]
        digests += record["source_digest"]
        # Records of an import that an older version began do not have it.
        num_turned += sum(mark != 1 for mark in record.get("orientation", ()))
        for at, reason in record["skipped"]:
            sample = task.samples[at]
            skipped.append(SkippedImage(sample.key, sample.split, sample.class_name, reason))
    has_print = np.array([text is not None for text in prints])
    words = np.frombuffer(bytes.fromhex("".join(text or "0" * 32 for text in prints)), np.uint64)
    copies = find_copies(index.split, np.array(digests), words.reshape(-1, 2), has_print)
    kept = set(index.class_names)
    lost = [name for name in plan.class_names if name not in kept]
    write_summary(index, skipped, lost, copies, num_turned)
