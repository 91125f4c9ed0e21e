"""What does a person see while a run goes on? One line per pass and epoch.

On a terminal the line is rewritten as frames come in; elsewhere only its last form is printed.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from cuvis_ai_core.training.post_fit import FrameProgress, TrainEvent, TrainHook, describe_event

#: Seconds between two lines of a log about the same thing.
_LOG_SECONDS = 30
_EPOCH_HOOKS = {TrainHook.EPOCH_START, TrainHook.TRAIN_PROGRESS, TrainHook.EPOCH_END}
_EVALUATION_HOOKS = {TrainHook.EVALUATION_PROGRESS, TrainHook.CALIBRATION_PROGRESS}
_SILENT = {
    TrainHook.EVALUATION_START,
    TrainHook.CALIBRATION_START,
    TrainHook.POST_FIT_END,
    *_EVALUATION_HOOKS,
}


class ProgressLines:
    """An ``emit`` that prints upstream's events as lines.

    Nodes that one pass fits together share a line.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self._live = self.stream.isatty()
        self._started = self._said = time.monotonic()
        self._nodes: dict[str, bool] = {}  # name -> still being fitted
        self._before = 0  # frames of the pass that an earlier run dealt with

    def __call__(self, event: TrainEvent) -> None:
        """Print or rewrite the line that the event belongs to."""
        hook = event.hook
        if hook is TrainHook.STATISTICAL_NODE_START:
            if not any(self._nodes.values()):
                self._nodes, self._started = {}, time.monotonic()
            self._nodes[event.node] = True
            self._total = event.progress.total if event.progress else 0
            self._before = event.progress.done if event.progress else 0
        elif hook is TrainHook.STATISTICAL_PROGRESS:
            self._rewrite(f"fitting {', '.join(self._nodes)}: {self._rate(event.progress)}")
        elif hook is TrainHook.STATISTICAL_NODE_END:
            self._nodes[event.node] = False
            if not any(self._nodes.values()):
                done = self._rate(FrameProgress(self._total, self._total))
                self._finish(f"fitted {', '.join(self._nodes)}: {done}")
        elif hook in _EPOCH_HOOKS:
            self._epoch(event)
        elif hook in _SILENT:
            if hook in _EVALUATION_HOOKS and event.progress and event.split:
                self._rewrite(
                    f"{hook.value.split('_')[0]} on {event.split.value}: "
                    f"{event.progress.done}/{event.progress.total} frames"
                )
        elif line := describe_event(event):
            self._finish(line)

    def scored(self, done: int, total: int) -> None:
        """Say how many frames are scored; elsewhere than on a terminal at times only."""
        if done >= total:
            self._finish(f"scored {self._rate(FrameProgress(total, total))}")
        elif self._live:
            self._rewrite(f"scoring: {self._rate(FrameProgress(done, total))}")
        elif time.monotonic() - self._said >= _LOG_SECONDS:
            self._finish(f"scoring: {self._rate(FrameProgress(done, total))}")

    def _epoch(self, event: TrainEvent) -> None:
        epochs = event.epochs
        name = f"epoch {epochs.current}/{epochs.total}" if epochs else "epoch"
        if event.hook is TrainHook.EPOCH_START:
            self._started, self._before = time.monotonic(), 0
        elif event.hook is TrainHook.TRAIN_PROGRESS:
            self._rewrite(f"{name}: {self._rate(event.progress)}")
        else:
            values = event.evaluation.metrics if event.evaluation else {}
            shown = ", ".join(
                f"{key} {value:.4g}"
                for key, value in values.items()
                if key in ("train_loss", "val_loss") or key.endswith(("/iou", "/average_precision"))
            )
            self._finish(f"{name}: {self._rate(event.progress)}  {shown}")

    def _rate(self, progress: FrameProgress | None) -> str:
        if progress is None:
            return ""
        seconds = time.monotonic() - self._started
        rate = (progress.done - self._before) / seconds if seconds else 0.0
        text = f"{progress.done}/{progress.total} frames, {rate:.1f} frames/s"
        if progress.total > progress.done and rate:
            return f"{text}, {(progress.total - progress.done) / rate:.0f} s left"
        return f"{text}, {seconds:.1f} s"

    def _rewrite(self, line: str) -> None:
        if self._live:
            self.stream.write(f"\r\x1b[2K  {line}")
            self.stream.flush()

    def _finish(self, line: str) -> None:
        self.stream.write(f"\r\x1b[2K  {line}\n" if self._live else f"  {line}\n")
        self.stream.flush()
        self._said = time.monotonic()
