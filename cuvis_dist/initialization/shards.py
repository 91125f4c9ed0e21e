"""What does a worker do with one shard? It reads, computes, measures, and forgets the cubes.

Problems with a frame come back as data, not as exceptions: Ray would retry those, or drop work
without saying which.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from torch import Tensor

from cuvis_dist.archive import Archive, batch_bytes
from cuvis_dist.errors import ClusterError, CuvisDistError, DataError, InputError, one_line
from cuvis_dist.initialization.measuring import Measurer, Partial, compute_inputs
from cuvis_dist.initialization.recipes import Recipe
from cuvis_dist.upstream import nodes_before
from cuvis_dist.workers import (
    attempts_before,
    causes,
    fetch_once,
    peak_bytes,
    prepare_worker,
    state_mark,
)


class StatefulNodesError(CuvisDistError):
    """Nodes before the measured ones change their state with every frame."""


@dataclass(frozen=True)
class Task:
    """What a pass asks of every worker.

    Attributes
    ----------
    archive, pipeline : ObjectRef
        As they are at the start of the pass.
    threads : int
        Of a worker.
    skip : bool
        Leave out frames that cannot be used.
    probed : int
        Up to this ordinal shards send pixels to check affine maps on. Those of the first shard
        with a frame are used, and only so many can be without one.
    pixels : str
        Which count.
    on_gpu : bool
        Compute there.
    elsewhere : bool
        Whether another node can be asked for what this one cannot read.
    """

    archive: Any
    pipeline: Any
    threads: int
    skip: bool
    probed: int
    pixels: str
    on_gpu: bool
    elsewhere: bool

    def open(self) -> tuple[Archive, CuvisPipeline]:
        """Prepare this process and return archive and pipeline, the same ones for every shard."""
        prepare_worker(self.threads)
        pipeline = fetch_once(self.pipeline)
        if self.on_gpu:
            pipeline.to("cuda")
        return fetch_once(self.archive), pipeline


@functools.lru_cache(maxsize=1)
def _smallest_ranks(of_pass: Any) -> dict[str, Tensor]:
    """Return what this process keeps from shard to shard of one pass: see ``Measurer.ranks``."""
    return {}


class OneByOne:
    """Runs a function on the shards of a task, one after another.

    What is wrong with a node or the settings, and not with a frame, becomes a row, too, as does an
    error that nobody foresaw (a class that this node cannot import): Ray Data would try again.
    """

    def __init__(self, function: MeasureShard | GatherShard) -> None:
        self.function = function

    def __call__(self, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows of all shards of the task."""
        for shard in task["shards"]:
            try:
                yield from self.function(shard)
            except CuvisDistError as error:
                yield _row(shard["ordinal"], error=str(error), exit_code=error.exit_code)
            except Exception as error:
                what = f"a worker failed: {one_line(error)}"
                yield _row(shard["ordinal"], error=what, exit_code=CuvisDistError.exit_code)


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
                if self.task.elsewhere and _unreadable(error):
                    return [_row(shard["ordinal"], error=str(error), unreadable=True)]
                if not self.task.skip:
                    return [_row(shard["ordinal"], error=str(error))]
                skipped.append((frame.uid, str(error)))
                continue
            frames, size, probes = frames + 1, size + batch_bytes(batch), probes or few
            if changed := _changed(state, _state(pipeline, measurer.targets)):
                return [_row(shard["ordinal"], stateful=True, error=", ".join(changed))]
        return [
            _row(
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
                if not self.task.skip:
                    yield _row(shard["ordinal"], error=str(error))
                    return
                yield _row(shard["ordinal"], skipped=pickle.dumps([(frame.uid, str(error))]))
                continue
            if changed := _changed(state, _state(pipeline, nodes)):
                yield _row(shard["ordinal"], error=", ".join(changed), stateful=True)
                return
            yield _row(
                shard["ordinal"],
                frames=1,
                bytes=batch_bytes(batch),
                peak=peak_bytes(),
                first_frame=str(frame),
                samples=pickle.dumps(data, protocol=5),
            )


def _row(ordinal: int, **values: Any) -> dict[str, Any]:
    """Return a row with every column, since blocks must share a schema."""
    counts = {"frames": 0, "bytes": 0, "peak": 0}
    data = {"first_frame": "", "partials": [b""], "samples": b"", "skipped": pickle.dumps([])}
    node = ray.get_runtime_context().get_node_id()
    known = {"ordinal": ordinal, "again": attempts_before() > 0, "node": node}
    what = {"error": "", "exit_code": 0, "stateful": False, "unreadable": False}
    return {**known, **what, **counts, **data, **values}


def _unreadable(error: DataError) -> bool:
    """Whether the file system said no: a path that is missing here may exist on other nodes."""
    return any(isinstance(cause, OSError) for cause in causes(error))


def row_error(row: dict[str, Any], *tried: str) -> CuvisDistError:
    """Return the error that a worker's row stands for; it names the nodes, where there are several.

    Parameters
    ----------
    tried : str
        Ids of nodes that could not read the frame before.
    """
    if row["exit_code"]:
        known = {error.exit_code: error for error in (InputError, DataError, ClusterError)}
        return known.get(row["exit_code"], CuvisDistError)(row["error"])
    if row["stateful"]:
        return StatefulNodesError(row["error"])
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    if len(address) == 1:
        return DataError(row["error"])
    where = ", ".join(address.get(node, node) for node in [*tried, row["node"]])
    return DataError(f"{row['error']} (on node {where})")


def _state(pipeline: CuvisPipeline, targets: list[Node]) -> dict[str, tuple]:
    """Return a mark of each node before the targets that changes when its tensors do."""
    return {node.name: state_mark(node) for node in nodes_before(pipeline, targets)}


def _changed(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    return sorted(name for name, mark in after.items() if before[name] != mark)
