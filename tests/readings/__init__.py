"""How do tests count which frames were read, and by whatever process?

Every reading is a line of a log. :class:`CountedCubes` writes one for each frame of a data set;
``sitecustomize.py`` beside this file for each file that a process opens, where the process has
the variables of :func:`counting`.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Dataset


def note(log: Path, index: int) -> None:
    """Write down that a frame is read; lines of several processes do not mix."""
    with open(log, "a", encoding="utf-8") as file:
        file.write(f"{index}\n")


def counted(log: Path) -> Counter:
    """How often each frame was read: by index, or by file name where files were noted."""
    return Counter(int(n) if n.isdigit() else n for n in log.read_text().split())


def counting(log: Path, *paths: object, seconds: float = 0.1) -> dict[str, str]:
    """Variables of a process that notes each frame file that it opens, and waits for a moment.

    Parameters
    ----------
    paths : path
        Folders of modules that the process needs, before those of this one.
    """
    folders = [str(Path(__file__).parent), *map(str, paths), os.environ["PYTHONPATH"]]
    return {
        "CUVIS_DIST_READINGS": str(log),
        "CUVIS_DIST_READING_SECONDS": str(seconds),
        "PYTHONPATH": os.pathsep.join(folders),
    }


class Wrapped(Dataset):
    """Another data set, with all that a data module may ask of it."""

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


class CountedCubes(Wrapped):
    """A data set whose log says which frames were read, whichever process read them."""

    def __init__(self, dataset: Dataset, log: Path) -> None:
        super().__init__(dataset)
        self.log = log
        log.touch()

    def __getitem__(self, index):
        note(self.log, index)
        return self.dataset[index]


def count_readings(module: pl.LightningDataModule, split: str, log: Path) -> None:
    """Let a data module note which frames of a split are read; it can be pickled."""
    name = f"{split}_dataloader"
    setattr(module, name, partial(_noted, getattr(module, name), log))


def _noted(served, log: Path) -> DataLoader:
    loader = served()
    return DataLoader(
        CountedCubes(loader.dataset, log), loader.batch_size, collate_fn=loader.collate_fn
    )


def wrap_train(module: pl.LightningDataModule, wrapper) -> None:
    """Let ``module`` serve its train split through ``wrapper``, also after another set-up."""
    served = module.train_dataloader

    def train_dataloader() -> DataLoader:
        loader = served()
        return DataLoader(wrapper(loader.dataset), collate_fn=loader.collate_fn)

    module.train_dataloader = train_dataloader
