"""Which faults do tests inject? Data whose reading kills its process, hangs, or takes a while.

A fault happens once: the process that meets it leaves a file, by which others know.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed
from readings import CountedCubes, Wrapped, note
from torch.utils.data import DataLoader, Dataset, Sampler, Subset


def happens_now(marker: Path) -> bool:
    """Whether nobody has met the fault before; from now on somebody has."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def die() -> None:
    """End this process as the kernel does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    """Do what Ctrl-C does."""
    signal.raise_signal(signal.SIGINT)


def hang() -> None:
    """Do nothing, for longer than any test waits."""
    time.sleep(3600)


# ---- small frames that need no archive -------------------------------------------------


class FragileCubes(Dataset):
    """Twelve frames; where fragile, the first reading of frame 7 kills the process that reads."""

    def __init__(self, folder: Path, fragile: bool, bands: int = 5) -> None:
        self.folder, self.fragile, self.bands = folder, fragile, bands

    def __len__(self):
        return 12

    def __getitem__(self, index):
        note(self.folder / "read.log", index)
        if self.fragile and index == 7 and happens_now(self.folder / "died"):
            die()
        rng = np.random.default_rng(index)
        return {
            "cube": rng.random((9, 8, self.bands), dtype=np.float32),
            "wavelengths": np.linspace(430, 970, self.bands).astype(np.int32),
        }


class FragileModule(pl.LightningDataModule):
    """Serves :class:`FragileCubes`, or other cubes, as its train split."""

    def __init__(self, folder: Path, fragile: bool = False, cubes: Dataset | None = None) -> None:
        super().__init__()
        self.cubes = cubes or FragileCubes(folder, fragile)

    def train_dataloader(self):
        return DataLoader(self.cubes, shuffle=True)


# ---- faults in other data --------------------------------------------------------------


class SlowCubes(Wrapped):
    """A data set of which some frames take a second, so that shards overtake each other."""

    def __init__(self, dataset: Dataset, slow: tuple[int, ...]) -> None:
        super().__init__(dataset)
        self.slow = slow

    def __getitem__(self, index):
        if index in self.slow:
            time.sleep(1)
        return self.dataset[index]


class Troubled(Wrapped):
    """A data set whose readings are noted; at the n-th one the trouble happens."""

    def __init__(self, dataset, folder: Path, trouble: str, at: int, rank: int | None) -> None:
        super().__init__(dataset)
        self.folder, self.at, self.rank = folder, at, rank
        self.trouble = {"die": die, "sleep": hang, "interrupt": interrupt}[trouble]

    def __getitem__(self, index):
        log = self.folder / "read.log"
        note(log, index)
        mine = self.rank is None or torch.distributed.get_rank() == self.rank
        number = len(log.read_text().splitlines())
        if mine and number >= self.at and happens_now(self.folder / "happened"):
            self.trouble()
        return self.dataset[index]


class TroubledModule(pl.LightningDataModule):
    """Another module's data, with trouble in the train split."""

    def __init__(self, module, folder: Path, trouble: str, at: int, rank: int | None = None):
        super().__init__()
        self.module = module
        self.options = folder, trouble, at, rank

    def setup(self, stage=None):
        self.module.setup(stage)

    def train_dataloader(self):
        loader = self.module.train_dataloader()
        return DataLoader(
            Troubled(loader.dataset, *self.options),
            batch_size=loader.batch_size,
            shuffle=True,
            collate_fn=loader.collate_fn,
        )

    def val_dataloader(self):
        return self.module.val_dataloader()

    def test_dataloader(self):
        return self.module.test_dataloader()


class OwnFrames(TroubledModule):
    """A module that splits its frames over the ranks itself, and unequally."""

    def __init__(self, module):
        pl.LightningDataModule.__init__(self)
        self.module = module

    def train_dataloader(self):
        loader = self.module.train_dataloader()
        frames = range(10 - 4 * torch.distributed.get_rank())
        return DataLoader(
            Subset(loader.dataset, frames), batch_size=2, collate_fn=loader.collate_fn
        )


class Augmented(Wrapped):
    """Frames that draw a random number each, as an augmentation does."""

    def __getitem__(self, index):
        torch.rand(1)
        return self.dataset[index]


class AugmentedModule(TroubledModule):
    """A module whose train frames draw random numbers when they are read."""

    def __init__(self, module):
        pl.LightningDataModule.__init__(self)
        self.module = module

    def train_dataloader(self):
        loader = self.module.train_dataloader()
        return DataLoader(Augmented(loader.dataset), 3, shuffle=True, collate_fn=loader.collate_fn)


class TransferredModule(TroubledModule):
    """A module that halves the cubes of training batches once they are on the device.

    In evaluation it leaves them; its trainer tells which it is.
    """

    def __init__(self, module):
        pl.LightningDataModule.__init__(self)
        self.module = module

    def train_dataloader(self):
        return self.module.train_dataloader()

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch | {"cube": batch["cube"] / 2} if self.trainer.training else batch


class Unseeded(Sampler):
    """Another order in every process and epoch, from a generator that nobody seeds."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.random = np.random.default_rng()

    def __len__(self):
        return self.size

    def __iter__(self):
        return iter(self.random.permutation(self.size).tolist())


class UnseededModule(TroubledModule):
    """A module that draws its order elsewhere, and notes the frames that are read."""

    def __init__(self, module, folder: Path):
        pl.LightningDataModule.__init__(self)
        self.module, self.folder = module, folder

    def train_dataloader(self):
        loader = self.module.train_dataloader()
        cubes = CountedCubes(loader.dataset, self.folder / "read.log")
        sampler = Unseeded(len(cubes))
        return DataLoader(cubes, 5, sampler=sampler, collate_fn=loader.collate_fn)
