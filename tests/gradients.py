"""How do tests train a trainrun: by upstream in one process, and by ours on workers?"""

from __future__ import annotations

import pytorch_lightning as pl
from cuvis_ai_core.training import GradientTrainer as UpstreamGradientTrainer
from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer
from cuvis_ai_core.training.config import create_callbacks_from_config
from settings import scaling_of

from cuvis_dist import GradientTrainer
from cuvis_dist.runs.trainrun import load_trainrun


class Epochs(pl.Callback):
    """A callback that keeps every value that callbacks can monitor, epoch by epoch."""

    def __init__(self):
        self.values = []

    def on_train_epoch_start(self, trainer, pl_module):
        pl_module.log("said_between_steps", 1.0 + trainer.current_epoch, on_epoch=True)

    def on_train_epoch_end(self, trainer, pl_module):
        self.values.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def state_dict(self):
        return {"values": self.values}

    def load_state_dict(self, state_dict):
        self.values = state_dict["values"]


def initialized(path, folder, *overrides):
    """Return a trainrun after phase 1, its nodes unfrozen, its checkpoints in ``folder``."""
    trainrun = load_trainrun(path, [f"output_dir={folder}", *overrides])
    UpstreamStatisticalTrainer(trainrun.pipeline, trainrun.datamodule()).fit()
    trainrun.pipeline.unfreeze_nodes_by_name(trainrun.config.unfreeze_nodes)
    trainrun.config.training.callbacks.checkpoint.dirpath = str(folder / "checkpoints")
    return trainrun


def callbacks(trainrun):
    return [Epochs(), *create_callbacks_from_config(trainrun.config.training.callbacks)]


def train_upstream(trainrun, module=None):
    """Upstream's trainer in this process, on its own loader or that of another data module."""
    trainer = UpstreamGradientTrainer(
        trainrun.pipeline,
        module or trainrun.datamodule(),
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        trainrun.config.training.model_copy(update={"default_root_dir": str(trainrun.output_dir)}),
        callbacks=callbacks(trainrun),
    )
    trainer.fit()
    return trainer


def train(trainrun, workers, module=None, scaling=None, *, resume=False, more=(), **options):
    """Train by ours on ``workers`` workers, with the trainrun's data module or another.

    ``more`` are callbacks beside the trainrun's.
    """
    trainer = GradientTrainer(
        trainrun.pipeline,
        module or trainrun.datamodule(),
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        trainrun.config.training,
        callbacks=[*callbacks(trainrun), *more],
        scaling=scaling_of(train_workers=workers, **scaling or {}),
        output_dir=trainrun.output_dir,
        **options,
    )
    trainer.fit(resume=resume)
    return trainer
