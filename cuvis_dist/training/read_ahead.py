"""How are frames read on other CPUs of the cluster, ahead of the training worker that waits?

The data module's own loader reads in the training worker; a :class:`ReadAhead` in its place has
Ray tasks read. The order of frames, and so the result, is the same either way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import ray
from torch.utils.data import DataLoader

from cuvis_dist.archive import Numbered
from cuvis_dist.execution.worker import prepare_worker
from cuvis_dist.training.dealing import DealtBatches
from cuvis_dist.training.frame_cache import CachedFrames


class ReadAhead(DataLoader):
    """A loader whose frames are read by Ray tasks, on any CPU of the cluster.

    In flight are the frames of the next batch and ``ahead`` more, so that a slow learner stops
    the readers and memory stays bounded.

    Parameters
    ----------
    loader : DataLoader
        Its dataset, batches and ``collate_fn`` are used.
    ahead : int
        Frames beyond the next batch.
    retries : int
        Ray repeats a reading so often if it loses the process that reads.
    starting : callable
        It returns a context to wait in until a reader runs, where frames are to be read: a node
        may have to start a process.
    """

    def __init__(
        self,
        loader: DataLoader,
        ahead: int,
        *,
        retries: int = 3,
        starting: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        super().__init__(
            loader.dataset, batch_sampler=loader.batch_sampler, collate_fn=loader.collate_fn
        )
        self.ahead = ahead
        self._draws_at_once = loader.num_workers > 0  # as that loader, for its processes
        source: Any = self.dataset
        self._numbered = isinstance(source, Numbered)
        source = source.dataset if self._numbered else source
        self._cache = source.cache if isinstance(source, CachedFrames) else None
        self._source = ray.put(source.dataset if self._cache else source)
        self._starting = starting
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": retries}
        self._read: Any = ray.remote(**options)(_read)
        self._open: Any = ray.remote(**options)(_open)
        self._opening: Any = None

    def __iter__(self) -> Any:
        """Yield the collated batches in order; raises what reading a frame raised."""
        if isinstance(self.batch_sampler, DealtBatches):
            if self.batch_sampler.held:
                return iter(())
            self.batch_sampler.begin()
        drawn = list(self.batch_sampler or ()) if self._draws_at_once else None
        return self._batches(drawn)

    def _batches(self, drawn: list[list[int]] | None) -> Iterator[Any]:
        batches = list(self.batch_sampler or ()) if drawn is None else drawn
        order = (index for batch in batches for index in batch)
        flight: deque[tuple[int, Any, Any]] = deque()
        self._opening = None  # Ray ends processes that were idle
        for batch in batches:
            wanted = len(batch) + self.ahead - len(flight)
            flight.extend(self._start(index) for index in islice(order, max(0, wanted)))
            items = [self._finish(*flight.popleft()) for _ in batch]
            numbered = list(zip(batch, items, strict=True))
            yield self.collate_fn(numbered if self._numbered else items)

    def _start(self, index: int) -> tuple[int, Any, Any]:
        """Return a frame's index, and its item or a reference to the reading of it."""
        kept = self._cache.get(index) if self._cache else None
        if kept is not None:
            return index, kept, None
        if self._opening is None:
            self._opening = self._open.remote(self._source)
        return index, None, self._read.remote(self._source, index)

    def _finish(self, index: int, kept: Any, reading: Any) -> Any:
        """Return the item of a frame that was started."""
        if reading is None:
            return kept
        with self._starting():
            ray.get(self._opening)
        item = ray.get(reading)
        if self._cache:
            self._cache.put(index, item)
        return item


def _open(dataset: Any) -> None:
    """Do nothing: whoever has the argument has imported what the dataset is made of."""


def _read(dataset: Any, index: int) -> Any:
    prepare_worker(1)
    return dataset[index]
