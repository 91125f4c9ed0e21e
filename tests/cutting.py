"""How do tests cut a fit off within an epoch, and let it go on? Here, and on ranks without Ray."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from cases import CASES
from cuvis_ai_core.training.config import TrainingConfig, create_callbacks_from_config
from faults import die
from gradients import Epochs
from pytorch_lightning.callbacks import GradientAccumulationScheduler
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy
from readings import note
from settings import scaling_of
from steps import frames, state_of
from torch.utils.data import DataLoader, Dataset
from torchmetrics.aggregation import SumMetric

from cuvis_dist import GradientTrainer
from cuvis_dist.storage import relocated
from cuvis_dist.training.assignment import Assignment, Driver, Seat
from cuvis_dist.training.checkpoint import LAST, Reached, reached
from cuvis_dist.training.rank import run_rank
from cuvis_dist.training.watch import Watch

FRAMES, SIZE = 11, 2


class Cubes(Dataset):
    """Frames whose readings are noted in training, where the n-th one may kill the process."""

    def __init__(self, folder: Path | None = None, dies_at: int = 0) -> None:
        self.frames, self.folder, self.dies_at = frames(FRAMES), folder, dies_at

    def __len__(self):
        return FRAMES

    def __getitem__(self, index):
        if self.folder is not None:
            note(self.folder / "read.log", index)
            if len(readings(self.folder)) == self.dies_at:
                die()
        return {name: value[index] for name, value in self.frames.items()}


def readings(folder: Path) -> list[str]:
    """Return which frames were read in training, in order."""
    return (folder / "read.log").read_text().split()


class Module(pl.LightningDataModule):
    """Shuffled train frames, and the same ones for validation."""

    def __init__(self, cubes: Cubes) -> None:
        super().__init__()
        self.cubes = cubes

    def train_dataloader(self):
        return DataLoader(self.cubes, SIZE, shuffle=True)

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
        root, now = pl_module.last.mirror.root, Reached(trainer.current_epoch, batch_idx)
        copy = self.copies / f"{now.epochs}-{now.batches}"
        if trainer.is_global_zero and reached(root / LAST) == now and not copy.exists():
            for name in ("resume", "checkpoints"):
                if (root / name).exists():
                    shutil.copytree(root / name, copy / name)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        drawn = torch.rand(()) + np.random.rand() + random.random()
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1 + 1e-3 * drawn)
        part = drawn / trainer.world_size
        for name in ("mean", "sum", "max", "min"):
            said = part if name == "sum" else drawn
            pl_module.log(f"drawn_{name}", said, on_step=True, on_epoch=True, reduce_fx=name)
        pl_module.seen.update(part)
        pl_module.log("seen", pl_module.seen, on_epoch=True)
        loss, rate = trainer.callback_metrics["train_loss"], trainer.optimizers[0].param_groups[0]
        self.values.append((trainer.global_step, float(drawn), float(loss), rate["lr"]))

    def state_dict(self):
        return {"values": self.values}

    def load_state_dict(self, state_dict):
        self.values = state_dict["values"]


def fit(name: str, folder: Path, options: dict, dies_at: int = 0, cache: str = "none") -> dict:
    """Train in this process; return everything that must not depend on being cut off."""
    trainer = _trainer(name, folder, options, dies_at, cache)
    trainer.fit(resume=(folder / LAST).exists())
    return _found(trainer, folder)


def fit_rank(
    rank: int, world_size: int, group: object,
    name: str, folder: Path, options: dict, cache: str = "none",
) -> dict:  # fmt: skip
    """Train as one of the ranks of a process group, as a worker of Ray Train does."""
    trainer = _trainer(name, folder, options, cache=cache)
    assignment = Assignment("fit", None, trainer._parts(), trainer.output, trainer.scaling)
    lightning = {
        "strategy": DDPStrategy(find_unused_parameters=True),
        "plugins": [_Environment(rank, world_size)],
        "devices": world_size,
    }
    driver = Driver(lambda event: None, _Watch(60), os.getcwd())
    torch.distributed.barrier()
    run_rank(assignment, Seat(rank, world_size, "run", "group", "", driver, lightning))
    return _found(trainer, folder)


class _Watch(Watch):
    def end(self) -> None:
        die()


class _Environment(LightningEnvironment):
    """Ranks as the process group has them."""

    def __init__(self, rank: int, world_size: int) -> None:
        super().__init__()
        self._global_rank, self._world_size = rank, world_size

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._global_rank

    def set_world_size(self, size: int) -> None:
        """Do nothing: it is known."""

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: it is known."""


def _trainer(
    name: str, folder: Path, options: dict, dies_at: int = 0, cache: str = "none"
) -> GradientTrainer:
    folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(3)
    pipeline, losses = CASES[name]()
    config = TrainingConfig(
        seed=5, enable_progress_bar=False, default_root_dir=str(folder), num_sanity_val_steps=0,
        **options,
    )  # fmt: skip
    config.callbacks.checkpoint.dirpath = str(folder / "checkpoints")
    more = create_callbacks_from_config(config.callbacks)
    if config.accumulate_grad_batches > 1:  # said by a callback, which is no state of its own
        more.append(GradientAccumulationScheduler({0: config.accumulate_grad_batches}))
        config.accumulate_grad_batches = 1
    return GradientTrainer(
        pipeline, Module(Cubes(folder, dies_at)), losses, [], config,
        callbacks=[Watching(folder.parent / "cut off"), Epochs(), *more],
        scaling=scaling_of(workers=0, train_workers=0, save_seconds=0, cache=cache),
        output_dir=folder,
    )  # fmt: skip


def _found(trainer: GradientTrainer, folder: Path) -> dict:
    watching, epochs, *others = trainer.callbacks
    found = {
        "nodes": state_of(trainer.pipeline),
        "steps": watching.values,
        "epochs": epochs.values,
        "callbacks": [each.state_dict() | {"current_score": None} for each in others],
    }
    return relocated(found, lambda text: text.replace(str(folder), ""))
