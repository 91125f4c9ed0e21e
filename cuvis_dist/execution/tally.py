"""Which frames came back? Counts them twice, so that none is lost unnoticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loguru import logger

from cuvis_dist.errors import DataError
from cuvis_dist.execution.spread import Row


class Tally:
    """Counts what came back: frames listed are frames measured plus frames skipped.

    Parameters
    ----------
    listed : int
        Frames that were asked for.
    max_skipped : int
        How many frames may be left out.
    """

    def __init__(self, listed: int, max_skipped: int) -> None:
        self.listed, self.max_skipped = listed, max_skipped
        self.clear()

    def clear(self) -> None:
        """Count from the beginning."""
        self.frames = self.bytes = self.peak = self.left_out = 0
        self.skipped: dict[str, str] = {}
        self.repeated: set[int] = set()

    def add(self, row: Row) -> None:
        """Count a row; raises DataError when too many frames were skipped."""
        self.frames += row.frames
        self.bytes += row.bytes
        self.peak = max(self.peak, row.peak)
        if row.again:
            self.repeated.add(row.ordinal)
        for uid, reason in row.skipped:
            logger.warning(f"skipped: {reason}")
            self.skipped[uid] = reason
            self.left_out += 1  # a frame that samples_per_frame repeats has one uid
        if self.left_out > self.max_skipped:
            raise DataError(
                f"{self.left_out} frames cannot be used, more than max_skipped "
                f"({self.max_skipped}). The last: {list(self.skipped.values())[-1]}"
            )

    def state(self) -> dict[str, Any]:
        """Return what was counted, as plain values."""
        counts = {name: getattr(self, name) for name in ("frames", "bytes", "peak", "left_out")}
        return counts | {"skipped": dict(self.skipped), "repeated": sorted(self.repeated)}

    def take(self, state: Mapping[str, Any]) -> Tally:
        """Go on from what :meth:`state` of another tally returned; return this one.

        Raises
        ------
        ValueError, KeyError
            If it is no such state.
        """
        self.frames, self.bytes = int(state["frames"]), int(state["bytes"])
        self.peak, self.left_out = int(state["peak"]), int(state["left_out"])
        self.skipped, self.repeated = dict(state["skipped"]), set(state["repeated"])
        return self

    @property
    def done(self) -> int:
        """Frames dealt with."""
        return self.frames + self.left_out

    def close(self) -> None:
        """Raise DataError unless every frame was measured or skipped, and one measured."""
        self.require_all()
        if not self.frames:
            raise DataError(f"none of {self.listed} frames could be used")

    def require_all(self) -> None:
        """Raise DataError unless every frame was measured or skipped."""
        if self.done != self.listed:
            raise DataError(
                f"the archive lists {self.listed} frames, but {self.frames} were measured "
                f"and {self.left_out} skipped"
            )
