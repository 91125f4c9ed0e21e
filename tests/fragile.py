"""Datasets that count their readings, take a while, or kill the process that reads them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Dataset


class FragileCubes(Dataset):
    """Twelve frames; reading frame 7 for the first time kills the process that reads it."""

    def __init__(self, folder: Path, fragile: bool, bands: int = 5) -> None:
        self.folder, self.fragile, self.bands = folder, fragile, bands

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
            "cube": rng.random((9, 8, self.bands), dtype=np.float32),
            "wavelengths": np.linspace(430, 970, self.bands).astype(np.int32),
        }


class FragileModule(pl.LightningDataModule):
    def __init__(self, folder: Path, fragile: bool = False, cubes: Dataset | None = None) -> None:
        super().__init__()
        self.cubes = cubes or FragileCubes(folder, fragile)

    def train_dataloader(self):
        return DataLoader(self.cubes, shuffle=True)


class Wrapped(Dataset):
    """Another dataset, with all that a data module may ask of it."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]

    def __getattr__(self, name):
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)


class SlowCubes(Wrapped):
    """Some of whose frames take a second."""

    def __init__(self, dataset: Dataset, slow: tuple[int, ...]) -> None:
        super().__init__(dataset)
        self.slow = slow

    def __getitem__(self, index):
        if index in self.slow:
            time.sleep(1)
        return self.dataset[index]


class CountedCubes(Wrapped):
    """That notes which frames were read, by any process."""

    def __init__(self, dataset: Dataset, log: Path) -> None:
        super().__init__(dataset)
        self.log = log
        log.touch()

    def __getitem__(self, index):
        with open(self.log, "a", encoding="utf-8") as log:
            log.write(f"{index}\n")
        return self.dataset[index]


def wrap_train(module: pl.LightningDataModule, wrapper) -> None:
    """Let ``module`` serve its train split through ``wrapper``, also after another set-up."""
    served = module.train_dataloader

    def train_dataloader() -> DataLoader:
        loader = served()
        return DataLoader(wrapper(loader.dataset), collate_fn=loader.collate_fn)

    module.train_dataloader = train_dataloader


class IntegerCubes(Wrapped):
    """All frames in memory, as tensors of types that torch cannot unpickle: cubes of uint16."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset)
        self.frames = [
            item
            | {
                "cube": (torch.as_tensor(item["cube"]) * 10_000).to(torch.uint16),
                "serial": torch.tensor(index, dtype=torch.uint32),
            }
            for index, item in enumerate(dataset[i] for i in range(len(dataset)))
        ]

    def __getitem__(self, index):
        return self.frames[index]


def serve_integers(module: pl.LightningDataModule) -> pl.LightningDataModule:
    """Let every loader of ``module`` serve :class:`IntegerCubes`."""
    module.setup("fit")
    module.setup("test")
    for name in ("train_ds", "val_ds", "test_ds"):
        setattr(module, name, IntegerCubes(getattr(module, name)))
    module.setup = _leave
    return module


def _leave(stage: str | None = None) -> None:
    """Leave a data module as it is."""
