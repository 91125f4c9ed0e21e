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

import networkx as nx
import ray
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import EmitFn, FrameProgress, TrainEvent, TrainHook
from loguru import logger

from cuvis_dist.archive import Archive, batch_bytes
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.initialization.affine import probe
from cuvis_dist.initialization.plan import Fit, Pass
from cuvis_dist.initialization.recipes import Recipe
from cuvis_dist.scaling import Scaling
from cuvis_dist.statistics import MergeTree, Moments, Statistic, from_bytes
from cuvis_dist.upstream import node_inputs
from cuvis_dist.workers import (
    adopt,
    fetch_once,
    on_worker,
    peak_bytes,
    prepare_worker,
    raise_cause,
)

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
    peak_worker_bytes : int
        Largest resident memory of a worker process up to the end of the pass.
    """

    nodes: dict[str, dict[str, Any]]
    frames: int
    bytes: int
    shards: int
    seconds: float
    peak_worker_bytes: int


@dataclass(frozen=True)
class _Partial:
    """The statistics of one shard, or of several merged ones, by measurement."""

    statistics: dict[str, Statistic]
    first_frame: str

    def merge(self, other: _Partial) -> _Partial:
        merged = {}
        for key, statistic in self.statistics.items():
            theirs = other.statistics[key]
            if statistic.channels != theirs.channels:
                raise DataError(
                    f"{other.first_frame} has {theirs.channels} channels at {key}, "
                    f"{self.first_frame} has {statistic.channels}: recordings with "
                    "different bands cannot be fitted together"
                )
            merged[key] = statistic.merge(theirs)
        return _Partial(merged, self.first_frame)


class StatefulNodesError(CuvisDistError):
    """Nodes before the measured ones change their state with every frame."""


def measure_pass(
    pipeline: CuvisPipeline,
    archive: Archive,
    this_pass: Pass,
    scaling: Scaling,
    on_shard: OnShard,
) -> tuple[PassRecord, list[Fit]]:
    """Carry out the measurements of ``this_pass`` over the archive and freeze its nodes.

    Returns
    -------
    tuple of PassRecord and list of Fit
        The second: fits whose chain turned out not to be affine, and all that follow; they have
        to be measured directly.

    Raises
    ------
    DataError
        If a frame cannot be read or measured, or frames are missing at the end.
    StatefulNodesError
        If what is measured depends on the order of the frames.
    ClusterError
        If the cluster lost the work.
    """
    started = time.perf_counter()
    shards = archive.shards(scaling.shard_frames)
    measurements = {m.key: (m.node.name, m.recipe) for m in this_pass.measurements}
    tree: MergeTree[_Partial] = MergeTree(len(shards), _Partial.merge)
    measure = _MeasureShard(
        ray.put(archive), ray.put(pipeline), measurements, math.floor(scaling.cpus_per_worker)
    )
    samples: dict[str, torch.Tensor] = {}
    frames = size = peak = 0
    with raise_cause("the pass over the archive"):
        for row in _spread(shards, measure, scaling):
            if row["error"]:
                raise (
                    StatefulNodesError(row["error"]) if row["stateful"] else DataError(row["error"])
                )
            partial = _Partial(
                dict(zip(measurements, map(from_bytes, row["partials"]), strict=True)),
                row["first_frame"],
            )
            if tree.add(row["ordinal"], partial):
                frames += row["frames"]
                size += row["bytes"]
                peak = max(peak, row["peak"])
                on_shard(frames)
                if row["ordinal"] == 0:
                    samples = pickle.loads(row["samples"])
    if frames != len(archive) or tree.missing:
        raise DataError(
            f"the archive lists {len(archive)} frames, {frames} were measured "
            f"({tree.missing} of {len(shards)} shards are missing)"
        )
    merged = tree.root().statistics
    fitted: dict[str, dict[str, Any]] = {}
    left: list[Fit] = []
    for fit in this_pass.fits:
        statistic = merged[fit.source.key]
        try:
            if left and fit.chain:
                raise ValueError(f"{left[0].node.name} is not fitted yet")
            _freeze(fit, statistic, samples[fit.source.key])
        except ValueError as error:
            if isinstance(error, CuvisDistError):
                raise
            logger.info(f"{fit.node.name} is measured directly: {error}")
            left.append(fit)
            continue
        fitted[fit.node.name] = {"statistic": str(fit), "pixels": statistic.n}  # type: ignore[attr-defined]
    seconds = time.perf_counter() - started
    return PassRecord(fitted, frames, size, len(shards), seconds, peak), left


def _freeze(fit: Fit, statistic: Statistic, sample: torch.Tensor) -> None:
    """Freeze one node; raises ValueError when its statistic cannot be derived."""
    if fit.chain:
        statistic = statistic.affine(*probe(fit.chain, sample))
    if isinstance(statistic, Moments) and fit.recipe.options.get("diagonal"):
        statistic = statistic.only_diagonal()
    try:
        fit.recipe.freeze(fit.node, statistic)
    except Exception as error:
        raise CuvisDistError(
            f"node {fit.node.name} could not be fitted: {one_line(error)}"
        ) from error


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

    def __init__(
        self,
        archive: Any,
        pipeline: Any,
        measurements: dict[str, tuple[str, Recipe]],
        threads: int,
    ) -> None:
        self.archive, self.pipeline = archive, pipeline
        self.measurements, self.threads = measurements, threads

    def __call__(self, shard: dict[str, int]) -> list[dict[str, Any]]:
        prepare_worker(self.threads)
        archive: Archive = fetch_once(self.archive)
        pipeline: CuvisPipeline = fetch_once(self.pipeline)
        nodes = {node.name: node for node in pipeline.nodes()}
        targets = [nodes[name] for name in dict.fromkeys(n for n, _ in self.measurements.values())]
        state = _state(pipeline, targets)
        merged: _Partial | None = None
        samples: dict[str, torch.Tensor] = {}
        size = 0
        try:
            for index in range(shard["start"], shard["stop"]):
                batch = archive.read(index)
                size += batch_bytes(batch)
                frame = str(archive.frames[index])
                inputs = {node.name: _inputs(pipeline, node, batch, frame) for node in targets}
                statistics = {}
                for key, (name, recipe) in self.measurements.items():
                    pixels = _pixels(nodes[name], recipe, inputs[name], frame)
                    statistics[key] = _measure(recipe, pixels, frame, name)
                    if index == 0:
                        samples[key] = pixels[:: max(1, len(pixels) // 256)].cpu().clone()
                partial = _Partial(statistics, frame)
                merged = partial if merged is None else merged.merge(partial)
                if changed := _changed(state, _state(pipeline, targets)):
                    return [_row(shard["ordinal"], stateful=True, error=", ".join(changed))]
        except DataError as error:
            return [_row(shard["ordinal"], error=str(error))]
        assert merged is not None
        return [
            _row(
                shard["ordinal"],
                frames=shard["stop"] - shard["start"],
                bytes=size,
                peak=peak_bytes(),
                first_frame=merged.first_frame,
                partials=[merged.statistics[key].to_bytes() for key in self.measurements],
                samples=pickle.dumps(samples),
            )
        ]


def _error(row: dict[str, Any]) -> CuvisDistError:
    """Return the error that a worker's row stands for."""
    return (StatefulNodesError if row["stateful"] else DataError)(row["error"])


def _row(ordinal: int, **values: Any) -> dict[str, Any]:
    """Return a row with every column, since blocks must share a schema."""
    empty = {"error": "", "stateful": False, "frames": 0, "bytes": 0, "peak": 0}
    return {
        "ordinal": ordinal,
        **empty,
        "first_frame": "",
        "partials": [b""],
        "samples": b"",
        **values,
    }


def _state(pipeline: CuvisPipeline, targets: list[Node]) -> dict[str, tuple]:
    """Return a mark of each node before the targets that changes when its tensors do."""
    before = set().union(*(nx.ancestors(pipeline._graph, node) for node in targets))
    return {
        node.name: tuple(
            (id(tensor), tensor._version) for tensor in (*node.buffers(), *node.parameters())
        )
        for node in before
    }


def _changed(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    return sorted(name for name, mark in after.items() if before[name] != mark)


def _inputs(
    pipeline: CuvisPipeline, node: Node, batch: dict[str, Any], frame: str
) -> dict[str, Any]:
    """Compute what a node receives for one frame; raises DataError that names both."""
    try:
        return node_inputs(pipeline, node, batch)
    except Exception as error:
        raise DataError(
            f"{frame} cannot be used for node {node.name}: {one_line(error)}"
        ) from error


def _pixels(node: Node, recipe: Recipe, inputs: dict[str, Any], frame: str) -> torch.Tensor:
    try:
        return recipe.pixels(node, inputs)
    except Exception as error:
        raise DataError(
            f"{frame} cannot be measured for node {node.name}: {one_line(error)}"
        ) from error


def _measure(recipe: Recipe, pixels: torch.Tensor, frame: str, name: str) -> Statistic:
    try:
        statistic = recipe.statistic.measure(pixels, **recipe.options)
    except Exception as error:
        raise DataError(f"{frame} cannot be measured for node {name}: {one_line(error)}") from error
    if not statistic.is_finite():
        bad = int((~torch.isfinite(pixels)).any(dim=-1).sum())
        raise DataError(
            f"{frame} has {bad} pixels that are not finite at {name}.{recipe.port}; "
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
    Where a node before it changes its state with every frame, only reading is spread.

    Raises
    ------
    DataError
        If a frame cannot be read, or the node before it cannot use it.
    """
    started = time.perf_counter()
    node = this_pass.streamed
    assert node is not None

    def fit(in_order: bool) -> tuple[Node, tuple[int, int, int]]:
        return on_worker(
            _fit_streamed,
            pipeline,
            archive,
            node.name,
            in_order,
            scaling,
            emit=emit,
            scaling=_beside(scaling),
        )

    try:
        fitted, (frames, size, peak) = fit(in_order=False)
    except StatefulNodesError as error:
        logger.info(f"{error} changes with every frame: the nodes before {node.name} run in order")
        fitted, (frames, size, peak) = fit(in_order=True)
    adopt(node, fitted)
    record = {node.name: {"statistic": "streamed", "pixels": None}}
    shards = len(archive.shards(scaling.shard_frames))
    return PassRecord(record, frames, size, shards, time.perf_counter() - started, peak)


def _beside(scaling: Scaling) -> Scaling:
    """Leave the CPUs to the readers: the fitting process mostly waits for them."""
    return scaling.model_copy(update={"cpus_per_worker": 0})


def _fit_streamed(
    pipeline: CuvisPipeline,
    archive: Archive,
    name: str,
    in_order: bool,
    scaling: Scaling,
    emit: EmitFn,
) -> tuple[Node, tuple[int, int, int]]:
    node = next(n for n in pipeline.nodes() if n.name == name)
    gather = _GatherShard(
        ray.put(archive),
        ray.put(pipeline),
        None if in_order else name,
        math.floor(scaling.cpus_per_worker),
    )
    done = [0, 0, 0]

    def stream() -> Iterator[dict[str, Any]]:
        for row in _spread(archive.shards(scaling.shard_frames), gather, scaling):
            if row["error"]:
                raise (
                    StatefulNodesError(row["error"]) if row["stateful"] else DataError(row["error"])
                )
            done[0] += 1
            done[1] += row["bytes"]
            done[2] = max(done[2], row["peak"])
            progress = FrameProgress(done[0], len(archive))
            emit(TrainEvent(TrainHook.STATISTICAL_PROGRESS, node=name, progress=progress))
            data = pickle.loads(row["data"])
            yield _inputs(pipeline, node, data, row["frame"]) if in_order else data

    try:
        node.statistical_initialization(stream())
    except CuvisDistError:
        raise
    except Exception as error:
        raise CuvisDistError(f"node {name} could not be fitted: {one_line(error)}") from error
    return node, (done[0], done[1], done[2])


class _GatherShard:
    """Computes a node's inputs (or only reads) for each frame of a shard: a row each, in order."""

    ordered = True

    def __init__(self, archive: Any, pipeline: Any, name: str | None, threads: int) -> None:
        self.archive, self.pipeline, self.name, self.threads = archive, pipeline, name, threads

    def __call__(self, shard: dict[str, int]) -> Iterator[dict[str, Any]]:
        prepare_worker(self.threads)
        archive: Archive = fetch_once(self.archive)
        pipeline: CuvisPipeline = fetch_once(self.pipeline)
        nodes = [node for node in pipeline.nodes() if node.name == self.name]
        state = _state(pipeline, nodes) if nodes else {}
        for index in range(shard["start"], shard["stop"]):
            frame = str(archive.frames[index])
            row = {"error": "", "stateful": False, "frame": frame, "bytes": 0, "peak": 0}
            row["data"] = b""
            try:
                batch = archive.read(index)
                data = _inputs(pipeline, nodes[0], batch, frame) if nodes else batch
                changed = _changed(state, _state(pipeline, nodes)) if nodes else []
            except DataError as error:
                yield {**row, "error": str(error)}
                return
            if changed:
                yield {**row, "error": ", ".join(changed), "stateful": True}
                return
            measured = {"bytes": batch_bytes(batch), "peak": peak_bytes()}
            yield {**row, **measured, "data": pickle.dumps(data, protocol=5)}
