"""A demo module whose reading goes wrong once, and a log of all readings."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytorch_lightning as pl
import torch.distributed
from torch.utils.data import DataLoader, Dataset, Subset


class Troubled(Dataset):
    """Frames that are noted when read; at the n-th reading something happens, once."""

    def __init__(self, dataset, folder: Path, trouble: str, at: int, rank: int | None) -> None:
        self.dataset, self.folder = dataset, folder
        self.trouble, self.at, self.rank = trouble, at, rank

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        log = self.folder / "read.log"
        with open(log, "ab") as file:
            file.write(b".")
        mine = self.rank is None or torch.distributed.get_rank() == self.rank
        if mine and log.stat().st_size >= self.at:
            try:
                (self.folder / "happened").touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                if self.trouble == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(3600)
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
    """A module that splits its frames itself, and unequally."""

    def __init__(self, module):
        pl.LightningDataModule.__init__(self)
        self.module = module

    def train_dataloader(self):
        loader = self.module.train_dataloader()
        frames = range(10 - 4 * torch.distributed.get_rank())
        return DataLoader(
            Subset(loader.dataset, frames), batch_size=2, collate_fn=loader.collate_fn
        )
