"""How is a pass carried out where a store keeps what was measured of each frame?

What the store lacks is measured, frame by frame, and added to it; then everything is merged from
the store, in the tree that a pass without one has: the result has the same bits.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger

from cuvis_dist.archive import Archive, Contents
from cuvis_dist.errors import DataError
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.pool import Workers
from cuvis_dist.execution.spread import spread
from cuvis_dist.execution.tally import Tally
from cuvis_dist.execution.where import engine_for
from cuvis_dist.initialization.measured import Outcome
from cuvis_dist.initialization.measuring import Partial
from cuvis_dist.initialization.passes import OnShard, PassRecord, freeze_fits
from cuvis_dist.initialization.plan import Fit
from cuvis_dist.initialization.recordings import Recordings
from cuvis_dist.initialization.shards import MeasureFrames, Measurement, together
from cuvis_dist.initialization.stored import StoredPass
from cuvis_dist.nodes.state import StatefulNodesError
from cuvis_dist.pace import Pace
from cuvis_dist.scaling import Scaling
from cuvis_dist.statistics import Drawn, MergeTree
from cuvis_dist.store import Identity, UnusableFileError, identity_of

#: Measurements are written when they take so many bytes, however short a time ago others were.
_FILE_BYTES = 1 << 25


@dataclass
class Filling:
    """What was read to fill a store.

    Attributes
    ----------
    frames : set of Identity
        Frames that were measured.
    bytes : int
        The bytes of their tensors.
    peak : int
        Largest resident memory of a worker.
    skipped : dict of str to str
        Frames that cannot be used, by uid, each with its reason.
    repeated : set of int
        Ordinals of the shards that were run again.
    """

    frames: set[Identity] = field(default_factory=set)
    bytes: int = 0
    peak: int = 0
    skipped: dict[str, str] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)

    def add(self, tally: Tally) -> None:
        """Count what one reading has counted."""
        self.bytes += tally.bytes
        self.peak = max(self.peak, tally.peak)
        self.skipped |= tally.skipped
        self.repeated |= tally.repeated


class Filler:
    """Measures what a store lacks of a pass.

    Parameters
    ----------
    stored : StoredPass
        The pass in its store.
    pipeline : CuvisPipeline
        As it is when the pass begins.
    contents : Contents
        The files of the archive, as they were before anything is read.
    scaling : Scaling
        Workers, and how many frames may be left out.
    on_frames : callable
        Called with the number of frames that are there so far.
    """

    def __init__(
        self,
        stored: StoredPass,
        pipeline: CuvisPipeline,
        contents: Contents,
        scaling: Scaling,
        on_frames: OnShard,
    ) -> None:
        self.stored, self.pipeline, self.contents = stored, pipeline, contents
        self.scaling, self.on_frames = scaling, on_frames
        self.done = Filling()
        self._left_out = set[Identity]()

    def fill(self) -> list[int]:
        """Measure what is missing; return the positions of all frames that can be used.

        Raises
        ------
        DataError
            If a frame cannot be read or measured, too many are left out, none can be used, or a
            file changes meanwhile. What was measured before is in the store.
        StatefulNodesError
            If what is measured depends on the order of the frames.
        InputError, ClusterError
            If the store cannot be written to, or the cluster lost the work.
        """
        archive = self.stored.archive
        self.stored.look(self.contents)
        while missing := self.stored.missing(self._left_out):
            self.stored.store.require_writable()
            self._measure(missing)
            self.stored.look(self.contents)
        frames, left_out = enumerate(archive.frames), self._left_out
        usable = [i for i, frame in frames if identity_of(frame) not in left_out]
        if not usable:
            raise DataError(f"none of {len(archive)} frames could be used")
        return usable

    def _measure(self, missing: list[int]) -> None:
        """Measure the frames at some positions, and write what was measured every now and then."""
        measuring = self.scaling.measuring
        part = self.stored.archive.only(missing)
        before = len(self.stored.archive) - len(part)
        tally = Tally(len(part), measuring.max_skipped - len(self._left_out))
        pace, pending = Pace(self.scaling.resources.save_seconds), dict[int, Measurement]()
        sound, size = True, 0
        try:
            for i, measured in self._rows(part, tally):
                pending[missing[i]] = measured
                size += _size(measured)
                self.on_frames(before + tally.done)
                if pace.due or size >= _FILE_BYTES:
                    with pace.writing():
                        self._write(pending)
                    pending, size = {}, 0
        except StatefulNodesError:
            sound = False  # what was measured depends on its order
            raise
        finally:
            self.done.add(tally)
            if pending and sound:
                self._write(pending)
        tally.require_all()

    def _rows(self, part: Archive, tally: Tally) -> Iterator[tuple[int, Measurement]]:
        """Yield the position in ``part`` and the measurement of each frame that can be used."""
        measuring = self.scaling.measuring
        with (
            raise_cause("the pass over the archive"),
            engine_for(Workers.measuring(self.scaling)) as engine,
        ):
            order = engine.make_order(self.pipeline, part, measuring.on_error == "skip")
            by_key = self.stored.this_pass.by_key()
            measure = MeasureFrames(order, by_key, self.scaling, self.stored.drawing)
            seen = set[int]()
            with closing(spread(part.shards(measuring.shard_frames), measure, engine)) as rows:
                for row in rows:
                    position, measured = row.payload
                    if position in seen:
                        continue
                    seen.add(position)
                    tally.add(row)
                    if row.frames:
                        self.done.frames.add(identity_of(part.frames[position]))
                        yield position, measured
                    else:
                        self._left_out.add(identity_of(part.frames[position]))

    def _write(self, measured: dict[int, Measurement]) -> None:
        """Add measurements to the store, unless a file that they are of has changed."""
        frames = [self.stored.archive.frames[i] for i in measured]
        self.contents.only(frames).require_unchanged(frames, "the pass")
        self.stored.add(measured, self.contents)


def _size(measured: Measurement) -> int:
    drawn = measured.drawn.bytes if measured.drawn else 0
    return drawn + sum(map(len, measured.statistics))


def measure_stored(filler: Filler) -> tuple[PassRecord, list[Fit], Outcome]:
    """Carry out a pass with a store, and freeze its nodes.

    Returns and raises as :func:`~cuvis_dist.initialization.passes.measure_pass` does.
    """
    started, stored = time.perf_counter(), filler.stored
    while True:
        usable = filler.fill()
        try:
            outcome = merged(stored, usable, filler.scaling.measuring.shard_frames)
            break
        except UnusableFileError:  # it does not count any more: measure what was in it
            continue
    fitted, left = freeze_fits(stored.this_pass, outcome.statistics, outcome.probes)
    done = filler.done
    record = PassRecord(
        fitted,
        len(usable),
        done.bytes,
        len(stored.archive.shards(filler.scaling.measuring.shard_frames)),
        time.perf_counter() - started,
        done.peak,
        done.skipped,
        repeated=sorted(done.repeated),
        from_store=sum(identity_of(stored.archive.frames[i]) not in done.frames for i in usable),
    )
    logger.info(f"{record.from_store} of {len(usable)} frames are from the store {stored.store}")
    return record, left, outcome


def merged(stored: StoredPass, positions: Iterable[int], shard_frames: int) -> Outcome:
    """Return what a pass finds out about some frames, all of which are in its store.

    Parameters
    ----------
    positions : iterable of int
        The frames' positions in the archive.
    shard_frames : int
        The setting ``measuring.shard_frames``.

    Raises
    ------
    UnusableFileError
        If a file is damaged, and then set aside, or cannot be read any more.
    DataError
        If frames do not fit each other.
    """
    wanted, shards = {*positions}, stored.archive.shards(shard_frames)
    shard_of = {i: s.ordinal for s in shards for i in range(s.start, s.stop) if i in wanted}
    frames_of: dict[int, list[int]] = defaultdict(list)
    for position, ordinal in shard_of.items():
        frames_of[ordinal].append(position)
    empty = [s.ordinal for s in shards if s.ordinal not in frames_of]
    names, root, probes = stored.archive.frames, dict[str, Partial](), {}
    recordings = Recordings()
    for key in stored.keys:
        tree: MergeTree[Partial] = MergeTree(len(shards), Partial.merge)
        waiting: dict[int, dict[int, Partial]] = defaultdict(dict)
        first = len(stored.archive)
        for ordinal in empty:
            tree.add(ordinal, Partial({}, ""))
        for position, statistic, few in stored.statistics(key, shard_of):
            if few is not None and position < first:
                first, probes[key] = position, few
            ordinal = shard_of[position]
            parts = waiting[ordinal]
            parts[position] = Partial({key: statistic}, str(names[position]))
            if len(parts) == len(frames_of[ordinal]):
                whole = _in_order(waiting.pop(ordinal))
                tree.add(ordinal, whole)
                recordings.add(names[position].recording, whole.statistics)
        root[key] = tree.root()
    drawn = _drawn(stored, shard_of, frames_of) if stored.this_pass.later else []
    statistics = {key: partial.statistics[key] for key, partial in root.items()}
    return Outcome(statistics, probes, drawn, recordings.found)


def _in_order(parts: dict[int, Partial]) -> Partial:
    """Merge the partials of a shard's frames, as a worker does that measures the shard."""
    result = Partial({}, "")
    for position in sorted(parts):
        result = result.merge(parts[position])
    return result


def _drawn(
    stored: StoredPass, shard_of: dict[int, int], frames_of: dict[int, list[int]]
) -> list[Drawn] | None:
    """Return the pixels that were kept of each shard, in order; None if one has none."""
    by_shard: dict[int, dict[int, Drawn | None]] = defaultdict(dict)
    joined: dict[int, Drawn] = {}
    for position, drawn in stored.pixels(shard_of):
        ordinal = shard_of[position]
        parts = by_shard[ordinal]
        parts[position] = drawn and drawn.only(stored.fitted_on).at(position)
        if len(parts) == len(frames_of[ordinal]):
            del by_shard[ordinal]
            whole = together([parts[i] for i in sorted(parts)])
            if whole is None:
                return None
            joined[ordinal] = whole
    return [joined[ordinal] for ordinal in sorted(joined)]
