"""Which rank is stuck? Asked while training runs, so that a hang becomes an error with a name.

Every rank sends what it is doing, and how much CPU time and input and output it has used, every
few seconds from a thread of its own. A rank that reads or computes waits for nobody: when it
uses nothing for ``stall_seconds`` it is stuck, however long it may take a rank that works. Ranks
that exchange something wait for each other: they are stuck when all of them are.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from loguru import logger
from pytorch_lightning.profilers import PassThroughProfiler

READING, COMPUTING = "reading frames", "computing a step"
#: Below these rates a process only keeps itself alive: cores used, bytes per second.
_IDLE_CPU, _IDLE_BYTES = 0.1, 2**16


@dataclass(frozen=True)
class Beat:
    """What a rank is doing, and what it has used so far.

    Attributes
    ----------
    doing : str
        :data:`READING`, :data:`COMPUTING`, or Lightning's name of an action in which ranks may
        wait for each other; empty when the rank has ended.
    steps : int
        Training steps begun.
    cpu_seconds : float
        Of the process and its children.
    moved_bytes : int
        Read and written by these.
    """

    rank: int
    doing: str
    steps: int
    cpu_seconds: float
    moved_bytes: int

    def is_progress_over(self, earlier: Beat, seconds: float) -> bool:
        """Whether something was done since ``earlier``, that many seconds ago."""
        return (
            (self.doing, self.steps) != (earlier.doing, earlier.steps)
            or self.cpu_seconds - earlier.cpu_seconds > _IDLE_CPU * seconds
            or self.moved_bytes - earlier.moved_bytes > _IDLE_BYTES * seconds
        )

    def __str__(self) -> str:
        return f"rank {self.rank} {self.doing or 'ended'} after {self.steps} training steps"


class Watch:
    """Keeps the last progress of each rank and says who is stuck; runs as an actor.

    Parameters
    ----------
    world_size : int
        How many ranks there are.
    stall_seconds : float
        How long a rank may do nothing at all.
    """

    def __init__(self, world_size: int, stall_seconds: float) -> None:
        self.world_size = world_size
        self.stall_seconds = stall_seconds
        self._progress: dict[int, tuple[Beat, float]] = {}
        self._verdict: str | None = None

    def beat(self, beat: Beat, now: float | None = None) -> str | None:
        """Take a rank's beat; returns what :meth:`verdict` says then."""
        now = time.monotonic() if now is None else now
        earlier = self._progress.get(beat.rank)
        if earlier is None or beat.is_progress_over(earlier[0], now - earlier[1]):
            self._progress[beat.rank] = beat, now
        return self.verdict(now)

    def verdict(self, now: float | None = None) -> str | None:
        """Return who is stuck, in words, or None; once given, a verdict stays."""
        now = time.monotonic() if now is None else now
        if self._verdict is None and (stuck := self._stuck(now)):
            others = [beat for beat, _ in self._progress.values() if beat not in stuck]
            self._verdict = (
                f"stuck for {self.stall_seconds:g} s, neither computing nor reading: "
                f"{_listed(stuck)}"
                + (f" (meanwhile: {_listed(others)})" if others else "")
                + ". The storage it reads, or a node that waits, may be the reason; where such a "
                "pause is to be expected, set stall_seconds in the scaling file"
            )
        return self._verdict

    def _stuck(self, now: float) -> list[Beat]:
        still = [
            beat
            for beat, since in self._progress.values()
            if beat.doing and now - since > self.stall_seconds
        ]
        for own_affair in (READING, COMPUTING):
            if stuck := [beat for beat in still if beat.doing == own_affair]:
                return stuck
        running = [beat for beat, _ in self._progress.values() if beat.doing]
        if len(self._progress) < self.world_size or len(still) < len(running):
            return []
        fewest = min((beat.steps for beat in still), default=0)
        return [beat for beat in still if beat.steps == fewest]


def _listed(beats: list[Beat]) -> str:
    return ", ".join(str(beat) for beat in sorted(beats, key=lambda beat: beat.rank))


class Heartbeat(PassThroughProfiler):
    """Sends a rank's beats while it is entered; Lightning's profiler hooks tell what it does.

    A verdict ends the process: its main thread is in a call that cannot be interrupted. The
    driver asks the watch for the reason.
    """

    def __init__(self, watch: Any, rank: int, stall_seconds: float) -> None:
        super().__init__()
        self._watch, self._rank = watch, rank
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
        ray.get(self._watch.beat.remote(Beat(self._rank, "", self._steps, 0, 0)))

    def _send(self) -> None:
        while not self._ended.wait(self._interval):
            beat = Beat(self._rank, self._actions[-1], self._steps, *_used())
            try:
                verdict = ray.get(self._watch.beat.remote(beat))
            except ray.exceptions.RayError as error:
                logger.debug(f"the watch was lost: {error}")
                return
            if verdict and not self._ended.is_set():
                os._exit(1)


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
