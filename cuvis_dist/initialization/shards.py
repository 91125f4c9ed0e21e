"""What does a worker do with one shard? It reads, computes, measures, and forgets the cubes."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lightning_fabric.utilities import move_data_to_device
from torch import Tensor

from cuvis_dist.archive import Shard, batch_bytes
from cuvis_dist.errors import DataError
from cuvis_dist.execution.spread import Order, Row
from cuvis_dist.initialization.measuring import Measurer, Partial, compute_inputs
from cuvis_dist.nodes.recipe import Recipe
from cuvis_dist.nodes.state import StateWatch
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.scaling import Scaling


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
    """

    first_frame: str
    statistics: list[bytes]
    probes: dict[str, Tensor]


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
    """

    ordered = False

    def __init__(
        self, order: Order, measurements: dict[str, tuple[str, Recipe]], scaling: Scaling
    ) -> None:
        self.order, self.measurements = order, measurements
        self.pixels = scaling.measuring.pixels
        # The probes of the first shard with a frame are used; so many can be without one.
        self.probed = scaling.measuring.max_skipped if order.skip else 0

    def __call__(self, shard: Shard) -> list[Row]:
        """Return the row of ``shard``."""
        archive, pipeline = self.order.open()
        ranks = _smallest_ranks(self.order.pipeline)
        measurer = Measurer(pipeline, self.measurements, self.pixels, ranks)
        watch = StateWatch(nodes_before(pipeline, measurer.targets))
        merged, probes = Partial({}, ""), dict[str, Tensor]()
        skipped: list[tuple[str, str]] = []
        frames = size = 0
        for index in range(shard.start, shard.stop):
            frame = archive.frames[index]
            batch = None  # before the next cube is read
            try:
                batch = archive.read(index)
                partial, few = measurer.frame(batch, frame, index)
                merged = merged.merge(partial)
            except DataError as error:
                self.order.leave_out(error)
                skipped.append((frame.uid, str(error)))
                continue
            frames, size, probes = frames + 1, size + batch_bytes(batch), probes or few
            watch.require_unchanged()
        payload = Measurement(
            merged.first_frame,
            [statistic.to_bytes() for statistic in merged.statistics.values()],
            probes if shard.ordinal <= self.probed else {},
        )
        return [Row(shard.ordinal, payload, frames, size, tuple(skipped))]


class GatherShard:
    """Computes a node's inputs for each frame of a shard, or only reads it: a row each, in order.

    The payload of a row is the frame's name, for messages, and the inputs or the batch; None where
    the frame was skipped.

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
        """Yield the rows of ``shard``."""
        archive, pipeline = self.order.open()
        nodes = [node for node in pipeline.nodes() if node.name == self.name]
        watch = StateWatch(nodes_before(pipeline, nodes))
        for index in range(shard.start, shard.stop):
            frame = archive.frames[index]
            try:
                batch = archive.read(index)
                data = compute_inputs(pipeline, nodes[0], batch, str(frame)) if nodes else batch
            except DataError as error:
                self.order.leave_out(error)
                yield Row(shard.ordinal, skipped=((frame.uid, str(error)),))
                continue
            watch.require_unchanged()
            payload: Any = str(frame), move_data_to_device(data, "cpu")
            yield Row(shard.ordinal, payload, frames=1, bytes=batch_bytes(batch))
