"""What does a person see while a job goes on? One line per pass, epoch and evaluation."""

from __future__ import annotations

import time
from dataclasses import replace

from cuvis_ai_core.training.post_fit import FrameProgress, TrainEvent, TrainHook, describe_event

from cuvis_dist.runs.lines import Lines

_EPOCH_HOOKS = {TrainHook.EPOCH_START, TrainHook.TRAIN_PROGRESS, TrainHook.EPOCH_END}
_EVALUATION_HOOKS = {TrainHook.EVALUATION_PROGRESS, TrainHook.CALIBRATION_PROGRESS}
_SILENT = {TrainHook.POST_FIT_END}


class ProgressLines:
    """An ``emit`` that prints upstream's events as lines.

    Nodes that one pass fits together share a line.

    Parameters
    ----------
    lines : Lines
        Where they are printed.
    """

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self._started = time.monotonic()
        self._nodes: dict[str, bool] = {}  # name -> still being fitted
        self._total = self._before = 0  # frames of the pass, and those of an earlier run

    def __call__(self, event: TrainEvent) -> None:
        """Print or rewrite the line that the event belongs to."""
        hook = event.hook
        if hook is TrainHook.STATISTICAL_NODE_START:
            self._total = event.progress.total if event.progress else 0
            self._before = event.progress.done if event.progress else 0
            if not any(self._nodes.values()):
                self._nodes, self._started = {}, time.monotonic()
                left = self._total - self._before
                self.lines.wait(f"waiting for the first of {left} frames to be read")
            self._nodes[event.node] = True
        elif hook is TrainHook.STATISTICAL_PROGRESS:
            self.lines.change(f"fitting {', '.join(self._nodes)}: {self._rate(event.progress)}")
        elif hook is TrainHook.STATISTICAL_NODE_END:
            self._nodes[event.node] = False
            if not any(self._nodes.values()):
                done = self._rate(FrameProgress(self._total, self._total))
                self.lines.say(f"fitted {', '.join(self._nodes)}: {done}")
        elif hook in _EPOCH_HOOKS:
            self._epoch(event)
        elif hook in _EVALUATION_HOOKS:
            if event.progress and event.split:
                self.lines.change(
                    f"{hook.value.split('_')[0]} on {event.split.value}: "
                    f"{event.progress.done}/{event.progress.total} frames"
                )
        elif hook not in _SILENT and (line := describe_event(_counted_from_1(event))):
            if hook in (TrainHook.CALIBRATION_START, TrainHook.EVALUATION_START):
                self.lines.wait(line)
            else:
                self.lines.say(line)

    def scored(self, done: int, total: int) -> None:
        """Say how many frames are scored."""
        if done >= total:
            self.lines.say(f"scored {self._rate(FrameProgress(total, total))}")
        else:
            self.lines.change(f"scoring: {self._rate(FrameProgress(done, total))}")

    def measured(self, done: int, total: int) -> None:
        """Say of how many frames the store has what is measured."""
        if done >= total:
            self.lines.say(f"measured {self._rate(FrameProgress(total, total))}")
        else:
            self.lines.change(f"measuring: {self._rate(FrameProgress(done, total))}")

    def _epoch(self, event: TrainEvent) -> None:
        epochs = event.epochs
        name = f"epoch {epochs.current}/{epochs.total}" if epochs else "epoch"
        if event.hook is TrainHook.EPOCH_START:
            self._started = time.monotonic()
            self._before = event.progress.done if event.progress else 0
            self.lines.change(name)
        elif event.hook is TrainHook.TRAIN_PROGRESS:
            self.lines.change(f"{name}: {self._rate(event.progress)}")
        else:
            values = event.evaluation.metrics if event.evaluation else {}
            shown = ", ".join(
                f"{key} {value:.4g}"
                for key, value in values.items()
                if key in ("train_loss", "val_loss") or key.endswith(("/iou", "/average_precision"))
            )
            self.lines.say(f"{name}: {self._rate(event.progress)}  {shown}")
            self.lines.wait("waiting for the next epoch, or the trained nodes")

    def _rate(self, progress: FrameProgress | None) -> str:
        if progress is None:
            return ""
        seconds = time.monotonic() - self._started
        rate = (progress.done - self._before) / seconds if seconds else 0.0
        text = f"{progress.done}/{progress.total} frames, {rate:.1f} frames/s"
        if progress.total > progress.done and rate:
            return f"{text}, {(progress.total - progress.done) / rate:.0f} s left"
        return f"{text}, {seconds:.1f} s"


def _counted_from_1(event: TrainEvent) -> TrainEvent:
    """Return the event with the number that the restored epoch has in the lines of epochs.

    Lightning counts from 0, there and in the names of checkpoints.
    """
    checkpoint = event.checkpoint
    if checkpoint is None or not checkpoint.restored:
        return event
    return replace(event, checkpoint=replace(checkpoint, epoch=checkpoint.epoch + 1))
