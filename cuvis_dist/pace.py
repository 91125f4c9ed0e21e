"""When is it time to write down again what is done so far?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Pace:
    """Spaces writings, so that they take a bounded share of the time.

    Parameters
    ----------
    every : float
        Seconds between two writings, at least.
    clock : callable
        It returns the time in seconds.

    Attributes
    ----------
    pause : float
        A writing that took t seconds is followed by none for this many times t: at most 5 % of a
        run go into writing.
    """

    pause = 20.0

    def __init__(self, every: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.every, self._clock = every, clock
        self._next = clock() + every

    @property
    def due(self) -> bool:
        """Whether the last writing is long enough ago."""
        return self._clock() >= self._next

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Note how long it takes to write in the block."""
        started = self._clock()
        try:
            yield
        finally:
            ended = self._clock()
            self._next = ended + max(self.every, self.pause * (ended - started))
