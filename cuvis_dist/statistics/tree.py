"""In which order are partials merged, so that the result does not depend on the cluster?

In a balanced binary tree over the ordinals of their shards. Floating-point addition is not
associative: folding partials as they happen to arrive gives other bits on every run. The tree
is fixed by the number of shards alone, so any completion order gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, TypeVar

T = TypeVar("T")


class MergeTree(Generic[T]):
    """Merges partials as they arrive and keeps only those that wait for their sibling.

    Parameters
    ----------
    size : int
        Number of partials; ordinals are ``0 .. size - 1``.
    merge : callable
        ``merge(left, right)``; ``left`` always has the smaller ordinals.

    Raises
    ------
    ValueError
        If ``size`` is not positive.
    """

    def __init__(self, size: int, merge: Callable[[T, T], T]) -> None:
        if size < 1:
            raise ValueError(f"a merge tree needs at least one partial, got size {size}")
        self.size = size
        self._merge = merge
        self._waiting: dict[tuple[int, int], T] = {}
        self._seen: set[int] = set()

    def add(self, ordinal: int, partial: T) -> bool:
        """Add one shard's partial; False (and no effect) when the shard was added before.

        Raises
        ------
        IndexError
            If ``ordinal`` is not one of the tree's shards.
        """
        if not 0 <= ordinal < self.size:
            raise IndexError(f"shard {ordinal} is not one of {self.size}")
        if ordinal in self._seen:
            return False
        self._seen.add(ordinal)
        level, index = 0, ordinal
        while index or 1 << level < self.size:
            sibling = index ^ 1
            if sibling << level < self.size:  # else the subtree is at the right edge: go up alone
                other = self._waiting.pop((level, sibling), None)
                if other is None:
                    break
                partial = (
                    self._merge(other, partial) if sibling < index else self._merge(partial, other)
                )
            level, index = level + 1, index >> 1
        self._waiting[level, index] = partial
        return True

    def __contains__(self, ordinal: int) -> bool:
        return ordinal in self._seen

    def seen(self) -> list[int]:
        """Return the ordinals of the shards that were added."""
        return sorted(self._seen)

    def parts(self) -> dict[tuple[int, int], T]:
        """Return the merged partials that are held now, by their place in the tree."""
        return dict(self._waiting)

    def take(self, seen: Iterable[int], parts: Mapping[tuple[int, int], T]) -> None:
        """Go on from what :meth:`seen` and :meth:`parts` of another tree of this size returned.

        Raises
        ------
        ValueError
            If the parts are not those of these shards.
        """
        seen = set(seen)
        held = [
            ordinal
            for level, index in parts
            for ordinal in range(index << level, min((index + 1) << level, self.size))
        ]
        if len(held) != len(seen) or set(held) != seen:
            raise ValueError("the merged partials are not those of the shards")
        self._seen, self._waiting = seen, dict(parts)

    @property
    def missing(self) -> int:
        """How many partials have not arrived."""
        return self.size - len(self._seen)

    @property
    def waiting(self) -> int:
        """How many merged partials are held now; at most ``log2(size) + 1`` in order."""
        return len(self._waiting)

    def root(self) -> T:
        """Return the merge of all partials.

        Raises
        ------
        RuntimeError
            If some have not arrived.
        """
        if self.missing:
            raise RuntimeError(f"{self.missing} of {self.size} partials have not arrived")
        (result,) = self._waiting.values()
        return result
