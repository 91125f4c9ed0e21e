"""What happened when? The beginnings and ends of a run's steps, from its events."""

from __future__ import annotations

import time
from typing import Any

from cuvis_ai_core.training.post_fit import EmitFn, TrainEvent, TrainHook

_HOOKS = {
    TrainHook.STATISTICAL_NODE_START,
    TrainHook.STATISTICAL_NODE_END,
    TrainHook.EPOCH_START,
    TrainHook.EPOCH_END,
    TrainHook.CALIBRATION_START,
    TrainHook.CALIBRATION_END,
    TrainHook.EVALUATION_START,
    TrainHook.EVALUATION_END,
}


class Diary:
    """An ``emit`` that notes what it passes on.

    Parameters
    ----------
    emit : callable
        Where the events go.

    Attributes
    ----------
    notes : list of dict
        Per beginning and end: ``hook``, the seconds ``at`` which it came, and of ``node``,
        ``split``, ``epoch`` and ``metrics`` what there is.
    """

    def __init__(self, emit: EmitFn) -> None:
        self._emit, self._began = emit, time.monotonic()
        self.notes: list[dict[str, Any]] = []

    def __call__(self, event: TrainEvent) -> None:
        """Note an event and pass it on."""
        if event.hook in _HOOKS:
            note: dict[str, Any] = {"hook": event.hook.value, "at": self.now()}
            if event.node:
                note["node"] = event.node
            if event.split:
                note["split"] = event.split.value
            if event.epochs:
                note["epoch"] = event.epochs.current
            if event.evaluation and event.evaluation.metrics:
                note["metrics"] = dict(event.evaluation.metrics)
            self.notes.append(note)
        self._emit(event)

    def now(self) -> float:
        """Return the seconds since the run began."""
        return round(time.monotonic() - self._began, 3)
