"""Which batches does a rank get, and how are their frames read?

The user's data module opens each split; its batches are dealt (:mod:`~cuvis_dist.training.dealing`)
over the ranks. Each node may keep frames (:mod:`~cuvis_dist.archive.frame_cache`), or each rank on
its device (:mod:`~cuvis_dist.training.feeding`), and a rank have them read elsewhere
(:mod:`~cuvis_dist.training.read_ahead`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from cuvis_dist.archive import Frame, NamedFrames, NamingCollate, Numbered, open_split
from cuvis_dist.errors import InputError
from cuvis_dist.training.agreement import Head
from cuvis_dist.training.assignment import Assignment, Seat
from cuvis_dist.training.configuration import check_batches
from cuvis_dist.training.dealing import (
    Batches,
    Dealing,
    DealtBatches,
    WatchedFrames,
    deal,
    keeps_own_order,
)
from cuvis_dist.training.feeding import DeviceFrames, Drawn, Fed, as_tensors
from cuvis_dist.training.heartbeat import Heartbeat
from cuvis_dist.training.places import Places
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
        self.cache, self.node, self.decoded = assignment.cache, seat.node, assignment.decoded
        self.notes: list[str] = []
        self.in_order: set[str] = set()
        self._parted = False
        #: Whether the train loader waits until it is told where a fit goes on.
        self._goes_on = assignment.verb == "fit" and assignment.checkpoint is not None
        self._on_device = assignment.verb == "fit" and "device" in self.scaling.reading.cache
        self._frames: DeviceFrames | None = None

    def setup(self, stage: str | None = None) -> None:
        """Show the module its trainer; :func:`~cuvis_dist.archive.open_split` sets it up."""
        self.module.trainer = self.trainer

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Do with a batch what the user's module does before it is on the device."""
        return self.module.on_before_batch_transfer(batch, dataloader_idx)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Take a batch to the device as the user's module does."""
        return self.module.transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Do with a batch what the user's module does once it is on the device."""
        return self.module.on_after_batch_transfer(batch, dataloader_idx)

    def _loader(self, split: str, limit: int | float | None = None) -> DataLoader:
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
        if split == "train" and (places := self._places()):
            batches.arrange = places.arrange
        batches.held = split == "train" and self._goes_on
        if split == "train" and keeps_own_order(loader):
            self.notes.append(
                f"the train loader of {type(self.module).__name__} keeps a random state of its "
                "own: frames come in the order that rank 0 draws, which is not upstream's where "
                "phase 1 draws from the same state"
            )
        if self.trainer is not None:  # a fit that goes on asks for its epoch before it says so
            batches.set_epoch(self.trainer.current_epoch)
        if split != "test":
            check_batches(self.config, split, len(loader))
        reading = self.scaling.reading
        named = self._named(split, loader, frames)
        watched: Dataset = named
        if self.world_size > 1:
            watched = WatchedFrames(named, self._note_parting)
        on_device = self._device_frames(loader)
        dealt = deal(loader, Numbered(Drawn(watched) if on_device else watched), batches)
        collate = NamingCollate(loader.collate_fn, frames)
        dealt.collate_fn = as_tensors if on_device else collate
        reader = dealt
        if reading.read_ahead:
            starting = partial(self.heartbeat.doing, STARTING)
            retries = self.scaling.resources.max_failures
            reader = ReadAhead(
                dealt, reading.read_ahead, kept=named.kept, retries=retries, starting=starting
            )
        if on_device is None:
            return reader
        if split == "train" and self.world_size > 1:
            batches.share = partial(self._agree_on_places, batches, on_device)
        elsewhere = bool(reading.read_ahead or loader.num_workers)
        return Fed(reader, collate, on_device, split, elsewhere=elsewhere)

    def _device_frames(self, loader: DataLoader) -> DeviceFrames | None:
        """Return what this rank keeps on its device, or None if frames are not put there."""
        if not self._on_device:
            return None
        if loader.collate_fn is not default_collate:
            note = (
                f"reading.cache is {self.scaling.reading.cache}, but {type(self.module).__name__} "
                "makes batches by a collate_fn of its own: its frames are not kept on the device"
            )
            self.notes += [note] if note not in self.notes else []
            return None
        if self._frames is None:
            device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
            self._frames = DeviceFrames(device, self.scaling.reading.cache_bytes)
        return self._frames

    def _dealing(self, split: str) -> Dealing:
        if split == "train":
            return Dealing.CUT
        return Dealing.ALL if split in self.in_order else Dealing.TURNS

    def _places(self) -> Places | None:
        """Return where frames of the train split have been decoded, if nodes keep them.

        On one node, every rank has what another has decoded.
        """
        if self.cache is None or self.world_size == 1:
            return None
        nodes = [""] * self.world_size
        with self.heartbeat.doing("agreeing on the order"):
            torch.distributed.all_gather_object(nodes, self.node)
        return Places(nodes, self.decoded) if len(set(nodes)) > 1 else None

    def _agree_on_places(
        self, dealt: DealtBatches, frames: DeviceFrames, batches: Batches
    ) -> Batches:
        """Return rank 0's batches, and have each frame dealt to a rank that keeps it."""
        batches = self._agree("train", batches)
        kept: list[list[int]] = [[]] * self.world_size
        with self.heartbeat.doing("agreeing on the order"):
            torch.distributed.all_gather_object(kept, list(frames.kept("train")))
        if any(kept):  # else nodes may have some
            dealt.arrange = Places.of_ranks(kept).arrange
        return batches

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
        return Head(self._named(split, loader, frames), loader.collate_fn)

    def _named(self, split: str, loader: DataLoader, frames: list[Frame]) -> NamedFrames:
        cache = self.cache.of(split) if self.cache is not None else None
        return NamedFrames(loader.dataset, frames, cache)

    def _note_parting(self) -> None:
        """Have it said once that later epochs have another order than upstream's."""
        if not self._parted:
            self._parted = True
            self.notes.append(
                f"the frames of {type(self.module).__name__}, or nodes, draw random numbers for "
                f"each frame, and each of {self.world_size} workers for its own: after the first "
                "epoch the order of frames is rank 0's, and not upstream's"
            )

    def train_dataloader(self) -> DataLoader:
        """Return this rank's part of every training batch."""
        return self._loader("train", self.config.limit_train_batches)

    def val_dataloader(self) -> DataLoader:
        """Return this rank's validation batches."""
        return self._loader("val", self.config.limit_val_batches)

    def test_dataloader(self) -> DataLoader:
        """Return this rank's test batches."""
        return self._loader("test")
