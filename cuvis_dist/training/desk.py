"""Where do the ranks of a group get their assignment, and who watches them?

An actor that imports nothing that takes long: ranks and their controller wait for it.
"""

from __future__ import annotations

from typing import Any

from cuvis_dist.training.watch import Watch


class Desk(Watch):
    """The watch of a group of ranks, at which they get what they are to do."""

    _given: Any = None

    def give(self, given: Any) -> None:
        """Keep what the ranks are to be given."""
        self._given = given

    def take(self) -> Any:
        """Return what the ranks are given, or None as long as there is nothing."""
        return self._given
