"""Images per second of the training loader, beside a plain torchvision ImageFolder loader.

Run: python -m tests.benchmarks.bench_loader
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import v2

from dml_dist.config.data import ShuffledBatchesConfig, StandardTransformConfig
from dml_dist.data.index import Index
from dml_dist.data.loader import train_loader
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


def ours(index: Index, size: int) -> int:
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
    batches = train_loader(
        index,
        plan,
        build_transform(StandardTransformConfig(size=size)),
        seed=0,
        topology=Topology(),
        start_step=0,
        end_step=plan.steps_per_epoch,
        workers=1,
        prefetch=4,
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


def images_per_second(load: Callable[[], int]) -> float:
    """Return the median rate over several epochs, the start of the loader worker included."""
    rates = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        rates.append(load() / (time.perf_counter() - start))
    return statistics.median(rates)


def main() -> None:
    """Print one line for each image size."""
    torch.set_num_threads(1)
    for side, size, count in ((64, 64, 1920), (256, 224, 960)):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            smooth_images(folder / "files", side, count)
            files = sorted((folder / "files").rglob("*.jpg"))
            index = make_index(
                folder / "shards",
                num_images=count,
                per_tar_shard=200,
                encoded=[path.read_bytes() for path in files],
            )
            mine = images_per_second(lambda index=index, size=size: ours(index, size))  # type: ignore[misc]
            other = images_per_second(
                lambda folder=folder, size=size: plain(folder / "files", size)  # type: ignore[misc]
            )
            print(
                f"JPEG {side} px to {size} px, 1 loader worker: {mine:,.0f} images/s, "
                f"ImageFolder with PIL {other:,.0f}, ratio {mine / other:.2f}"
            )


if __name__ == "__main__":
    main()
