"""How is one pass over the archive carried out on Ray?

Ray Data spreads the shards over the cluster. A worker reads a frame, runs the nodes before
those that are fitted, measures, and forgets the cube: only partials leave it. The driver
merges them in a fixed tree, so the result does not depend on who finished first.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ray
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import EmitFn, FrameProgress, TrainEvent, TrainHook

from cuvis_dist.archive import Archive, batch_bytes
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.initialization.plan import Pass
from cuvis_dist.initialization.recipes import Recipe
from cuvis_dist.scaling import Scaling
from cuvis_dist.statistics import MergeTree, Statistic, from_bytes
from cuvis_dist.upstream import node_inputs
from cuvis_dist.workers import adopt, fetch_once, on_worker, prepare_worker, raise_cause

OnShard = Callable[[int], None]
"""Called with the number of frames done so far."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass read and fitted, as it stands in ``run.json``.

    Attributes
    ----------
    nodes : dict of str to dict
        Per fitted node: ``statistic`` (or ``streamed``) and the number of ``pixels``.
    frames, bytes : int
        Frames listed and measured, and the bytes of their tensors.
    shards : int
        Units of work.
    seconds : float
        Wall-clock time.
    """

    nodes: dict[str, dict[str, Any]]
    frames: int
    bytes: int
    shards: int
    seconds: float


@dataclass(frozen=True)
class _Partial:
    """The statistics of one shard, or of several merged ones, by node name."""

    statistics: dict[str, Statistic]
    first_frame: str

    def merge(self, other: _Partial) -> _Partial:
        merged = {}
        for name, statistic in self.statistics.items():
            theirs = other.statistics[name]
            if statistic.channels != theirs.channels:
                raise DataError(
                    f"{other.first_frame} gives node {name} {theirs.channels} channels, "
                    f"{self.first_frame} gives it {statistic.channels}: recordings with "
                    "different bands cannot be fitted together"
                )
            merged[name] = statistic.merge(theirs)
        return _Partial(merged, self.first_frame)


def measure_pass(
    pipeline: CuvisPipeline,
    archive: Archive,
    this_pass: Pass,
    scaling: Scaling,
    on_shard: OnShard,
) -> PassRecord:
    """Measure every recipe of ``this_pass`` over the archive and freeze its nodes.

    Raises
    ------
    DataError
        If a frame cannot be read or measured, or frames are missing at the end.
    ClusterError
        If the cluster lost the work.
    """
    started = time.perf_counter()
    shards = archive.shards(scaling.shard_frames)
    recipes = {node.name: recipe for node, recipe in this_pass.recipes.items()}
    tree: MergeTree[_Partial] = MergeTree(len(shards), _Partial.merge)
    measure = _MeasureShard(
        ray.put(archive), ray.put(pipeline), recipes, math.floor(scaling.cpus_per_worker)
    )
    rows = _spread(shards, measure, scaling)
    frames = size = 0
    with raise_cause("the pass over the archive"):
        for row in rows:
            if row["error"]:
                raise DataError(row["error"])
            partial = _Partial(
                {
                    name: from_bytes(data)
                    for name, data in zip(recipes, row["partials"], strict=True)
                },
                row["first_frame"],
            )
            if tree.add(row["ordinal"], partial):
                frames += row["frames"]
                size += row["bytes"]
                on_shard(frames)
    if frames != len(archive) or tree.missing:
        raise DataError(
            f"the archive lists {len(archive)} frames, {frames} were measured "
            f"({tree.missing} of {len(shards)} shards are missing)"
        )
    merged = tree.root().statistics
    for node, recipe in this_pass.recipes.items():
        _freeze(node, recipe, merged[node.name])
    fitted = {
        name: {"statistic": str(recipe), "pixels": merged[name].n}  # type: ignore[attr-defined]
        for name, recipe in recipes.items()
    }
    return PassRecord(fitted, frames, size, len(shards), time.perf_counter() - started)


def _freeze(node: Node, recipe: Recipe, statistic: Statistic) -> None:
    try:
        recipe.freeze(node, statistic)
    except Exception as error:
        raise CuvisDistError(f"node {node.name} could not be fitted: {one_line(error)}") from error


def _spread(shards: list, function: Any, scaling: Scaling) -> Iterator[dict[str, Any]]:
    """Run ``function`` on a row per shard, one task each, and yield its rows as they come."""
    rows = [{"ordinal": s.ordinal, "start": s.start, "stop": s.stop} for s in shards]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
        function,
        compute=ray.data.TaskPoolStrategy(size=scaling.workers),
        num_cpus=scaling.cpus_per_worker,
    )
    dataset.context.execution_options.preserve_order = function.ordered
    dataset.context.enable_progress_bars = False
    return iter(dataset.iter_rows())


class _MeasureShard:
    """Measures one shard on a worker: one row with the partials, or with what went wrong."""

    ordered = False

    def __init__(self, archive: Any, pipeline: Any, recipes: dict[str, Recipe], threads: int):
        self.archive, self.pipeline, self.recipes, self.threads = (
            archive,
            pipeline,
            recipes,
            threads,
        )

    def __call__(self, shard: dict[str, int]) -> list[dict[str, Any]]:
        prepare_worker(self.threads)
        archive: Archive = fetch_once(self.archive)
        pipeline: CuvisPipeline = fetch_once(self.pipeline)
        nodes = {node.name: node for node in pipeline.nodes() if node.name in self.recipes}
        merged: _Partial | None = None
        size = 0
        try:
            for index in range(shard["start"], shard["stop"]):
                batch = archive.read(index)
                size += batch_bytes(batch)
                frame = str(archive.frames[index])
                statistics = {
                    name: _measure(pipeline, nodes[name], recipe, batch, frame)
                    for name, recipe in self.recipes.items()
                }
                partial = _Partial(statistics, frame)
                merged = partial if merged is None else merged.merge(partial)
        except DataError as error:
            return [_row(shard["ordinal"], error=str(error))]
        assert merged is not None
        return [
            _row(
                shard["ordinal"],
                frames=shard["stop"] - shard["start"],
                bytes=size,
                first_frame=merged.first_frame,
                partials=[merged.statistics[name].to_bytes() for name in self.recipes],
            )
        ]


def _row(ordinal: int, **values: Any) -> dict[str, Any]:
    """Return a row with every column, since blocks must share a schema."""
    empty = {"error": "", "frames": 0, "bytes": 0, "first_frame": "", "partials": [b""]}
    return {"ordinal": ordinal, **empty, **values}


def _measure(
    pipeline: CuvisPipeline, node: Node, recipe: Recipe, batch: dict[str, Any], frame: str
) -> Statistic:
    """Measure one frame for one node; raises DataError that names both."""
    try:
        inputs = node_inputs(pipeline, node, batch)
        statistic = recipe.measure(inputs)
    except Exception as error:
        raise DataError(
            f"{frame} cannot be measured for node {node.name}: {one_line(error)}"
        ) from error
    if not statistic.is_finite():
        bad = int((~torch.isfinite(inputs[recipe.port])).any(dim=-1).sum())
        raise DataError(
            f"{frame} has {bad} pixels that are not finite at {node.name}.{recipe.port}; "
            "they would make every fitted value NaN. Correct the recording or leave it out of "
            "the train split"
        )
    return statistic


# ---- nodes without a recipe ------------------------------------------------------------


def stream_pass(
    pipeline: CuvisPipeline,
    archive: Archive,
    this_pass: Pass,
    scaling: Scaling,
    emit: EmitFn,
) -> PassRecord:
    """Fit a node that no recipe knows by its own code, on its inputs in canonical order.

    Reading and every node before it run on all workers; the node itself runs in one process,
    which receives one frame at a time (as upstream with ``batch_size: 1`` and no shuffling).

    Raises
    ------
    DataError
        If a frame cannot be read, or the node before it cannot use it.
    """
    started = time.perf_counter()
    node = this_pass.streamed
    assert node is not None
    fitted, frames, size = on_worker(
        _fit_streamed, pipeline, archive, node.name, scaling, emit=emit, scaling=_beside(scaling)
    )
    adopt(node, fitted)
    record = {node.name: {"statistic": "streamed", "pixels": None}}
    shards = len(archive.shards(scaling.shard_frames))
    return PassRecord(record, frames, size, shards, time.perf_counter() - started)


def _beside(scaling: Scaling) -> Scaling:
    """Leave the CPUs to the readers: the fitting process mostly waits for them."""
    return scaling.model_copy(update={"cpus_per_worker": 0})


def _fit_streamed(
    pipeline: CuvisPipeline, archive: Archive, name: str, scaling: Scaling, emit: EmitFn
) -> tuple[Node, int, int]:
    node = next(n for n in pipeline.nodes() if n.name == name)
    gather = _GatherShard(
        ray.put(archive), ray.put(pipeline), name, math.floor(scaling.cpus_per_worker)
    )
    done = [0, 0]

    def stream() -> Iterator[dict[str, Any]]:
        for row in _spread(archive.shards(scaling.shard_frames), gather, scaling):
            if row["error"]:
                raise DataError(row["error"])
            done[0] += 1
            done[1] += row["bytes"]
            progress = FrameProgress(done[0], len(archive))
            emit(TrainEvent(TrainHook.STATISTICAL_PROGRESS, node=name, progress=progress))
            yield pickle.loads(row["inputs"])

    try:
        node.statistical_initialization(stream())
    except DataError:
        raise
    except Exception as error:
        raise CuvisDistError(f"node {name} could not be fitted: {one_line(error)}") from error
    return node, done[0], done[1]


class _GatherShard:
    """Computes a node's inputs for each frame of a shard: one row per frame, in order."""

    ordered = True

    def __init__(self, archive: Any, pipeline: Any, name: str, threads: int) -> None:
        self.archive, self.pipeline, self.name, self.threads = archive, pipeline, name, threads

    def __call__(self, shard: dict[str, int]) -> Iterator[dict[str, Any]]:
        prepare_worker(self.threads)
        archive: Archive = fetch_once(self.archive)
        pipeline: CuvisPipeline = fetch_once(self.pipeline)
        node = next(n for n in pipeline.nodes() if n.name == self.name)
        for index in range(shard["start"], shard["stop"]):
            try:
                batch = archive.read(index)
                inputs = node_inputs(pipeline, node, batch)
            except Exception as error:
                message = (
                    str(error)
                    if isinstance(error, DataError)
                    else f"{archive.frames[index]} cannot be used for node {self.name}: "
                    f"{one_line(error)}"
                )
                yield {"error": message, "bytes": 0, "inputs": b""}
                return
            yield {
                "error": "",
                "bytes": batch_bytes(batch),
                "inputs": pickle.dumps(inputs, protocol=5),
            }
