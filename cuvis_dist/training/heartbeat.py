"""How does a rank tell the watch that it is alive, and what it is doing?"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loguru import logger
from pytorch_lightning.profilers import PassThroughProfiler

from cuvis_dist.training.watch import COMPUTING, READING, Beat


class Heartbeat(PassThroughProfiler):
    """Sends a rank's beats while it is entered; Lightning's profiler hooks tell what it does.

    A rank on a GPU that waits for others spins: what it uses then is no sign of life.

    A verdict ends the rank, as :meth:`~cuvis_dist.training.assignment.WatchOver.end` does. The
    driver asks the watch for the reason.

    Parameters
    ----------
    watch : WatchOver
        It takes the beats.
    rank : int
        The rank whose beats these are.
    group : str
        Name of the group of workers that it belongs to.
    stall_seconds : float
        How long a rank may do nothing at all; beats are sent more often.
    on_gpu : bool
        Whether the rank computes on a GPU.
    """

    def __init__(
        self, watch: Any, rank: int, group: str, stall_seconds: float, on_gpu: bool
    ) -> None:
        super().__init__()
        self._watch, self._rank, self._group, self._on_gpu = watch, rank, group, on_gpu
        self._interval = min(2.0, stall_seconds / 4)
        self._actions: list[str] = ["starting"]
        self._steps = 0
        self._ended = threading.Event()

    def start(self, action_name: str) -> None:
        """Note that an action begins."""
        if action_name == "run_training_batch":
            self._steps += 1
        # Lightning's names: [_TrainingEpochLoop].train_dataloader_next, [_EvaluationLoop].val_next
        self._actions.append(READING if action_name.endswith("_next") else action_name)

    def stop(self, action_name: str) -> None:
        """Note that the last action is over."""
        if len(self._actions) > 1:
            self._actions.pop()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Note what is done inside the block."""
        self._actions.append(what)
        try:
            yield
        finally:
            self._actions.pop()

    def __enter__(self) -> Heartbeat:
        threading.Thread(target=self._send, name="cuvis-dist-heartbeat", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._watch.beat(Beat(self._rank, "", self._steps, 0, 0, self._group))

    def beat(self) -> Beat:
        """Return what the rank does now, and what it has used so far."""
        doing, (cpu, moved) = self._actions[-1], _used()
        if self._on_gpu and doing not in (READING, COMPUTING):
            cpu = 0.0
        return Beat(self._rank, doing, self._steps, cpu, moved, self._group)

    def _send(self) -> None:
        while not self._ended.wait(self._interval):
            try:
                verdict = self._watch.beat(self.beat())
            except Exception as error:
                logger.debug(f"the watch was lost: {error}")
                return
            if verdict and not self._ended.is_set():
                self._watch.end()
                return


def _used() -> tuple[float, int]:
    """Return CPU seconds and bytes moved by this process and its children (loader workers)."""
    root = Path("/proc/self")
    cpu, moved = 0.0, 0
    try:
        children = (root / "task" / str(os.getpid()) / "children").read_text().split()
    except OSError:
        children = []
    for folder in (root, *(Path("/proc") / child for child in children)):
        try:
            stat = (folder / "stat").read_text().rpartition(")")[2].split()
            cpu += (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")
            for line in (folder / "io").read_text().splitlines():
                if not line.startswith("sys"):
                    moved += int(line.rpartition(":")[2])
        except (OSError, IndexError, ValueError):  # it has ended, or this is no Linux
            continue
    return cpu or time.process_time(), moved
