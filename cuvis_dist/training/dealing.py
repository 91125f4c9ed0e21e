"""Which frames does each worker get, so that the result is that of one process?

The data module's own batch sampler stays in charge: every worker iterates it under the same
seed and takes its part. A training batch is cut over the workers; a validation or test batch
goes to one worker whole, since a metric need not be a mean over frames. Pure functions of
(batches, rank, world size): no Ray, no Lightning.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from pytorch_lightning.utilities.seed import isolate_rng
from torch.utils.data import DataLoader, Dataset, Sampler


def cut(batch: list[int], rank: int, world_size: int) -> tuple[list[int], float]:
    """Return the rank's part of a global batch and its weight in the step.

    DDP averages the workers' gradients with equal weights; scaling a worker's loss by
    ``frames · world_size / batch frames`` makes the average that of the whole batch. A worker
    without a frame gets one with weight 0, since every worker must take part in the step.
    """
    start, stop = (len(batch) * r // world_size for r in (rank, rank + 1))
    if start == stop:
        return batch[:1], 0.0
    return batch[start:stop], (stop - start) * world_size / len(batch)


class DealtBatches(Sampler[list[int]]):
    """One worker's batches of each epoch.

    Parameters
    ----------
    batches : iterable of list of int
        The global batches: the batch sampler of the data module's loader.
    rank, world_size : int
        Which worker this is, of how many.
    seed : int
        Seed of the run; with the epoch it fixes the order on every worker.
    whole : bool
        Deal whole batches in turn (validation, test) instead of cutting each (training).
    limit : int or float or None
        Of the global batches only the first so many (int) or this fraction (float).

    Attributes
    ----------
    weights : list of float
        Weight of each of the worker's batches of the current epoch in a sum over workers that
        counts every frame once: see :func:`cut`; for whole batches 1, or 0 for one that only
        keeps the worker in step.
    frames : int
        Frames of all global batches of the current epoch.
    generator : torch.Generator
        For the loader, seeded for the current epoch: its workers then have the same seeds in a
        run that goes on from this epoch, and the process's own random state is left alone.
    """

    def __init__(
        self,
        batches: Iterable[list[int]],
        rank: int,
        world_size: int,
        seed: int,
        *,
        whole: bool = False,
        limit: int | float | None = None,
    ) -> None:
        self.batches, self.seed, self.whole, self.limit = batches, seed, whole, limit
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self.weights: list[float] = []
        self.frames = 0
        self.generator = torch.Generator()

    @property
    def sampler(self) -> DealtBatches:
        """Itself: Lightning looks for ``set_epoch`` at ``loader.batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration."""
        self.epoch = epoch

    def _size(self) -> int:
        size = len(self.batches)  # type: ignore[arg-type]
        if self.limit is None:
            return size
        return int(size * self.limit) if isinstance(self.limit, float) else min(size, self.limit)

    def __len__(self) -> int:
        size = self._size()
        if not self.whole:
            return size
        return max(len(range(self.rank, size, self.world_size)), min(size, 1))

    def __iter__(self) -> Iterator[list[int]]:
        with isolate_rng(include_cuda=False):
            torch.manual_seed(self.seed + self.epoch)
            batches = list(islice(self.batches, self._size()))
        self.generator.manual_seed((self.seed + self.epoch) * self.world_size + self.rank)
        self.frames = sum(map(len, batches))
        if self.whole:
            mine = [(batch, 1.0) for batch in batches[self.rank :: self.world_size]]
            if not mine and batches:
                mine = [(batches[0], 0.0)]
        else:
            mine = [cut(batch, self.rank, self.world_size) for batch in batches]
        self.weights = [weight for _, weight in mine]
        return iter([batch for batch, _ in mine])


def deal(
    loader: DataLoader, dataset: Dataset, batches: DealtBatches, keep_workers: bool = False
) -> DataLoader:
    """Return ``loader`` as its module made it, over ``dataset`` and in ``batches``.

    ``keep_workers`` lets its processes, if it has any, live from one epoch to the next.
    """
    options: dict[str, Any] = (
        {"prefetch_factor": loader.prefetch_factor} if loader.num_workers else {}
    )
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        persistent_workers=loader.persistent_workers or (keep_workers and loader.num_workers > 0),
        generator=batches.generator,
        **options,
    )
