"""Datasets that are hard to read: one kills its reader and counts its readings, one is slow."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset


class FragileCubes(Dataset):
    """Twelve frames; reading frame 7 for the first time kills the process that reads it."""

    def __init__(self, folder: Path, fragile: bool) -> None:
        self.folder, self.fragile = folder, fragile

    def __len__(self):
        return 12

    def __getitem__(self, index):
        with open(self.folder / "read.log", "a", encoding="utf-8") as log:
            log.write(f"{index}\n")
        marker = self.folder / "died"
        if self.fragile and index == 7 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        rng = np.random.default_rng(index)
        return {
            "cube": rng.random((9, 8, 5), dtype=np.float32),
            "wavelengths": np.arange(5, dtype=np.int32),
        }


class FragileModule(pl.LightningDataModule):
    def __init__(self, folder: Path, fragile: bool = False) -> None:
        super().__init__()
        self.cubes = FragileCubes(folder, fragile)

    def train_dataloader(self):
        return DataLoader(self.cubes, shuffle=True)


class SlowCubes(Dataset):
    """Another dataset, some of whose frames take a second."""

    def __init__(self, dataset: Dataset, slow: tuple[int, ...]) -> None:
        self.dataset, self.slow = dataset, slow

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if index in self.slow:
            time.sleep(1)
        return self.dataset[index]

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)
