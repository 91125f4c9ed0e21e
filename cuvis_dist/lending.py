"""What does a node hand over of the frames that it keeps, and who knows which node keeps which?

Both classes run as Ray actors: see :mod:`cuvis_dist.execution.borrowing`. Their processes import
nothing that takes long, since it needs neither torch nor cuvis.ai to hand over the bytes of a file.
"""

from __future__ import annotations

import mmap

import numpy as np


class Lender:
    """Hands over files of its node."""

    def read(self, path: str) -> np.ndarray | None:
        """Return the bytes of a file as uint8, mapped; None if it cannot be read.

        Parameters
        ----------
        path : str
            An absolute path, as a process of this node has told it.
        """
        try:
            with open(path, "rb") as file:
                return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except (OSError, ValueError):  # it was removed, or is empty
            return None


class Books:
    """Remembers which nodes keep which frames."""

    def __init__(self) -> None:
        self._places: dict[str, dict[str, str]] = {}

    def note(self, names: list[str], node: str, folder: str) -> None:
        """Remember that a node keeps frames, in files of these names in a folder."""
        for name in names:
            self._places.setdefault(name, {})[node] = f"{folder}/{name}"

    def places(self, name: str) -> dict[str, str]:
        """Return the path of a frame's file on each node that keeps it, by the node's id."""
        return self._places.get(name, {})
