"""What has a pass measured, merged and kept so far?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from cuvis_dist.execution.spread import Row
from cuvis_dist.execution.tally import Tally
from cuvis_dist.initialization.kept_pass import KeptPass
from cuvis_dist.initialization.measuring import Partial
from cuvis_dist.initialization.recordings import OfRecording, Recordings
from cuvis_dist.initialization.shards import Measurement
from cuvis_dist.statistics import Drawn, MergeTree, Statistic, from_bytes

#: Kept pixels of a pass are written to a file of their own when they take so many bytes.
_FILE_BYTES = 1 << 23


@dataclass(frozen=True)
class Outcome:
    """What a pass has found out about the whole archive.

    Attributes
    ----------
    statistics : dict of str to Statistic
        By measurement.
    probes : dict of str to Tensor
        By measurement, real pixels ``[N, C]`` to check affine maps on.
    drawn : list of Drawn or None
        The pixels that were kept of each shard, in order; None where one kept none.
    recordings : dict of str to OfRecording
        Spectra of each recording, for people to look at.
    """

    statistics: dict[str, Statistic]
    probes: dict[str, torch.Tensor]
    drawn: list[Drawn] | None
    recordings: dict[str, OfRecording] = field(default_factory=dict)


class Measured:
    """What a pass has measured and merged so far.

    Parameters
    ----------
    shards : int
        How many shards the archive has.
    tally : Tally
        Counts what comes back.
    names : sequence of str, optional
        The recording of each shard; without them none is looked at by itself.

    Attributes
    ----------
    probes : dict of str to Tensor
        By measurement, some pixels of the first shard that has any.
    seconds : float
        Time that it took.
    """

    def __init__(self, shards: int, tally: Tally, names: Sequence[str] = ()) -> None:
        self.tree: MergeTree[Partial] = MergeTree(shards, Partial.merge)
        self.tally = tally
        self.probes: dict[str, torch.Tensor] = {}
        self.seconds = 0.0
        self.recordings = Recordings()
        self._names = names
        self._first = shards
        self._drawn: dict[int, Drawn] = {}
        self._in_files: set[int] = set()
        self._lacking = False  # whether a shard has kept no pixels

    @property
    def done(self) -> int:
        """Frames dealt with."""
        return self.tally.done

    def add(self, row: Row, measurements: Iterable[str]) -> bool:
        """Merge and count a row; False (and no effect) when its shard was added before.

        Raises
        ------
        DataError
            If the shard does not fit the others, or too many frames were skipped.
        """
        shard: Measurement = row.payload
        statistics = map(from_bytes, shard.statistics)
        partial = Partial(
            dict(zip(measurements, statistics, strict=bool(row.frames))), shard.first_frame
        )
        if not self.tree.add(row.ordinal, partial):
            return False
        self.tally.add(row)
        if self._names:
            self.recordings.add(self._names[row.ordinal], partial.statistics)
        if shard.drawn:
            self._drawn[row.ordinal] = shard.drawn.copy()  # what comes out of Ray stays there
        elif row.frames:
            self._lacking = True
        if row.ordinal < self._first and row.frames:
            self._first, self.probes = row.ordinal, shard.probes
        return True

    def outcome(self) -> Outcome:
        """Return what was measured and kept of all shards."""
        drawn = [self._drawn[ordinal] for ordinal in sorted(self._drawn)]
        kept = None if self._lacking else drawn
        return Outcome(self.tree.root().statistics, self.probes, kept, self.recordings.found)

    def state(self, stored: KeptPass) -> dict[str, Any]:
        """Return all of it as plain values, but for kept pixels that are in files of their own.

        These are written once, as soon as there are enough of them for a file.
        """
        pending = {i: part for i, part in self._drawn.items() if i not in self._in_files}
        states = {i: dict(vars(part)) for i, part in pending.items()}
        if sum(part.bytes for part in pending.values()) >= _FILE_BYTES and stored.append(states):
            self._in_files |= {*pending}
            states = {}
        return {
            "drawn": states,
            "files": stored.files,
            "lacking": self._lacking,
            "shards": torch.tensor(self.tree.seen(), dtype=torch.int64),
            "merged": {place: partial.state() for place, partial in self.tree.parts().items()},
            "tally": self.tally.state(),
            "done": self.done,
            "probes": self.probes,
            "first": self._first,
            "seconds": self.seconds,
            "recordings": self.recordings.state(),
        }

    def take(self, state: dict[str, Any], stored: KeptPass) -> Measured:
        """Go on from what :meth:`state` returned in another process; return this one."""
        in_files = {
            i: part for content in stored.appended(state["files"]) for i, part in content.items()
        }
        self._in_files = {*in_files}
        kept = in_files | state["drawn"]
        self._drawn = {i: Drawn(**part) for i, part in kept.items()}
        self._lacking = bool(state["lacking"])
        merged = {place: Partial.of(part) for place, part in state["merged"].items()}
        self.tree.take(state["shards"].tolist(), merged)
        self.tally.take(state["tally"])
        self.probes, self._first = dict(state["probes"]), int(state["first"])
        self.seconds = float(state["seconds"])
        self.recordings.take(state["recordings"])
        return self
