"""What do the ranks tell the driver and the user's monitors while they train?"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from cuvis_ai_core.training.post_fit import (
    EmitFn,
    EpochProgress,
    EvaluationOutcome,
    EvaluationStatus,
    FrameProgress,
    TrainEvent,
    TrainHook,
)
from cuvis_ai_schemas.enums import ExecutionStage
from pytorch_lightning import Callback

#: Seconds between two reports of progress inside an epoch.
_EVERY_S = 0.3


class StepMonitor:
    """Gives rank 0's monitors a training step's loss over all of its frames.

    Validation batches go to one worker whole: the monitors see those that rank 0 has.

    Parameters
    ----------
    of_all_frames : callable
        It returns a value over the frames of all ranks, all of which must call it.
    monitors : sequence
        The monitors; none on the other ranks.
    """

    def __init__(
        self, of_all_frames: Callable[[torch.Tensor], torch.Tensor], monitors: Sequence[Any]
    ) -> None:
        self.of_all_frames, self.monitors = of_all_frames, monitors

    def log(self, name: str, value: torch.Tensor, step: int) -> None:
        """Reduce a value over the ranks, and pass it on."""
        value = self.of_all_frames(value)
        for monitor in self.monitors:
            monitor.log(name, value, step=step)


class EpochEvents(Callback):
    """Reports a fit as upstream's events, a few times a second at most.

    Parameters
    ----------
    emit : callable
        It takes the events to the driver.
    """

    def __init__(self, emit: EmitFn) -> None:
        super().__init__()
        self.emit = emit
        self._done = 0
        self._sent = 0.0

    def _progress(self, trainer: pl.Trainer, hook: TrainHook, **values: Any) -> None:
        epochs = EpochProgress(trainer.current_epoch + 1, max(trainer.max_epochs or 0, 0))
        total = trainer.train_dataloader.batch_sampler.frames if trainer.train_dataloader else 0
        frames = FrameProgress(min(self._done, total), total)
        self.emit(TrainEvent(hook, epochs=epochs, progress=frames, **values))

    def _count(self, trainer: pl.Trainer, batches: int) -> None:
        dealt = trainer.train_dataloader.batch_sampler  # type: ignore[union-attr]
        self._done = dealt.frames * batches // max(1, len(dealt))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Announce an epoch of which a part was done before: it does not start again."""
        if trainer.fit_loop.restarted_mid_epoch:
            self._count(trainer, trainer.fit_loop.epoch_loop.batch_progress.current.completed)
            self._progress(trainer, TrainHook.EPOCH_START)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Announce an epoch."""
        self._done = 0
        self._progress(trainer, TrainHook.EPOCH_START)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the frames of all workers."""
        self._count(trainer, batch_idx + 1)
        if time.monotonic() - self._sent > _EVERY_S:
            self._sent = time.monotonic()
            self._progress(trainer, TrainHook.TRAIN_PROGRESS)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the epoch with every value that callbacks can monitor."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        outcome = EvaluationOutcome(ExecutionStage.VAL, EvaluationStatus.EVALUATED, metrics=values)
        self._progress(trainer, TrainHook.EPOCH_END, evaluation=outcome)
