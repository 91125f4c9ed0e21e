"""What does a worker do with one shard? It reads, computes, measures, and forgets the cubes."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator
from typing import Any

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from lightning_fabric.utilities import move_data_to_device
from torch import Tensor

from cuvis_dist.archive import batch_bytes
from cuvis_dist.errors import DataError
from cuvis_dist.execution.spread import StatefulNodesError, Task, make_row
from cuvis_dist.execution.worker import peak_bytes
from cuvis_dist.initialization.measuring import Measurer, Partial, compute_inputs
from cuvis_dist.nodes.recipe import Recipe
from cuvis_dist.nodes.state import state_mark
from cuvis_dist.nodes.upstream import nodes_before


@functools.lru_cache(maxsize=1)
def _smallest_ranks(of_pass: Any) -> dict[str, Tensor]:
    """Return what this process keeps from shard to shard of one pass: see ``Measurer.ranks``."""
    return {}


class MeasureShard:
    """Measures one shard: one row with the partials, or with what went wrong."""

    ordered = False

    def __init__(self, task: Task, measurements: dict[str, tuple[str, Recipe]]) -> None:
        self.task, self.measurements = task, measurements

    def __call__(self, shard: dict[str, int]) -> list[dict[str, Any]]:
        """Return the row of ``shard``."""
        archive, pipeline = self.task.open()
        ranks = _smallest_ranks(self.task.pipeline)
        measurer = Measurer(pipeline, self.measurements, self.task.pixels, ranks)
        state = _state(pipeline, measurer.targets)
        merged, probes = Partial({}, ""), dict[str, Tensor]()
        skipped: list[tuple[str, str]] = []
        frames = size = 0
        for index in range(shard["start"], shard["stop"]):
            frame = archive.frames[index]
            batch = None  # before the next cube is read
            try:
                batch = archive.read(index)
                partial, few = measurer.frame(batch, frame, index)
                merged = merged.merge(partial)
            except DataError as error:
                self.task.leave_out(error)
                skipped.append((frame.uid, str(error)))
                continue
            frames, size, probes = frames + 1, size + batch_bytes(batch), probes or few
            if changed := _changed(state, _state(pipeline, measurer.targets)):
                raise StatefulNodesError(", ".join(changed))
        return [
            make_row(
                shard["ordinal"],
                frames=frames,
                bytes=size,
                peak=peak_bytes(),
                first_frame=merged.first_frame,
                partials=[s.to_bytes() for s in merged.statistics.values()],
                samples=pickle.dumps(probes if shard["ordinal"] <= self.task.probed else {}),
                skipped=pickle.dumps(skipped),
            )
        ]


class GatherShard:
    """Computes a node's inputs (or only reads) for each frame of a shard: a row each, in order."""

    ordered = True

    def __init__(self, task: Task, name: str | None) -> None:
        self.task, self.name = task, name

    def __call__(self, shard: dict[str, int]) -> Iterator[dict[str, Any]]:
        """Yield the rows of ``shard``."""
        archive, pipeline = self.task.open()
        nodes = [node for node in pipeline.nodes() if node.name == self.name]
        state = _state(pipeline, nodes)
        for index in range(shard["start"], shard["stop"]):
            frame = archive.frames[index]
            try:
                batch = archive.read(index)
                data = compute_inputs(pipeline, nodes[0], batch, str(frame)) if nodes else batch
            except DataError as error:
                self.task.leave_out(error)
                yield make_row(shard["ordinal"], skipped=pickle.dumps([(frame.uid, str(error))]))
                continue
            if changed := _changed(state, _state(pipeline, nodes)):
                raise StatefulNodesError(", ".join(changed))
            yield make_row(
                shard["ordinal"],
                frames=1,
                bytes=batch_bytes(batch),
                peak=peak_bytes(),
                first_frame=str(frame),
                samples=pickle.dumps(move_data_to_device(data, "cpu"), protocol=5),
            )


def _state(pipeline: CuvisPipeline, targets: list[Node]) -> dict[str, tuple]:
    """Return a mark of each node before the targets that changes when its tensors do."""
    return {node.name: state_mark(node) for node in nodes_before(pipeline, targets)}


def _changed(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    return sorted(name for name, mark in after.items() if before[name] != mark)
