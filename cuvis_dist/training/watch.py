"""Which rank is stuck? The answer makes an error with a name of a hang, while training runs.

Every rank sends what it is doing, and how much CPU time and input and output it has used, every
few seconds from a thread of its own. A rank that reads or computes waits for nobody: when it
uses nothing for ``stall_seconds`` it is stuck, however long it may take a rank that works. Ranks
that exchange something wait for each other: they are stuck when all of them are.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

READING, COMPUTING = "reading frames", "computing a step"
GATHERING = "waiting for the frames of other ranks"
#: These take as long as they take: a store has time limits of its own, and a reader may wait for
#: a free CPU.
STORING, STARTING = "writing to the output folder", "starting readers"
#: Below these rates a process only keeps itself alive: cores used, bytes per second.
_IDLE_CPU, _IDLE_BYTES = 0.1, 2**16


@dataclass(frozen=True)
class Beat:
    """What a rank is doing, and what it has used so far.

    Attributes
    ----------
    rank : int
        The rank that sends the beat.
    doing : str
        :data:`READING`, :data:`COMPUTING`, or Lightning's name of an action in which ranks may
        wait for each other; empty when the rank has ended.
    steps : int
        Training steps that it has begun.
    cpu_seconds : float
        CPU time that its process and the children of that have used.
    moved_bytes : int
        Bytes that these have read and written.
    group : str
        Name of the group of workers that the rank belongs to; where it changes, another group has
        taken over.
    """

    rank: int
    doing: str
    steps: int
    cpu_seconds: float
    moved_bytes: int
    group: str = ""

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
    stall_seconds : float
        How long a rank may do nothing at all.

    Attributes
    ----------
    world_sizes : list of int
        How many ranks each group of workers had, in the order in which they began.
    """

    def __init__(self, stall_seconds: float) -> None:
        self.stall_seconds = stall_seconds
        self.world_sizes: list[int] = []
        self._group: str | None = None
        self._progress: dict[int, tuple[Beat, float]] = {}
        self._verdict: str | None = None

    def begin(self, group: str, world_size: int) -> None:
        """Note that a group of so many ranks has begun; each rank of it says so."""
        if group != self._group:
            self._group = group
            self.world_sizes.append(world_size)
            self._progress.clear()

    def sizes(self) -> list[int]:
        """Return :attr:`world_sizes`, since an actor's attributes cannot be read."""
        return self.world_sizes

    def beat(self, beat: Beat, now: float | None = None) -> str | None:
        """Take a rank's beat; return what :meth:`verdict` says then."""
        now = time.monotonic() if now is None else now
        if beat.group != self._group:
            return None  # the rank's group was ended
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
        if not running or len(still) < len(running):
            return []
        if len(self._progress) < self.world_sizes[-1]:
            return []
        if any(beat.doing in (STORING, STARTING) for beat in still):
            return []
        fewest = min((beat.steps for beat in still), default=0)
        return [beat for beat in still if beat.steps == fewest]


def _listed(beats: list[Beat]) -> str:
    return ", ".join(str(beat) for beat in sorted(beats, key=lambda beat: beat.rank))
