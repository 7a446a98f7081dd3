"""Images per second of the training loader, against a plain torchvision ImageFolder loader.

With `decoded cache`, every image was decoded before (data.decoded_cache_mb).

Run: python -m tests.benchmarks.bench_loader
"""

from __future__ import annotations

import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from dml_dist.config.data import ShuffledBatchesConfig, StandardTransformConfig
from dml_dist.data.batches import PlanSampler, ShardDataset
from dml_dist.data.decoded_cache import DecodedCache
from dml_dist.data.index import Index
from dml_dist.data.loader import BatchLoader
from dml_dist.data.plans import build_plan
from dml_dist.data.transforms import build_transform
from dml_dist.topology import Topology
from tests.unit.tiny_shards import make_index

BATCH = 64
REPEATS = 5


def smooth_images(folder: Path, side: int, count: int) -> None:
    """Write `count` JPEG files that compress like photographs, in two class folders."""
    generator = np.random.default_rng(0)
    for number in range(count):
        small = generator.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        image = Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)
        path = folder / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, "JPEG", quality=90)


def ours(index: Index, size: int, decoded: DecodedCache | None = None) -> int:
    rows = np.arange(len(index))
    plan = build_plan(
        ShuffledBatchesConfig(),
        rows=rows,
        labels=index.label,
        tar_shard=index.tar_shard,
        seed=0,
        global_batch_size=BATCH,
        world_size=1,
    )
    batches = BatchLoader(
        ShardDataset(index, build_transform(StandardTransformConfig(size=size)), 0, decoded),
        PlanSampler(plan, Topology(), start_step=0, end_step=plan.steps_per_epoch),
        workers=1,
        prefetch=4,
        pin_memory=False,
    )
    return sum(len(batch.rows) for batch in batches)


def plain(folder: Path, size: int) -> int:
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.16, 1.0)),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    loader = DataLoader(
        datasets.ImageFolder(str(folder), transform),
        BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=1,
        prefetch_factor=4,
    )
    return sum(len(labels) for _, labels in loader)


def cpu_seconds() -> float:
    """Return the seconds that this process and its ended children have computed."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (
            resource.getrusage(resource.RUSAGE_SELF),
            resource.getrusage(resource.RUSAGE_CHILDREN),
        )
    )


@dataclass(frozen=True)
class Rates:
    """Medians over several epochs, the start of the loader worker included."""

    per_second: float
    per_core_second: float
    """Images for a second of computing, of the loader worker and the rank together: on a machine
    that others use too, this is what can be compared."""


def rates(loads: dict[str, Callable[[], int]]) -> dict[str, Rates]:
    """Run all loaders in turn, several times, and return their rates."""
    wall: dict[str, list[float]] = {name: [] for name in loads}
    cpu: dict[str, list[float]] = {name: [] for name in loads}
    for _ in range(REPEATS):
        for name, load in loads.items():
            start, computed = time.perf_counter(), cpu_seconds()
            count = load()
            wall[name].append(count / (time.perf_counter() - start))
            cpu[name].append(count / (cpu_seconds() - computed))
    return {
        name: Rates(statistics.median(wall[name]), statistics.median(cpu[name])) for name in loads
    }


def main() -> None:
    """Print one line for each image size and loader."""
    torch.set_num_threads(1)
    print("loader, 1 worker          images/s   per core second   ratio   ratio per core second")
    for side, size, count in ((64, 64, 1920), (256, 224, 960)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            smooth_images(folder / "files", side, count)
            files = sorted((folder / "files").rglob("*.jpg"))
            index = make_index(
                folder / "shards",
                num_images=count,
                per_tar_shard=200,
                sizes=(side,),
                encoded=[path.read_bytes() for path in files],
            )
            # The helper gives widths of its own images.
            index = replace(index, width=index.height)
            cached = DecodedCache(index, np.arange(count), 10**9)
            ours(index, size, cached)
            found = rates(
                {
                    "ImageFolder with PIL": partial(plain, folder / "files", size),
                    "dml_dist": partial(ours, index, size),
                    "dml_dist, decoded cache": partial(ours, index, size, cached),
                }
            )
            base = found["ImageFolder with PIL"]
            print(f"JPEG {side} px to {size} px")
            for name, rate in found.items():
                print(
                    f"  {name:<24}{rate.per_second:>8,.0f}{rate.per_core_second:>18,.0f}"
                    f"{rate.per_second / base.per_second:>8.2f}"
                    f"{rate.per_core_second / base.per_core_second:>24.2f}"
                )


if __name__ == "__main__":
    main()
