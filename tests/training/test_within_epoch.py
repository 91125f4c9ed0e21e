"""A fit that is cut off within an epoch goes on at the next step, as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from cases import CASES
from cuvis_ai_core.training.config import TrainingConfig, create_callbacks_from_config
from gradients import Epochs
from readings import CountedCubes
from settings import scaling_of
from steps import frames, state_of
from torch.utils.data import DataLoader, Dataset
from torchmetrics.aggregation import SumMetric

from cuvis_dist import GradientTrainer
from cuvis_dist.storage import relocated
from cuvis_dist.training.checkpoint import LAST, Reached, reached

FRAMES, SIZE = 11, 2


class Cubes(Dataset):
    def __init__(self) -> None:
        self.frames = frames(FRAMES)

    def __len__(self):
        return FRAMES

    def __getitem__(self, index):
        return {name: value[index] for name, value in self.frames.items()}


class Module(pl.LightningDataModule):
    """Shuffled train frames whose readings are noted, and some of them for validation."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.log = folder / "read.log"

    def train_dataloader(self):
        return DataLoader(CountedCubes(Cubes(), self.log), SIZE, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Cubes(), 4)

    test_dataloader = val_dataloader


class Watching(pl.Callback):
    """Draws random numbers and logs them; notes each step, and copies what is kept before it."""

    def __init__(self, copies: Path) -> None:
        self.copies, self.values = copies, []

    def setup(self, trainer, pl_module, stage):
        pl_module.seen = SumMetric()
        pl_module.last.pace.pause = 0

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.log("once", torch.tensor(2.0 + trainer.current_epoch), on_epoch=True)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        root, copy = (
            pl_module.last.mirror.root,
            self.copies / f"{trainer.current_epoch}-{batch_idx}",
        )
        if reached(root / LAST) == Reached(trainer.current_epoch, batch_idx) and not copy.exists():
            for name in ("resume", "checkpoints"):
                if (root / name).exists():
                    shutil.copytree(root / name, copy / name)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        drawn = torch.rand(()) + np.random.rand() + random.random()
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1 + 1e-3 * drawn)
        for name in ("mean", "sum", "max", "min"):
            pl_module.log(f"drawn_{name}", drawn, on_step=True, on_epoch=True, reduce_fx=name)
        pl_module.seen.update(drawn)
        pl_module.log("seen", pl_module.seen, on_epoch=True)
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.values.append((trainer.global_step, float(drawn), float(outputs["loss"]), rate))

    def state_dict(self):
        return {"values": self.values}

    def load_state_dict(self, state_dict):
        self.values = state_dict["values"]


def fit(name: str, folder: Path, options: dict) -> dict:
    """Train in this process; return everything that must not depend on being cut off."""
    folder.mkdir(exist_ok=True)
    pl.seed_everything(3)
    pipeline, losses = CASES[name]()
    config = TrainingConfig(
        seed=5, enable_progress_bar=False, default_root_dir=str(folder), num_sanity_val_steps=0,
        **options,
    )  # fmt: skip
    config.callbacks.checkpoint.dirpath = str(folder / "checkpoints")
    trainer = GradientTrainer(
        pipeline, Module(folder), losses, [], config,
        callbacks=[
            Watching(folder.parent / "cut off"), Epochs(),
            *create_callbacks_from_config(config.callbacks),
        ],
        scaling=scaling_of(workers=0, train_workers=0, save_seconds=0),
        output_dir=folder,
    )  # fmt: skip
    trainer.fit(resume=(folder / LAST).exists())
    watching, epochs, *others = trainer.callbacks
    return relocated({
        "nodes": state_of(pipeline),
        "steps": watching.values,
        "epochs": epochs.values,
        "callbacks": [each.state_dict() for each in others],
        "trained": trainer.epochs,
    }, lambda text: text.replace(str(folder), ""))  # fmt: skip


def readings(folder: Path) -> list[str]:
    return (folder / "read.log").read_text().split()


def assert_equal(ours, theirs) -> None:
    """Compare down to the bits."""
    if isinstance(theirs, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(theirs, dict):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_equal(ours[key], value)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            assert_equal(mine, other)
    else:
        assert ours == theirs


ACCUMULATING = {
    "max_epochs": 5, "accumulate_grad_batches": 2, "val_check_interval": 2,
    "optimizer": {"name": "adamw", "lr": 0.05},
    "scheduler": {"name": "plateau", "monitor": "val_loss", "patience": 0},
    "callbacks": {
        "early_stopping": [{"monitor": "val_loss", "patience": 6, "min_delta": 0.1}],
        "checkpoint": {"monitor": "val_loss", "every_n_train_steps": 2, "save_top_k": 2},
    },
}  # fmt: skip
PLAIN = {
    "max_epochs": 3, "optimizer": {"name": "sgd", "lr": 0.02}, "check_val_every_n_epoch": 2,
    "scheduler": {"name": "cosine", "t_max": 3},
    "callbacks": {"checkpoint": {"monitor": "val_loss", "save_last": True}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [("mixer_with_batch_norm-None", ACCUMULATING, 6), ("unknown-Noise", PLAIN, 17)],
    ids=["batch norm, accumulation, plateau", "noise, cosine"],
)
def test_goes_on_within_an_epoch(tmp_path, name, options, least):
    """From any step, and from the start of an epoch; each frame of the rest is read once."""
    whole = fit(name, tmp_path / "whole", options)
    read = readings(tmp_path / "whole")
    copies = list((tmp_path / "cut off").iterdir())
    assert len(copies) >= least
    for folder in copies:
        epoch, batch = map(int, folder.name.split("-"))
        resumed = fit(name, folder, options)
        assert readings(folder) == read[epoch * FRAMES + batch * SIZE :]
        assert_equal(resumed, whole)
