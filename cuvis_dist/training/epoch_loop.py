"""When is a training step over, and how does an epoch go on in its middle?

Lightning's loop goes on from a checkpoint of the middle of an epoch. Changed here is what it does
then that a fit which was not cut off does not: it looks at whether to validate for a second time,
and leaves out schedulers that wait for the epoch's values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from lightning_fabric.utilities.warnings import PossibleUserWarning
from pytorch_lightning.loops.training_epoch_loop import _TrainingEpochLoop


class EpochLoop(_TrainingEpochLoop):
    """Lightning's loop over the batches of an epoch, which tells when a step is over.

    Parameters
    ----------
    replaced : _TrainingEpochLoop
        The trainer's own, in whose place it comes.
    go_on : callable
        It is called before the first batch of an epoch that goes on, and restores what Lightning
        does not.
    step_over : callable
        It is called where nothing of a step is left to do: its optimizer has stepped, callbacks,
        schedulers and a validation that was due are done, and no frame of the next one is read.
        So no gradients are waiting. It is not called for the last step of an epoch.
    """

    def __init__(
        self,
        replaced: _TrainingEpochLoop,
        go_on: Callable[[], None],
        step_over: Callable[[], None],
    ) -> None:
        super().__init__(replaced.trainer, replaced.min_steps, replaced.max_steps)
        self._go_on, self._step_over = go_on, step_over

    def reset(self) -> None:
        """Begin, or go on; Lightning need not warn that a loader cannot: ours does."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PossibleUserWarning)
            super().reset()

    def on_run_start(self, data_fetcher: Any) -> None:
        """Restore the state of an epoch that goes on."""
        goes_on = self.restarting
        if goes_on:
            self._go_on()
        super().on_run_start(data_fetcher)
        if goes_on:
            self.trainer.fit_loop.restarting = False

    def on_advance_end(self, data_fetcher: Any) -> None:
        """End a step."""
        super().on_advance_end(data_fetcher)
        if not self._should_accumulate() and not self.done:
            self._step_over()
