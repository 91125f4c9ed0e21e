"""A dataset whose reader dies once, in the middle of the archive, and that counts its readings."""

from __future__ import annotations

import os
import signal
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
