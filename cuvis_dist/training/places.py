"""Which rank gets which frames of a global batch, where nodes keep frames that were decoded?"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from cuvis_dist.training.gathering import Cut


class Places:
    """Deals the frames of a batch to ranks on nodes that have decoded them.

    A rank gets as many frames as it would get anyway, and the same batch is dealt. What needs the
    whole batch puts its frames back in order: see :class:`~cuvis_dist.training.gathering.Cut`.
    Every rank makes the same places of the same batches.

    Parameters
    ----------
    nodes : sequence of str
        The node of each rank.
    decoded : mapping of int to str
        By frame, a node that has decoded it before.
    """

    def __init__(self, nodes: Sequence[str], decoded: Mapping[int, str]) -> None:
        self.nodes = list(nodes)
        self._decoded = {frame: {node} for frame, node in decoded.items()}

    @classmethod
    def of_ranks(cls, kept: Sequence[Collection[int]]) -> Places:
        """Return the places of frames that each rank keeps for itself, by rank."""
        places = cls([str(rank) for rank in range(len(kept))], {})
        for rank, frames in enumerate(kept):
            for frame in frames:
                places._decoded.setdefault(frame, set()).add(str(rank))
        return places

    def arrange(self, batch: list[int]) -> list[int]:
        """Return the frames of a batch in an order in which each rank's part suits its node."""
        ranks = range(len(self.nodes))
        room = Cut.of(len(batch), 0, len(ranks)).sizes
        dealt: list[list[int]] = [[] for _ in ranks]
        left = []
        # What several nodes have waits for what one has.
        for frame in sorted(batch, key=lambda frame: len(self._decoded.get(frame, ()))):
            has = self._decoded.get(frame, ())
            rank = next(
                (r for r in ranks if self.nodes[r] in has and len(dealt[r]) < room[r]), None
            )
            left.append(frame) if rank is None else dealt[rank].append(frame)
        for frame in left:
            rank = next(r for r in ranks if len(dealt[r]) < room[r])
            dealt[rank].append(frame)
            self._decoded.setdefault(frame, set()).add(self.nodes[rank])
        return [frame for frames in dealt for frame in frames]
