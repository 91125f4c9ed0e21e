"""How do frames get onto a rank's device while the step before computes, and which stay there?

Frames are put on the device one by one, as the data set gives them, and become a batch there. A
thread reads those of the next batch, and copies them: on a GPU through pinned memory, beside the
kernels of the step.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.utils.data import DataLoader, Dataset

from cuvis_dist.archive import Reader
from cuvis_dist.nodes.probing import random_states
from cuvis_dist.training.dealing import DealtBatches


@dataclass(frozen=True)
class Placed:
    """A frame's item on a device, or on the way there.

    Attributes
    ----------
    index : int
        Which item of the data set it is.
    item : object
        What the data set gives, with tensors on the device for its arrays and tensors.
    drew : bool
        Whether random numbers were drawn while it was read.
    copied : torch.cuda.Event or None
        On a GPU: what happens when it is there.
    """

    index: int
    item: Any
    drew: bool
    copied: torch.cuda.Event | None


class DeviceFrames:
    """Decoded frames in the memory of a rank's device.

    What is in stays in, as in a node's cache: each epoch reads every frame once.

    Parameters
    ----------
    device : torch.device
        Where the frames are put.
    limit : int
        Bytes that are kept at most, of all splits together.

    Attributes
    ----------
    held : int
        Bytes that are kept.
    reader : Reader
        It reads and copies, so that the frames of two splits are never read at once.
    """

    def __init__(self, device: torch.device, limit: int) -> None:
        self.device, self.limit, self.held = device, limit, 0
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._kept: dict[str, dict[int, Placed]] = {}
        self.reader = Reader()
        weakref.finalize(self, self.reader.end)

    def kept(self, split: str) -> dict[int, Placed]:
        """Return the frames of a split that are kept, by their index."""
        return self._kept.setdefault(split, {})

    def keep(self, split: str, frame: Placed) -> None:
        """Keep a frame if there is room for it."""
        kept, size = self.kept(split), _bytes(frame.item)
        if frame.index not in kept and self.held + size <= self.limit:
            self.held += size
            kept[frame.index] = frame

    def place(self, numbered: list[tuple[int, tuple[Any, bool]]]) -> list[Placed]:
        """Put items of :class:`Drawn` on the device; on a GPU, return before they are there."""
        with self._beside():
            items = apply_to_collection(numbered, torch.Tensor, self._place)
            copied = None
            if self._stream is not None:
                copied = torch.cuda.Event()
                copied.record(self._stream)
        return [Placed(index, item, drew, copied) for index, (item, drew) in items]

    def ready(self, frame: Placed) -> Any:
        """Return an item that what this thread has the device do from now on can use."""
        if frame.copied is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(frame.copied)
            # Else its memory could be filled again before this stream is done with it.
            apply_to_collection(frame.item, torch.Tensor, lambda t: t.record_stream(stream))
        return frame.item

    def wait(self) -> None:
        """Wait until nothing is read that was asked for; some loop may have been left early."""
        self.reader.ask(lambda: None).result()

    def _beside(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _place(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._stream is None:  # the data set may hold, or change, what it has given
            return tensor.to(self.device, copy=True)
        return tensor.pin_memory().to(self.device, non_blocking=True)


class Drawn(Dataset):
    """A data set whose items come with whether random numbers were drawn while they were read."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, bool]:
        """Read an item."""
        before = random_states()
        item = self.dataset[index]
        return item, random_states() != before


class Fed(DataLoader):
    """A loader whose batches are made on the device, of frames that are kept there or come in time.

    The frames of the next batch are read while the caller does its step. The order is drawn, and
    the first frames of an epoch are read, while the caller waits; if reading these draws random
    numbers in this process, all frames are read so: numbers are drawn in the order in which a
    loader without a thread would draw them. Frames that draw are not kept.

    Parameters
    ----------
    reader : DataLoader
        Over :class:`Drawn`, numbered, in :class:`~cuvis_dist.training.dealing.DealtBatches`; its
        ``collate_fn`` is :func:`as_tensors`.
    collate : callable
        It makes a batch of numbered items on the device.
    frames : DeviceFrames
        What this rank keeps.
    split : str
        Which split the reader reads.
    elsewhere : bool
        Whether other processes read, so that the random states are left alone.
    """

    def __init__(
        self,
        reader: DataLoader,
        collate: Callable[[Any], Any],
        frames: DeviceFrames,
        split: str,
        *,
        elsewhere: bool,
    ) -> None:
        super().__init__(reader.dataset, batch_sampler=reader.batch_sampler, collate_fn=collate)
        self._reader, self._frames, self._split = reader, frames, split
        self._elsewhere, self._drew = elsewhere, False
        self._dealt.unread = self._unread

    @property
    def _dealt(self) -> DealtBatches:
        return self.batch_sampler  # type: ignore[return-value]

    def _unread(self, batch: list[int]) -> list[int]:
        kept = self._frames.kept(self._split)
        return [index for index in batch if index not in kept]

    def __iter__(self) -> Any:
        """Yield the batches in order; raises what reading a frame raised."""
        self._frames.wait()
        return self._batches(iter(self._reader))

    def _batches(self, reading: Iterator[Any]) -> Iterator[Any]:
        beside, done = False, 0
        read = self._read_alone(reading)
        while read is not None:
            self._drew |= not beside and not self._elsewhere and any(each.drew for each in read)
            beside = beside or (bool(read) and not self._drew)
            coming = None
            if beside:
                coming = self._frames.reader.ask(partial(self._read, reading, self._elsewhere))
            yield self._batch(self._dealt.mine[done], read)
            read = coming.result() if coming else self._read_alone(reading)
            done += 1

    def _read_alone(self, reading: Iterator[Any]) -> deque[Placed] | None:
        """Read while nothing else is done or read."""
        self._frames.wait()
        return self._read(reading, True)

    def _read(self, reading: Iterator[Any], alone: bool) -> deque[Placed] | None:
        """Return those frames of the next batch that were not kept, or None at the end.

        If they are not read ``alone``, what was drawn meanwhile was drawn by the caller's step.
        """
        numbered = next(reading, None)
        if numbered is None:
            return None
        placed = deque(self._frames.place(numbered))
        for frame in placed:
            if not (alone and frame.drew):
                self._frames.keep(self._split, frame)
        return placed

    def _batch(self, indices: list[int], read: deque[Placed]) -> Any:
        """Return the batch of some frames; what is not kept of those read is then let go."""
        kept, numbered = self._frames.kept(self._split), []
        for index in indices:
            frame = read.popleft() if read and read[0].index == index else kept[index]
            numbered.append((index, self._frames.ready(frame)))
        return self.collate_fn(numbered)


def as_tensors(numbered: list[Any]) -> list[Any]:
    """Return items with tensors for their arrays, as far as torch has their type."""
    return apply_to_collection(numbered, np.ndarray, _as_tensor)


def _as_tensor(array: np.ndarray) -> Any:
    try:
        return torch.as_tensor(array)
    except (TypeError, ValueError):  # as it is, it is refused when it is to become a batch
        return array


def _bytes(item: Any) -> int:
    sizes: list[int] = []
    apply_to_collection(item, torch.Tensor, lambda tensor: sizes.append(tensor.nbytes))
    return sum(sizes)
