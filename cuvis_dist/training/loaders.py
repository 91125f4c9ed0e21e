"""Which batches does a rank get, and how are their frames read?

The user's data module opens each split; its batches are dealt (:mod:`~cuvis_dist.training.dealing`)
over the ranks. A rank may keep frames (:mod:`~cuvis_dist.training.frame_cache`), and have them read
elsewhere (:mod:`~cuvis_dist.training.read_ahead`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset

from cuvis_dist.archive import NamedFrames, NamingCollate, Numbered, open_split
from cuvis_dist.errors import InputError
from cuvis_dist.training.agreement import Head
from cuvis_dist.training.assignment import Assignment, Seat
from cuvis_dist.training.dealing import (
    Batches,
    Dealing,
    DealtBatches,
    WatchedFrames,
    deal,
    keeps_own_order,
)
from cuvis_dist.training.frame_cache import CachedFrames, FrameCache, make_cache
from cuvis_dist.training.heartbeat import Heartbeat
from cuvis_dist.training.read_ahead import ReadAhead
from cuvis_dist.training.watch import STARTING


class DealtDataModule(pl.LightningDataModule):
    """The run's data module, with every loader dealt to this rank.

    Parameters
    ----------
    assignment : Assignment
        It has the data module, and says how frames are read and kept.
    seat : Seat
        Which rank this is.
    heartbeat : Heartbeat
        It tells the watch when readers are waited for.

    Attributes
    ----------
    module : LightningDataModule
        The user's own.
    rank, world_size : int
        Which rank this is, of how many.
    notes : list of str
        What the driver shall say, once each.
    in_order : set of str
        Splits whose every batch every rank runs: see
        :class:`~cuvis_dist.training.dealing.DealtBatches`.
    """

    def __init__(self, assignment: Assignment, seat: Seat, heartbeat: Heartbeat) -> None:
        super().__init__()
        self.module, self.heartbeat = assignment.parts.datamodule, heartbeat
        self.config, self.scaling = assignment.parts.config, assignment.scaling
        self.rank, self.world_size = seat.rank, seat.world_size
        self._run = seat.run
        self._caches: dict[str, FrameCache] = {}
        self.notes: list[str] = []
        self.in_order: set[str] = set()
        self._parted = False
        #: Whether the train loader waits until it is told where a fit goes on.
        self._goes_on = assignment.verb == "fit" and assignment.checkpoint is not None

    def setup(self, stage: str | None = None) -> None:
        """Do nothing: :func:`~cuvis_dist.archive.open_split` sets the module up per split."""

    def _loader(self, split: str, limit: int | float | None = None) -> DataLoader | ReadAhead:
        """Return this rank's loader of a split, of so many or such a part of its batches.

        Raises
        ------
        InputError
            If the data module cannot serve the split, or the limit leaves no batch of it.
        DataError
            If a remote file that it opens cannot be fetched.
        """
        loader, frames = open_split(self.module, split)
        batches = DealtBatches(
            loader,
            self.rank,
            self.world_size,
            dealing=self._dealing(split),
            limit=limit,
            share=partial(self._agree, split),
        )
        batches.held = split == "train" and self._goes_on
        if split == "train" and keeps_own_order(loader):
            self.notes.append(
                f"the train loader of {type(self.module).__name__} keeps a random state of its "
                "own: frames come in the order that rank 0 draws, which is not upstream's where "
                "phase 1 draws from the same state"
            )
        if self.trainer is not None:  # a fit that goes on asks for its epoch before it says so
            batches.set_epoch(self.trainer.current_epoch)
        if limit and not len(batches):
            raise InputError(
                f"training.limit_{split}_batches is {limit}, which leaves none of the "
                f"{len(loader)} batches of the {split} split"
            )
        reading = self.scaling.reading
        named: Dataset = NamedFrames(loader.dataset, frames)
        if self.world_size > 1:
            named = WatchedFrames(named, self._note_parting)
        dataset = Numbered(self._cached(split, named, loader.num_workers))
        dealt = deal(loader, dataset, batches, keep_workers=reading.cache == "memory")
        dealt.collate_fn = NamingCollate(loader.collate_fn, frames)
        if not reading.read_ahead:
            return dealt
        starting = partial(self.heartbeat.doing, STARTING)
        retries = self.scaling.resources.max_failures
        return ReadAhead(dealt, reading.read_ahead, retries=retries, starting=starting)

    def _dealing(self, split: str) -> Dealing:
        if split == "train":
            return Dealing.CUT
        return Dealing.ALL if split in self.in_order else Dealing.TURNS

    def _agree(self, split: str, batches: Batches) -> Batches:
        """Return rank 0's batches, and go on from rank 0's random state as it has drawn them.

        Raises
        ------
        InputError
            If the ranks have unequal numbers of batches.
        """
        if self.world_size == 1:
            return batches
        with self.heartbeat.doing("agreeing on the order"):
            mine = len(batches), torch.get_rng_state().numpy().tobytes()
            everyones: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(everyones, mine)
            steps, states = zip(*everyones, strict=True)
            epoch = self.trainer.current_epoch + 1 if self.trainer else 1
            if len(set(steps)) > 1:
                counts = ", ".join(f"rank {rank} {n}" for rank, n in enumerate(steps))
                raise InputError(
                    f"the workers have unequal numbers of batches in epoch {epoch} ({counts}): "
                    f"the {split} loader of {type(self.module).__name__} is another one in each "
                    "process. It must list the same batches everywhere under the same seed; "
                    "cuvis_dist deals them"
                )
            if len(set(states)) > 1:
                self._note_parting()
            shared = [batches]
            torch.distributed.broadcast_object_list(shared)
        torch.set_rng_state(torch.frombuffer(bytearray(states[0]), dtype=torch.uint8))
        return shared[0]

    def head(self, split: str) -> Head:
        """Return the first frames of a split.

        Raises
        ------
        InputError
            If the data module cannot serve the split.
        """
        loader, frames = open_split(self.module, split)
        return Head(NamedFrames(loader.dataset, frames), loader.collate_fn)

    def _note_parting(self) -> None:
        """Have it said once that later epochs have another order than upstream's."""
        if not self._parted:
            self._parted = True
            self.notes.append(
                f"the frames of {type(self.module).__name__}, or nodes, draw random numbers for "
                f"each frame, and each of {self.world_size} workers for its own: after the first "
                "epoch the order of frames is rank 0's, and not upstream's"
            )

    def _cached(self, split: str, frames: Dataset, processes: int) -> Dataset:
        """Keep the frames of a split as the scaling says, over all of its loaders.

        Each of the ``processes`` of a loader has a cache of its own, which share the bytes.
        """
        reading = self.scaling.reading
        if reading.cache == "none":
            return frames
        if split not in self._caches:
            limit = reading.cache_bytes - sum(cache.held for cache in self._caches.values())
            limit //= max(1, processes)
            self._caches[split] = make_cache(reading.cache, limit, f"{self._run}-{split}")
        return CachedFrames(frames, self._caches[split])

    def close(self) -> None:
        """Give back what the caches hold."""
        for cache in self._caches.values():
            cache.clear()

    def train_dataloader(self) -> DataLoader | ReadAhead:
        """Return this rank's part of every training batch."""
        return self._loader("train", self.config.limit_train_batches)

    def val_dataloader(self) -> DataLoader | ReadAhead:
        """Return this rank's validation batches."""
        return self._loader("val", self.config.limit_val_batches)

    def test_dataloader(self) -> DataLoader | ReadAhead:
        """Return this rank's test batches."""
        return self._loader("test")
