"""Which frames does an archive have, how are they cut into shards, and how is one read?

An :class:`Archive` is made from a ``DataLoader`` over a map-style dataset, so that what a frame
contains and how it becomes a batch stays the data module's affair. What is added here is identity
(which recording, which frame, which file), so that a shard can be cut and an error can name its
culprit.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.staging import Staging, portable, with_uris


@dataclass(frozen=True)
class Frame:
    """Identity of one frame.

    Attributes
    ----------
    uid : str
        ``SampleRef.uid``, or ``<recording>#<position>`` where the data module has no refs.
    recording : str
        ``SampleRef.source``.
    path : str
        The file that is read; the recording itself unless the module keeps frames elsewhere.
    files : tuple of str
        URIs of the files that have to be staged before the frame is read.
    staging : Staging or None
        The cache of this node that holds these files.
    """

    uid: str
    recording: str
    path: str
    files: tuple[str, ...] = ()
    staging: Staging | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"frame {self.uid}" + ("" if self.path == self.recording else f" ({self.path})")

    def held(self) -> AbstractContextManager[None]:
        """Return a context inside which the frame's files are on this node.

        It raises as :meth:`cuvis_dist.staging.Staging.held` does.
        """
        return self.staging.held(self.files) if self.staging else nullcontext()


@dataclass(frozen=True)
class Shard:
    """Frames ``start .. stop - 1`` of an archive, all of one recording.

    Attributes
    ----------
    ordinal : int
        Position of the shard in the archive.
    start, stop : int
        Positions of the first frame, and of the one after the last.
    staged : str or None
        URI of the first file that has to be staged, if there is one.
    """

    ordinal: int
    start: int
    stop: int
    staged: str | None = None

    def __len__(self) -> int:
        return self.stop - self.start


class NamedFrames(Dataset):
    """A data module's dataset whose read errors name the frame.

    Relative paths are resolved as the driver did, since a worker has a working directory of its
    own. Files at URIs are staged for as long as they are read.

    Parameters
    ----------
    dataset : map-style dataset
        The data module's own.
    frames : sequence of Frame
        One per item of the dataset.
    """

    def __init__(self, dataset: Any, frames: Sequence[Frame]) -> None:
        self.dataset = dataset
        self.frames = frames
        self._directory = os.getcwd()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Any:
        """Return the dataset's item.

        Raises
        ------
        DataError
            If it cannot be read; the message has the frame's uid and path.
        """
        if os.path.isdir(self._directory):
            os.chdir(self._directory)
        frame = self.frames[index]
        try:
            with frame.held():
                return self.dataset[index]
        except DataError as error:
            raise DataError(f"cannot read {frame}: {error}") from error
        except CuvisDistError:
            raise
        except Exception as error:
            raise DataError(f"cannot read {frame}: {with_uris(one_line(error))}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Let the paths of staged files mean those of the node where this arrives."""
        staged = any(frame.staging for frame in self.frames)
        return self.__dict__ | ({"dataset": portable(self.dataset)} if staged else {})


class Archive:
    """The frames of one split, in the order that the data module resolved.

    Parameters
    ----------
    loader : DataLoader
        The module's loader of the split. Its dataset and ``collate_fn`` are used; its sampler
        and batch size are not, since a shard is read frame by frame.
    frames : sequence of Frame
        One per item of the dataset.

    Attributes
    ----------
    frames : sequence of Frame
        Identities of the frames, in canonical order.
    """

    def __init__(self, loader: DataLoader, frames: Sequence[Frame]) -> None:
        self.dataset = NamedFrames(loader.dataset, tuple(frames))
        self.collate = loader.collate_fn
        self.frames: Sequence[Frame] = self.dataset.frames
        self._items: Sequence[int] = range(len(frames))

    def __len__(self) -> int:
        return len(self.frames)

    def sampled(self, count: int | None, fraction: float | None, seed: int = 0) -> Archive:
        """Return an archive of some of the frames, those whose uids have the smallest hashes.

        Parameters
        ----------
        count : int or None
            The sample has at most so many frames.
        fraction : float or None
            The sample has at most this fraction of the frames, rounded up.
        seed : int
            Another seed gives another sample.
        """
        size = len(self) if fraction is None else math.ceil(fraction * len(self))
        size = size if count is None else min(size, count)
        if size == len(self):
            return self
        drawn = sorted(range(len(self)), key=lambda i: _hash(seed, self.frames[i].uid))[:size]
        return self.only(sorted(drawn))

    def only(self, indices: Sequence[int]) -> Archive:
        """Return an archive of the frames at these positions, in this order."""
        some = copy.copy(self)
        some.frames = [self.frames[i] for i in indices]
        some._items = [self._items[i] for i in indices]
        return some

    def read(self, index: int) -> dict[str, Any]:
        """Return one frame as a batch of one, as the module's own loader would collate it.

        Raises
        ------
        DataError
            If the frame cannot be read or collated; the message names it.
        """
        item = self.dataset[self._items[index]]
        try:
            if self.collate is default_collate and isinstance(item, dict):
                return _batch_of_one(item)
            return self.collate([item])
        except Exception as error:
            raise DataError(f"cannot batch {self.frames[index]}: {one_line(error)}") from error

    def shards(self, shard_frames: int) -> list[Shard]:
        """Cut the archive into runs of at most ``shard_frames`` frames of one recording."""
        shards: list[Shard] = []
        start = 0
        for stop in range(1, len(self) + 1):
            full = stop - start == shard_frames
            if stop == len(self) or full or self._recording(stop) != self._recording(start):
                files = self.frames[start].files
                shards.append(Shard(len(shards), start, stop, files[0] if files else None))
                start = stop
        return shards

    def _recording(self, index: int) -> str:
        return self.frames[index].recording


def _hash(seed: int, uid: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{uid}".encode(), digest_size=16).digest()


def _batch_of_one(item: dict[str, Any]) -> dict[str, Any]:
    """Return what ``default_collate([item])`` does, with arrays as views: a cube is large."""
    arrays = {k: v for k, v in item.items() if isinstance(v, np.ndarray | torch.Tensor)}
    others = {k: v for k, v in item.items() if k not in arrays}
    views = {k: torch.as_tensor(v).unsqueeze(0) for k, v in arrays.items()}
    return (default_collate([others]) if others else {}) | views


def batch_bytes(batch: dict[str, Any]) -> int:
    """Return the size of a batch's tensors in bytes."""
    return sum(v.nbytes for v in batch.values() if isinstance(v, torch.Tensor))
