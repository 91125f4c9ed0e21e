"""What does a worker do with one shard? It reads, computes, measures, and forgets the cubes.

Problems with a frame come back as data, not as exceptions: Ray would retry those, or drop work
without saying which.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.archive import Archive, batch_bytes
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.initialization.recipes import Recipe
from cuvis_dist.statistics import Statistic
from cuvis_dist.upstream import node_inputs
from cuvis_dist.workers import fetch_once, peak_bytes, prepare_worker


class StatefulNodesError(CuvisDistError):
    """Nodes before the measured ones change their state with every frame."""


@dataclass(frozen=True)
class Partial:
    """The statistics of one shard, or of several merged ones, by measurement.

    Without statistics: every frame was skipped.
    """

    statistics: dict[str, Statistic]
    first_frame: str

    def merge(self, other: Partial) -> Partial:
        """Merge two partials; raises DataError when their frames have different bands."""
        if not self.statistics or not other.statistics:
            return self if self.statistics else other
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
        return Partial(merged, self.first_frame)


@dataclass(frozen=True)
class Task:
    """What a pass asks of every worker: the pipeline and archive, by reference, and settings."""

    archive: Any
    pipeline: Any
    threads: int
    skip: bool

    def open(self) -> tuple[Archive, CuvisPipeline]:
        """Prepare this process and return archive and pipeline, the same ones for every shard."""
        prepare_worker(self.threads)
        return fetch_once(self.archive), fetch_once(self.pipeline)


class MeasureShard:
    """Measures one shard: one row with the partials, or with what went wrong."""

    ordered = False

    def __init__(self, task: Task, measurements: dict[str, tuple[str, Recipe]]) -> None:
        self.task, self.measurements = task, measurements

    def __call__(self, shard: dict[str, int]) -> list[dict[str, Any]]:
        """Return the row of ``shard``."""
        archive, pipeline = self.task.open()
        named = {node.name: node for node in pipeline.nodes()}
        targets = [named[name] for name in dict.fromkeys(n for n, _ in self.measurements.values())]
        state = _state(pipeline, targets)
        merged = Partial({}, "")
        samples: dict[str, torch.Tensor] = {}
        skipped: list[tuple[str, str]] = []
        frames = size = 0
        for index in range(shard["start"], shard["stop"]):
            frame = archive.frames[index]
            try:
                partial, nbytes, sample = self._frame(archive, pipeline, targets, index)
                merged = merged.merge(partial)
            except DataError as error:
                if not self.task.skip:
                    return [_row(shard["ordinal"], error=str(error))]
                skipped.append((frame.uid, str(error)))
                continue
            frames, size, samples = frames + 1, size + nbytes, samples or sample
            if changed := _changed(state, _state(pipeline, targets)):
                return [_row(shard["ordinal"], stateful=True, error=", ".join(changed))]
        return [
            _row(
                shard["ordinal"],
                frames=frames,
                bytes=size,
                peak=peak_bytes(),
                first_frame=merged.first_frame,
                partials=[s.to_bytes() for s in merged.statistics.values()],
                samples=pickle.dumps(samples),
                skipped=pickle.dumps(skipped),
            )
        ]

    def _frame(
        self, archive: Archive, pipeline: CuvisPipeline, targets: list[Node], index: int
    ) -> tuple[Partial, int, dict[str, torch.Tensor]]:
        """Return a frame's partial, its size and a few of its pixels; the cube ends here."""
        frame = str(archive.frames[index])
        batch = archive.read(index)
        pixels = self._pixels(pipeline, targets, batch, frame)
        sample = {k: v[:: max(1, len(v) // 256)].cpu().clone() for k, v in pixels.items()}
        return self._measure(pixels, frame), batch_bytes(batch), sample

    def _pixels(
        self, pipeline: CuvisPipeline, targets: list[Node], batch: dict[str, Any], frame: str
    ) -> dict[str, torch.Tensor]:
        """Return the pixels of one frame to measure; raises DataError that names it."""
        inputs = {node.name: compute_inputs(pipeline, node, batch, frame) for node in targets}
        named = {node.name: node for node in targets}
        pixels = {}
        for key, (name, recipe) in self.measurements.items():
            try:
                pixels[key] = recipe.pixels(named[name], inputs[name])
            except Exception as error:
                raise DataError(
                    f"{frame} cannot be measured for node {name}: {one_line(error)}"
                ) from error
        return pixels

    def _measure(self, pixels: dict[str, torch.Tensor], frame: str) -> Partial:
        return Partial(
            {
                key: _measure(recipe, pixels[key], frame, name)
                for key, (name, recipe) in self.measurements.items()
            },
            frame,
        )


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
    return {"ordinal": ordinal, "error": "", "stateful": False, **counts, **data, **values}


def row_error(row: dict[str, Any]) -> CuvisDistError:
    """Return the error that a worker's row stands for."""
    return (StatefulNodesError if row["stateful"] else DataError)(row["error"])


def compute_inputs(
    pipeline: CuvisPipeline, node: Node, batch: dict[str, Any], frame: str
) -> dict[str, Any]:
    """Compute what a node receives for one frame; raises DataError that names both."""
    try:
        return node_inputs(pipeline, node, batch)
    except Exception as error:
        raise DataError(
            f"{frame} cannot be used for node {node.name}: {one_line(error)}"
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


def _state(pipeline: CuvisPipeline, targets: list[Node]) -> dict[str, tuple]:
    """Return a mark of each node before the targets that changes when its tensors do."""
    before: set[Node] = set().union(*(nx.ancestors(pipeline._graph, n) for n in targets))
    return {
        node.name: tuple(
            (id(tensor), tensor._version) for tensor in (*node.buffers(), *node.parameters())
        )
        for node in before
    }


def _changed(before: dict[str, tuple], after: dict[str, tuple]) -> list[str]:
    return sorted(name for name, mark in after.items() if before[name] != mark)
