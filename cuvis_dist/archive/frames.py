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
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, SequentialSampler, default_collate

from cuvis_dist.archive.batching import collate_frames, is_array
from cuvis_dist.archive.frame_cache import FrameCache
from cuvis_dist.archive.patience import read_in_time
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.nodes import upstream
from cuvis_dist.nodes.probing import random_states
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
    reads : tuple of str
        Paths or URIs of all files that the frame is read from, as far as they are known: the
        recording's and that of its labels.
    """

    uid: str
    recording: str
    path: str
    files: tuple[str, ...] = ()
    staging: Staging | None = field(default=None, compare=False, repr=False)
    reads: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        return f"frame {self.uid}" + ("" if self.path == self.recording else f" ({self.path})")

    def held(self) -> AbstractContextManager[None]:
        """Return a context inside which the frame's files are on this node.

        It raises as :meth:`cuvis_dist.staging.Staging.held` does.
        """
        return self.staging.held(self.files) if self.staging else nullcontext()


@dataclass(frozen=True)
class Shard:
    """Frames ``start .. stop - 1`` of an archive, all of one recording unless it has batches.

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
    cache : FrameCache, optional
        It keeps what was read, unless reading it drew random numbers.
    """

    def __init__(
        self, dataset: Any, frames: Sequence[Frame], cache: FrameCache | None = None
    ) -> None:
        self.dataset = dataset
        self.frames, self.cache = frames, cache
        self._directory = os.getcwd()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Any:
        """Return the dataset's item.

        Raises
        ------
        DataError
            If it cannot be read, has no pixels, or values that are no real numbers; the message
            has the frame's uid and path.
        """
        return self._named(index, lambda: self.dataset[index])

    def in_time(self, index: int) -> Any:
        """Return the dataset's item, if it is read within this process's patience.

        Fetching files that have to be staged takes its own time.

        Raises
        ------
        DataError
            If it is not, or cannot be used; the message has the frame's uid and path.
        """
        what = str(self.frames[index])
        return self._named(index, lambda: read_in_time(lambda: self.dataset[index], what))

    def _named(self, index: int, read: Callable[[], Any]) -> Any:
        upstream.only_real_numbers()
        if os.path.isdir(self._directory):
            os.chdir(self._directory)
        frame, kept = self.frames[index], self.kept(index)
        if kept is None and self.cache:
            kept = self.cache.fetch(frame, index)
        if kept is not None:
            return kept
        try:
            with frame.held():
                before = random_states() if self.cache else None
                item = _with_a_cube(read())
        except DataError as error:
            raise DataError(f"cannot read {frame}: {error}") from error
        except CuvisDistError:
            raise
        except FileNotFoundError as error:
            raise DataError(
                f"cannot read {frame}: {with_uris(one_line(error))}. Put the file back, or leave "
                "the frame out of the splits"
            ) from error
        except Exception as error:
            raise DataError(f"cannot read {frame}: {with_uris(one_line(error))}") from error
        if self.cache and random_states() == before:
            self.cache.put(frame, index, item)
        return item

    def kept(self, index: int) -> Any:
        """Return the item of a frame that this node has read before and keeps, else None."""
        return self.cache.get(self.frames[index], index) if self.cache else None

    def __getstate__(self) -> dict[str, Any]:
        """Let the paths of staged files mean those of the node where this arrives."""
        staged = any(frame.staging for frame in self.frames)
        return self.__dict__ | ({"dataset": portable(self.dataset)} if staged else {})


class Archive:
    """The frames of one split, in the order that the data module resolved.

    Parameters
    ----------
    loader : DataLoader
        The module's loader of the split. Its dataset, ``collate_fn`` and batch size are used;
        its sampler is not.
    frames : sequence of Frame
        One per item of the dataset.
    cache : FrameCache, optional
        Where a node keeps the frames that it has read.

    Attributes
    ----------
    frames : sequence of Frame
        Identities of the frames, in canonical order.
    batch_size : int
        How many frames the module's loader gives at a time; 1 where it does not say.
    shuffled : bool
        Whether that loader gives them in another order than the canonical one.
    """

    def __init__(
        self, loader: DataLoader, frames: Sequence[Frame], cache: FrameCache | None = None
    ) -> None:
        self.dataset = NamedFrames(loader.dataset, tuple(frames), cache)
        self.collate = loader.collate_fn
        self.batch_size = loader.batch_size or 1
        self.shuffled = not isinstance(loader.sampler, SequentialSampler)
        self.frames: Sequence[Frame] = self.dataset.frames
        self._items: Sequence[int] = range(len(frames))

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def cache(self) -> FrameCache | None:
        """Where a node keeps the frames that it has read."""
        return self.dataset.cache

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
        return self.collated([index], [self.item(index)])

    def item(self, index: int) -> Any:
        """Return one frame as the module's dataset gives it; raises DataError that names it."""
        return self.dataset.in_time(self._items[index])

    def collated(self, indices: Sequence[int], items: list[Any]) -> dict[str, Any]:
        """Return these items as one batch, as the module's own loader would collate them.

        Parameters
        ----------
        indices : sequence of int
            Which frames the items are.
        items : list
            From :meth:`item`.

        Raises
        ------
        DataError
            If they cannot be collated, such as frames of unlike sizes; the message names them.
        """
        alone = len(items) == 1 and self.collate is default_collate and isinstance(items[0], dict)
        collate = _batch_of_one if alone else self.collate
        return collate_frames(collate, items, [self.frames[index] for index in indices])

    def named(self, indices: Sequence[int]) -> str:
        """Return the names of some frames, for messages."""
        return ", ".join(str(self.frames[index]) for index in indices)

    def whole_batches(self, shard_frames: int) -> list[Shard]:
        """Cut the archive into runs of whole batches, whatever the recordings are.

        A run has at most ``shard_frames`` frames, unless one batch has more.
        """
        each = self.batch_size * max(1, shard_frames // self.batch_size)
        return [
            self._shard(ordinal, start, min(start + each, len(self)))
            for ordinal, start in enumerate(range(0, len(self), each))
        ]

    def batches(self, shard: Shard) -> list[range]:
        """Return the frames of each batch in a run of whole batches."""
        size = self.batch_size
        starts = range(shard.start, shard.stop, size)
        return [range(start, min(start + size, shard.stop)) for start in starts]

    def shards(self, shard_frames: int) -> list[Shard]:
        """Cut the archive into runs of at most ``shard_frames`` frames of one recording."""
        shards: list[Shard] = []
        start = 0
        for stop in range(1, len(self) + 1):
            full = stop - start == shard_frames
            if stop == len(self) or full or self._recording(stop) != self._recording(start):
                shards.append(self._shard(len(shards), start, stop))
                start = stop
        return shards

    def _shard(self, ordinal: int, start: int, stop: int) -> Shard:
        files = self.frames[start].files
        return Shard(ordinal, start, stop, files[0] if files else None)

    def _recording(self, index: int) -> str:
        return self.frames[index].recording


def _with_a_cube(item: Any) -> Any:
    """Return an item of a dataset, unless its cube has no pixels or no real numbers."""
    cube: Any = item.get("cube") if isinstance(item, dict) else None
    if is_array(cube):
        if 0 in cube.shape:
            raise DataError(f"its cube has the shape {tuple(cube.shape)}, and so no pixels")
        if cube.is_complex() if isinstance(cube, torch.Tensor) else cube.dtype.kind not in "biuf":
            raise DataError(f"its cube is of dtype {cube.dtype}, and only real numbers can be used")
    return item


def _hash(seed: int, uid: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{uid}".encode(), digest_size=16).digest()


def _batch_of_one(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what ``default_collate`` does with one item, with arrays as views: a cube is large."""
    (item,) = items
    arrays = {k: v for k, v in item.items() if is_array(v)}
    others = {k: v for k, v in item.items() if k not in arrays}
    views = {k: torch.as_tensor(v).unsqueeze(0) for k, v in arrays.items()}
    return (default_collate([others]) if others else {}) | views


def batch_bytes(batch: dict[str, Any]) -> int:
    """Return the size of a batch's tensors in bytes."""
    return sum(v.nbytes for v in batch.values() if isinstance(v, torch.Tensor))
