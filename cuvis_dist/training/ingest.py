"""How do frames reach a training worker: who reads them, and what is kept for the next epoch?

The data module's own loader, in the training worker, unless Ray tasks read ahead of it on other
CPUs of the cluster. The order of frames, and so the result, is the same either way.
"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from loguru import logger
from torch.utils.data import DataLoader, Dataset

from cuvis_dist.errors import one_line
from cuvis_dist.execution.worker import prepare_worker
from cuvis_dist.training.dealing import DealtBatches


class FrameCache:
    """Decoded frames, up to so many bytes.

    What is in stays in: every epoch reads each frame once, so that a cache that made room for
    the frames read last would drop each one just before it is asked for again.

    Parameters
    ----------
    limit : int
        Bytes to keep at most.
    folder : Path or None
        Where to keep them, on this machine; in memory without one.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.left, self.held, self.folder = limit, 0, folder
        self._items: dict[int, bytes] = {}

    def get(self, index: int) -> Any:
        """Return a frame's item, or None."""
        if self.folder is None:
            data = self._items.get(index)
        else:
            try:
                data = self._path(index).read_bytes()
            except OSError:
                data = None
        return None if data is None else pickle.loads(data)

    def put(self, index: int, item: Any) -> None:
        """Keep a frame's item if there is room for it."""
        if self.left <= 0 or (self.folder is None and index in self._items):
            return
        data = pickle.dumps(item, protocol=5)
        if len(data) > self.left:
            return
        if self.folder is None:
            self._items[index] = data
        elif not self._path(index).exists():
            part = self._path(index).with_suffix(f".{os.getpid()}")
            try:
                part.write_bytes(data)
                os.replace(part, self._path(index))
            except OSError as error:  # a full disk
                part.unlink(missing_ok=True)
                self.left = 0
                if self.folder.is_dir():  # else another worker has ended the run
                    logger.warning(f"no more frames are kept in {self.folder}: {one_line(error)}")
                return
        self.left -= len(data)
        self.held += len(data)

    def clear(self) -> None:
        """Forget all frames, and remove the folder, if there is one."""
        self._items.clear()
        if self.folder is not None:  # other workers there read the frames again instead
            shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{index}.frame"


class CachedFrames(Dataset):
    """Another dataset behind a :class:`FrameCache`."""

    def __init__(self, dataset: Any, cache: FrameCache) -> None:
        self.dataset, self.cache = dataset, cache

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """Return a frame from the cache, or read and keep it."""
        item = self.cache.get(index)
        if item is None:
            item = self.dataset[index]
            self.cache.put(index, item)
        return item


def make_cache(kind: str, limit: int, run: str) -> FrameCache:
    """Return the cache of this process; on disk it is shared by the workers of a machine.

    Parameters
    ----------
    kind : str
        ``memory`` or ``disk``.
    limit : int
        Bytes that this process may add.
    run : str
        Identity of the training, for the folder.
    """
    if kind == "memory":
        return FrameCache(limit)
    folder = Path(tempfile.gettempdir()) / f"cuvis-dist-{os.getuid()}-{run}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        logger.warning(f"frames are read anew in every epoch: no {folder}: {one_line(error)}")
        limit = 0
    return FrameCache(limit, folder)


class ReadAhead:
    """A loader whose frames are read by Ray tasks, on any CPU of the cluster.

    In flight are the frames of the next batch and ``ahead`` more, so that a slow learner stops
    the readers and memory stays bounded.

    Parameters
    ----------
    loader : DataLoader
        Whose dataset, batches and ``collate_fn`` are used.
    ahead : int
        Frames beyond the next batch.
    starting : callable
        Returns a context to wait in until a reader runs, where frames are to be read: a node may
        have to start a process.
    """

    def __init__(
        self,
        loader: DataLoader,
        ahead: int,
        starting: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self.dataset, self.collate_fn = loader.dataset, loader.collate_fn
        self.batch_sampler, self.ahead = loader.batch_sampler, ahead
        self._draws_at_once = loader.num_workers > 0  # as that loader, for its processes
        cached = isinstance(self.dataset, CachedFrames)
        self._cache = self.dataset.cache if cached else None  # type: ignore[attr-defined]
        source = self.dataset.dataset if cached else self.dataset  # type: ignore[attr-defined]
        self._source = ray.put(source)
        self._starting = starting
        options: dict[str, Any] = {"num_cpus": 1, "max_retries": 3}
        self._read: Any = ray.remote(**options)(_read)
        self._open: Any = ray.remote(**options)(_open)
        self._opening: Any = None

    def __len__(self) -> int:
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        """Yield the collated batches in order; raises what reading a frame raised."""
        if isinstance(self.batch_sampler, DealtBatches):
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
            yield self.collate_fn([self._finish(*flight.popleft()) for _ in batch])

    def _start(self, index: int) -> tuple[int, Any, Any]:
        kept = self._cache.get(index) if self._cache else None
        if kept is not None:
            return index, kept, None
        if self._opening is None:
            self._opening = self._open.remote(self._source)
        return index, None, self._read.remote(self._source, index)

    def _finish(self, index: int, kept: Any, reading: Any) -> Any:
        if reading is None:
            return kept
        with self._starting():
            ray.get(self._opening)
        item = ray.get(reading)
        if self._cache:
            self._cache.put(index, item)
        return item


def _open(dataset: Any) -> None:
    """Import what the dataset is made of."""


def _read(dataset: Any, index: int) -> Any:
    prepare_worker(1)
    return dataset[index]
