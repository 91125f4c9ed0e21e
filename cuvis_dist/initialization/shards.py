"""What does a worker do with one shard? It reads, computes, measures, and forgets the cubes."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import ExecutionStage
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor

from cuvis_dist.archive import Archive, Frame, Shard, batch_bytes
from cuvis_dist.errors import DataError
from cuvis_dist.execution.spread import Order, Row
from cuvis_dist.initialization.drawing import Drawing
from cuvis_dist.initialization.inside import Inside
from cuvis_dist.initialization.measuring import Measurer, Partial, compute_inputs
from cuvis_dist.nodes.recipe import Recipe
from cuvis_dist.nodes.state import StatefulNodesError, StateWatch
from cuvis_dist.nodes.survey import evolving_nodes
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.scaling import Scaling
from cuvis_dist.statistics.drawn import Drawn, joined


@functools.lru_cache(maxsize=1)
def _smallest_ranks(of_pass: Any) -> dict[str, Tensor]:
    """Return what this process keeps from shard to shard of one pass: see ``Measurer.ranks``."""
    return {}


@dataclass(frozen=True)
class Measurement:
    """What was measured of a shard.

    Attributes
    ----------
    first_frame : str
        The first frame that was used, for messages.
    statistics : list of bytes
        The statistics of its frames, one for each measurement; none if every frame was skipped.
    probes : dict of str to Tensor
        By measurement, some pixels to check affine maps on.
    drawn : Drawn or None
        Pixels that were kept for later levels; None where none are wanted, or none can be kept.
    """

    first_frame: str
    statistics: list[bytes]
    probes: dict[str, Tensor]
    drawn: Drawn | None = None


@dataclass(frozen=True)
class _Hands:
    """What a shard is measured with: its archive, what measures, and what watches the nodes."""

    archive: Archive
    measurer: Measurer
    watch: StateWatch


class MeasureShard:
    """Measures one shard: a row with a :class:`Measurement`.

    Parameters
    ----------
    order : Order
        Archive, and pipeline as far as it is fitted.
    measurements : dict of str to (str, Recipe)
        By key: the node whose input is measured, and how.
    scaling : Scaling
        Which pixels count, and how many frames may be skipped.
    drawing : Drawing, optional
        Keeps pixels for later levels.
    inside : Inside, optional
        Which pixels are of the bulk: others do not count.
    """

    ordered = False

    def __init__(
        self,
        order: Order,
        measurements: dict[str, tuple[str, Recipe]],
        scaling: Scaling,
        drawing: Drawing | None = None,
        inside: Inside | None = None,
    ) -> None:
        self.order, self.measurements, self.drawing = order, measurements, drawing
        self.inside = inside
        self.pixels = scaling.measuring.pixels
        self.max_skipped = scaling.measuring.max_skipped

    def __call__(self, shard: Shard) -> list[Row]:
        """Return the row of ``shard``."""
        # The probes of the first shard with a frame are used; so many can be without one.
        probed = shard.ordinal <= (self.max_skipped if self.order.skip else 0)
        hands = self._hands(_smallest_ranks(self.order.pipeline))
        return [self._measured(hands, shard, probed, first=not shard.ordinal)]

    def _hands(self, ranks: dict[str, Tensor]) -> _Hands:
        archive, pipeline = self.order.open()
        measurer = Measurer(pipeline, self.measurements, self.pixels, ranks, self.inside)
        return _Hands(archive, measurer, StateWatch(measurer.before))

    def _measured(self, hands: _Hands, shard: Shard, probed: bool, first: bool) -> Row:
        """Return the row of ``shard``, with probes or without.

        The ``first`` shard of an archive shows whether nodes change with every frame.
        """
        archive, measurer = hands.archive, hands.measurer
        pipeline = measurer.pipeline
        merged, probes = Partial({}, ""), dict[str, Tensor]()
        drawn: list[Drawn | None] = []
        skipped: list[tuple[str, str]] = []
        frames = size = 0
        for index in range(shard.start, shard.stop):
            frame = archive.frames[index]
            batch = None  # before the next cube is read
            try:
                batch = archive.read(index)
                partial, few = measurer.frame(batch, frame, index, probed and not probes)
                if self.drawing:
                    drawn.append(self.drawing.frame(pipeline, batch, frame, index))
                merged = merged.merge(partial)
            except DataError as error:
                self.order.leave_out(error)
                skipped.append((frame.uid, str(error)))
                continue
            _require_steady(pipeline, measurer.targets, hands.watch, batch, first and not frames)
            frames, size, probes = frames + 1, size + batch_bytes(batch), probes or few
        payload = Measurement(
            merged.first_frame,
            [statistic.to_bytes() for statistic in merged.statistics.values()],
            probes,
            together(drawn),
        )
        return Row(shard.ordinal, payload, frames, size, tuple(skipped))


class MeasureFrames(MeasureShard):
    """Measures the frames of a shard one by one: a row for each, with a :class:`Measurement`.

    The first of them keeps probes. Each has the whole sample of its pixels that a measurement asks
    for, whichever pixels other frames have. The payload is the frame's position in the archive,
    and the measurement.
    """

    def __call__(self, shard: Shard) -> list[Row]:
        """Return the rows of ``shard``."""
        rows, hands = [], self._hands({})
        for index in range(shard.start, shard.stop):
            begins = index == shard.start
            alone = Shard(shard.ordinal, index, index + 1, shard.staged)
            hands.measurer.ranks.clear()
            row = self._measured(hands, alone, begins, first=begins and not shard.ordinal)
            rows.append(replace(row, payload=(index, row.payload)))
        return rows


def together(drawn: list[Drawn | None]) -> Drawn | None:
    """Return what was kept of a shard's frames; None unless they can be in one sample."""
    kept = [part for part in drawn if part is not None]
    try:
        return joined(kept) if kept and len(kept) == len(drawn) else None
    except ValueError:
        return None


class GatherShard:
    """Computes a node's inputs for each batch of a shard, or only reads it: a row each, in order.

    The batches are those of the data module, in canonical order. The payload of a row is the names
    of the batch's frames, for messages, and the inputs or the batch; None where all of them were
    skipped.

    Parameters
    ----------
    order : Order
        Archive, and pipeline as far as it is fitted.
    name : str or None
        The node; None to read only.
    """

    ordered = True

    def __init__(self, order: Order, name: str | None) -> None:
        self.order, self.name = order, name

    def __call__(self, shard: Shard) -> Iterator[Row]:
        """Yield the rows of ``shard``, which has whole batches (:meth:`Archive.whole_batches`)."""
        archive, pipeline = self.order.open()
        nodes = [node for node in pipeline.nodes() if node.name == self.name]
        watch = StateWatch(nodes_before(pipeline, nodes))
        first = not shard.ordinal
        for wanted in archive.batches(shard):
            items, skipped = self._read(archive, wanted)
            frames, batch, data = self._usable(archive, pipeline, items, skipped)
            if not frames:
                yield Row(shard.ordinal, skipped=tuple(skipped))
                continue
            _require_steady(pipeline, nodes, watch, batch, first)
            first = False
            payload: Any = archive.named([*frames]), move_data_to_device(data, "cpu")
            yield Row(shard.ordinal, payload, len(frames), batch_bytes(batch), tuple(skipped))

    def _read(self, archive: Archive, wanted: range) -> tuple[_Items, _Skipped]:
        """Return the frames of a batch that can be read, and those that cannot."""
        items: _Items = {}
        skipped: _Skipped = []
        for index in wanted:
            try:
                items[index] = archive.item(index)
            except DataError as error:
                self._leave_out(archive.frames[index], error, skipped)
        return items, skipped

    def _usable(
        self, archive: Archive, pipeline: CuvisPipeline, items: _Items, skipped: _Skipped
    ) -> tuple[_Items, dict[str, Any], Any]:
        """Return the frames that can be used together, their batch, and what comes of it.

        Where they fail together, those that fail alone too are left out.
        """
        if not items:
            return {}, {}, None
        try:
            batch = archive.collated([*items], [*items.values()])
            data = batch
            for node in pipeline.nodes():
                if node.name == self.name:
                    data = compute_inputs(pipeline, node, batch, archive.named([*items]))
            return items, batch, data
        except DataError as error:
            if len(items) == 1:
                self._leave_out(archive.frames[min(items)], error, skipped)
                return {}, {}, None
            self.order.leave_out(error)
            alone = [self._usable(archive, pipeline, {i: items[i]}, skipped)[0] for i in items]
            usable = {index: item for each in alone for index, item in each.items()}
            if len(usable) == len(items):
                raise
            return self._usable(archive, pipeline, usable, skipped)

    def _leave_out(self, frame: Frame, error: DataError, skipped: _Skipped) -> None:
        self.order.leave_out(error)
        skipped.append((frame.uid, str(error)))


_Items = dict[int, Any]
"""What the module's data set gives, by frame."""
_Skipped = list[tuple[str, str]]
"""The uids of frames that were left out, and why."""


def _require_steady(
    pipeline: CuvisPipeline,
    targets: Collection[Node],
    watch: StateWatch,
    batch: dict[str, Any],
    first: bool,
) -> None:
    """Raise StatefulNodesError if nodes before ``targets`` change when they are run.

    Those whose tensors changed in this process are noticed at any batch. On the first one of the
    archive, so that it does not depend on the cluster what is found, nodes that nobody described
    are run again, on copies, to see whether anything else changes.
    """
    changed = {node.name for node in watch.changed()}
    if targets and (changed or first):
        frames = lambda: pipeline.move_batch_to_device(batch)  # noqa: E731
        changed.update(evolving_nodes(pipeline, frames, ExecutionStage.INFERENCE, targets))
    if changed:
        raise StatefulNodesError(*sorted(changed))
