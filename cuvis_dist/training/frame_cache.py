"""Which decoded frames does a training worker keep for the next epochs, and where?"""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

from loguru import logger
from torch.utils.data import Dataset

from cuvis_dist.errors import one_line


class FrameCache:
    """Keeps decoded frames, up to so many bytes.

    What is in stays in: every epoch reads each frame once, so that a cache that made room for
    the frames read last would drop each one just before it is asked for again.

    Parameters
    ----------
    limit : int
        Bytes to keep at most.
    folder : Path or None
        The folder on this machine that keeps them; without one, memory does.

    Attributes
    ----------
    left, held : int
        Bytes that may still be kept, and that were kept by this process.
    """

    def __init__(self, limit: int, folder: Path | None = None) -> None:
        self.left, self.held, self.folder = limit, 0, folder
        self._items: dict[int, bytes] = {}

    def get(self, index: int) -> Any:
        """Return a frame's item, or None if it is not kept."""
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
    """Another dataset behind a :class:`FrameCache`.

    Parameters
    ----------
    dataset : map-style dataset
        It reads the frames that are not kept.
    cache : FrameCache
        It keeps those that were read.
    """

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
        Identity of the training, which names the folder.
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
