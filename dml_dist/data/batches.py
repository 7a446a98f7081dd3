"""Sampler and data set for a DataLoader: batch requests, and the batches read for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate, get_worker_info

from dml_dist.data.decoded_cache import DecodedCache
from dml_dist.data.index import Index
from dml_dist.data.plans import BatchPlan, global_batches, rank_positions
from dml_dist.data.reader import ShardReader
from dml_dist.data.systematic import StatefulPlan
from dml_dist.data.transforms import StandardTransform, Transform
from dml_dist.errors import ConfigError, DataError, DmlDistError
from dml_dist.random_streams import Stream, generator_of
from dml_dist.topology import Topology


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's part of a global batch.

    Attributes:
        images: (b, 3, H, W) float32.
        labels: (b,) int64 labels of the index, not class ids of the training classes.
        rows: (b,) int64 index rows.
        step: Global step (training) or number of the global batch (evaluation).
    """

    images: Tensor
    labels: Tensor
    rows: Tensor
    step: int

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory; the DataLoader calls this for CUDA ranks."""
        return Batch(
            self.images.pin_memory(), self.labels.pin_memory(), self.rows.pin_memory(), self.step
        )


@dataclass(frozen=True, eq=False)
class BatchRequest:
    """The rows that a loader worker reads for one batch.

    Attributes:
        step: Global step, or number of the global evaluation batch.
        first_position: Position of the first row in the global batch.
        rows: (b,) int64 index rows.
    """

    step: int
    first_position: int
    rows: np.ndarray


class PlanSampler(Sampler[BatchRequest]):
    """Yields requests for this rank's part of every batch of a plan.

    Args:
        plan: The global batches, or a plan with its states.
        topology: Rank and world size.
        start_step: First global step.
        end_step: Global step after the last.
    """

    def __init__(
        self, plan: BatchPlan | StatefulPlan, topology: Topology, *, start_step: int, end_step: int
    ) -> None:
        self.plan = plan
        self.topology = topology
        self.start_step = start_step
        self.end_step = end_step

    def __len__(self) -> int:
        return max(0, self.end_step - self.start_step)

    def __iter__(self) -> Iterator[BatchRequest]:
        for step, rows in self._global_batches():
            low, high = rank_positions(len(rows), self.topology.world_size, self.topology.rank)
            yield BatchRequest(step, low, rows[low:high])

    def _global_batches(self) -> Iterator[tuple[int, np.ndarray]]:
        if isinstance(self.plan, StatefulPlan):
            return self.plan.global_batches(self.start_step, self.end_step)
        return global_batches(self.plan, self.start_step, self.end_step)


class ShardDataset(Dataset[Batch | DmlDistError]):
    """Turns requests into batches; for `DataLoader(dataset, sampler=..., batch_size=None)`.

    Args:
        index: Index of the images.
        transform: Image transform.
        seed: The run's seed for random views; None gives evaluation views.
        decoded: Cache of decoded images, if any.
    """

    def __init__(
        self,
        index: Index,
        transform: Transform,
        seed: int | None = None,
        decoded: DecodedCache | None = None,
    ) -> None:
        # Here, because it imports torchvision, which takes as long as torch: a dry run makes no
        # data set. Not when the first image is read: each forked loader worker would import it.
        from dml_dist.data.decode import decode_image

        self._decode_image = decode_image
        self.index = index
        self.transform = transform
        self.seed = seed
        self.decoded = decoded
        self._reader = ShardReader(index)

    def __getitem__(self, request: BatchRequest) -> Batch | DmlDistError:
        """Return the batch, or the error as a value.

        A raised exception would reach the training process only as the text of a traceback.
        """
        try:
            images = self._images(request)
        except DmlDistError as error:
            return error
        finally:
            if self.index.remote is not None:
                # A file evicted from the cache keeps its disk space until it is closed.
                self._reader.close()
        labels = torch.from_numpy(self.index.label[request.rows].astype(np.int64))
        rows = torch.from_numpy(request.rows.astype(np.int64))
        return Batch(images, labels, rows, request.step)

    def _images(self, request: BatchRequest) -> Tensor:
        """Return the views of a batch, (b, 3, H, W) float32."""
        rows = request.rows.tolist()
        transform = self.transform
        if type(transform) is not StandardTransform:  # A subclass may override a step.
            views = []
            for place, row in enumerate(rows):
                # A custom transform may modify its input in place.
                image = self._decoded(row).clone() if self.decoded else self._decoded(row)
                draws = self._draws(request, place)
                views.append(
                    transform.evaluation(image) if draws is None else transform.train(image, draws)
                )
            self._check_shapes(views, request.rows)
            # In a loader worker this stacks into shared memory, which avoids a copy of the batch.
            return cast(Tensor, default_collate(views))
        # Views are written into the batch directly: allocating costs more than the arithmetic.
        batch = _empty_batch(len(rows), transform.config.size)
        for place, row in enumerate(rows):
            image, draws = self._decoded(row), self._draws(request, place)
            if draws is None:
                pixels = transform.evaluation_pixels(image)
            else:
                pixels = transform.train_pixels(image, draws)
            transform.normalize(pixels, batch[place])
        return batch

    def _draws(self, request: BatchRequest, place: int) -> np.random.Generator | None:
        if self.seed is None:
            return None
        position = request.first_position + place
        return generator_of(Stream.AUGMENTATION, self.seed, request.step, position)

    def _decoded(self, row: int) -> Tensor:
        image = None if self.decoded is None else self.decoded.get(row)
        if image is None:
            data, exif = self._reader.read(row), self.index.exif
            try:
                image = self._decode_image(data, "", exif)
            except DataError:
                # Decode again for the message: describing every image costs 10 % of a small one.
                image = self._decode_image(data, self._reader.describe(row), exif)
            if self.decoded is not None:
                self.decoded.put(row, image)
        return image

    def _check_shapes(self, images: Sequence[Tensor], rows: np.ndarray) -> None:
        first = images[0]
        for image, row in zip(images, rows, strict=True):
            if image.shape != first.shape or image.dtype != torch.float32:
                raise ConfigError(
                    "data.transform must give float32 tensors of one shape, but gave "
                    f"{tuple(first.shape)} {first.dtype} for {self._reader.describe(int(rows[0]))} "
                    f"and {tuple(image.shape)} {image.dtype} for {self._reader.describe(int(row))}"
                )


def _empty_batch(num_images: int, size: int) -> Tensor:
    """Return (num_images, 3, size, size) float32; in a loader worker in shared memory.

    A loader worker sends its batch through shared memory; allocating it there, as torch's own
    `default_collate` does, saves a copy.
    """
    batch = torch.empty(0)
    if get_worker_info() is not None:
        storage = torch.UntypedStorage._new_shared(4 * num_images * 3 * size * size)
        batch.set_(storage)
    return batch.resize_(num_images, 3, size, size)
