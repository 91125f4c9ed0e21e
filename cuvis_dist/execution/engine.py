"""How do shards reach the workers of a Ray cluster, and how do their rows come back?

A Ray task computes one shard, or a few; Ray repeats it when its worker is lost. A shard whose
recording a node cannot read is computed on another node.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, deque
from collections.abc import Generator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import ray
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cuvis_dist.archive import Archive, FrameCache
from cuvis_dist.errors import CuvisDistError, DataError
from cuvis_dist.execution.borrowing import lend_frames
from cuvis_dist.execution.importing import await_imports
from cuvis_dist.execution.pool import Pool, Workers
from cuvis_dist.execution.spread import (
    Order,
    Piece,
    Row,
    ShardFunction,
    UnreadableError,
    compute_shard,
)
from cuvis_dist.execution.worker import attempts_before, peak_bytes

#: How many other nodes are asked for a recording that one cannot read.
_OTHER_NODES = 3
#: Tasks at most, unless there are very many workers, which need some each.
_TASKS, _TASKS_PER_WORKER = 1000, 32
#: How many bundles are looked at to find one whose frames a node with little to do keeps.
_LOOKED_AT = 64
#: How many shards of a staged file one task takes at most, where rows carry cubes.
_CUBES_TOGETHER = 4


class RayEngine:
    """Runs functions of shards on the workers of the Ray cluster that this process has joined.

    Parameters
    ----------
    workers : Workers
        What they occupy, and how many there may be.

    Examples
    --------
    >>> with RayEngine(Workers.measuring(scaling)) as engine:
    ...     order = engine.make_order(pipeline, archive)
    ...     for row in spread(archive.shards(4), GatherShard(order, None), engine):
    ...         print(row.ordinal)
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers
        self._pool = Pool(_compute, workers)
        self._caches: dict[Any, FrameCache | None] = {}

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes that only this engine uses."""
        self._pool.close()

    def keep(self, value: Any) -> Any:
        """Return what functions of shards can fetch ``value`` by, as it is now."""
        return ray.put(value)

    def make_order(self, pipeline: CuvisPipeline, archive: Archive, skip: bool = False) -> Order:
        """Put the pipeline as it is now, and the archive, where every worker can fetch them."""
        lend_frames(archive.cache)
        kept = self.keep(archive)
        self._caches[kept] = archive.cache
        return Order(
            kept,
            self.keep(pipeline),
            threads=math.floor(self.workers.cpus),
            skip=skip,
            on_gpu=self.workers.gpus > 0,
            elsewhere=len(self.workers.nodes()) > 1,
        )

    def rows(self, shards: Sequence[Piece], function: ShardFunction) -> Generator[Row, None, None]:
        """Yield the rows of every shard as they come, or in order if the function wants that.

        In order, at most twice as many tasks as there are workers have been started and not been
        asked for their rows, so that few of them wait in memory for an earlier one. Where nodes
        keep frames, a shard goes to the node that computed it in the pass before.

        Raises
        ------
        RayError
            If Ray lost the worker of a task again and again.
        """
        await_imports()
        bundles = self._bundles(shards, cubes=function.ordered)
        kept = ray.put(function)
        waiting = deque(range(len(bundles)))
        cached = _CachedFrames(self._caches.get(function.order.archive), bundles)
        running: dict[ray.ObjectRef, int] = {}
        ended: dict[int, ray.ObjectRef] = {}
        rows: list[Row] = []
        due = 0 if function.ordered else -1
        try:
            while True:
                room = min(self._pool.room, 2 * self._pool.places - len(ended))
                while waiting and len(running) < room:
                    number = cached.take(waiting, running.values(), function.ordered)
                    ref = self._pool.start(kept, bundles[number], on=cached.node(number))
                    running[ref] = number
                for row in rows:
                    yield from self._settled(row, function, shards)
                if not running and not ended:
                    return
                if due not in ended:
                    (ref,), _ = ray.wait(list(running))
                    self._pool.release(ref)
                    ended[running.pop(ref)] = ref
                (number,) = (due,) if function.ordered else ended
                rows = []
                if number in ended:
                    rows = ray.get(ended.pop(number))
                    cached.note(number, rows)
                    due += function.ordered
        finally:
            self._pool.abandon(running)

    def _bundles(self, shards: Sequence[Piece], cubes: bool) -> list[Sequence[Piece]]:
        """Cut the shards into what one task takes each.

        One shard; those of one file that has to be staged, so that few nodes fetch it; or several
        where there are very many, since each task takes milliseconds of the driver. Few where the
        rows carry cubes.
        """
        places = self._pool.places
        runs = share_files(shards, 4 * places)
        if cubes:
            return [
                shards[first : min(first + _CUBES_TOGETHER, run.stop)]
                for run in runs
                for first in range(run.start, run.stop, _CUBES_TOGETHER)
            ]
        each = math.ceil(len(runs) / max(_TASKS, _TASKS_PER_WORKER * places))
        firsts = range(0, len(runs), max(1, each))
        return [shards[runs[i].start : runs[i : i + each][-1].stop] for i in firsts]

    def _settled(self, row: Row, function: ShardFunction, shards: Sequence[Piece]) -> Iterable[Row]:
        """Return the rows that stand for this one: itself, or what another node computed."""
        if isinstance(row.error, UnreadableError):
            (shard,) = (shard for shard in shards if shard.ordinal == row.ordinal)
            return self._elsewhere(row, function, shard)
        return [row if row.error is None else replace(row, error=_located(row.error, [row.node]))]

    def _elsewhere(self, row: Row, function: ShardFunction, shard: Piece) -> list[Row]:
        """Compute a shard whose recording a node cannot read on other nodes.

        The last node that is tried decides whether the frame is skipped.
        """
        rows, tried = [row], [row.node]
        others = [node for node in self.workers.nodes() if node not in tried][:_OTHER_NODES]
        there = copy.copy(function)
        for node in others:
            assert rows[0].error is not None
            logger.warning(f"{_located(rows[0].error, [tried[-1]])}; another node is asked")
            # Actors keep their GPUs, so this runs beside them, on the CPU and with its rounding.
            there.order = replace(function.order, elsewhere=node != others[-1], on_gpu=False)
            options: dict[str, Any] = {
                "num_cpus": 0 if self.workers.gpus else self.workers.cpus,
                "max_retries": self.workers.failures,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
            }
            rows = ray.get(ray.remote(**options)(_compute).remote(there, [shard]))
            if rows[0].error is None:
                return [replace(row, again=True) for row in rows]
            if rows[0].node not in tried:
                tried.append(rows[0].node)
            if not isinstance(rows[0].error, UnreadableError):
                break
        (row,) = rows
        assert row.error is not None
        return [replace(row, error=_located(row.error, tried))]


class _CachedFrames:
    """Which node keeps the frames of which bundle, as far as the cache of an archive tells.

    Parameters
    ----------
    cache : FrameCache or None
        Without one, no node keeps any.
    bundles : sequence of shards
        What is to be computed.
    """

    def __init__(self, cache: FrameCache | None, bundles: Sequence[Sequence[Piece]]) -> None:
        self.cache, self.bundles = cache, bundles

    def node(self, number: int) -> str | None:
        """Return the node that keeps the frames of a bundle."""
        first = self.bundles[number][0]
        return self.cache.node(type(first).__name__, first.start) if self.cache else None

    def note(self, number: int, rows: Sequence[Row]) -> None:
        """Remember the node that has computed a bundle."""
        if self.cache and rows and rows[-1].error is None:
            for piece in self.bundles[number]:
                frames = range(piece.start, piece.stop)
                self.cache.note(type(piece).__name__, frames, rows[-1].node)

    def take(self, waiting: deque[int], running: Iterable[int], ordered: bool) -> int:
        """Take the next bundle: among the first few one for the node with the least to do."""
        if self.cache is None or ordered:
            return waiting.popleft()
        busy = Counter(self.node(number) for number in running)
        few = range(min(len(waiting), _LOOKED_AT))
        place = min(few, key=lambda i: busy[self.node(waiting[i])])
        number = waiting[place]
        del waiting[place]
        return number


def _compute(function: ShardFunction, shards: Sequence[Piece]) -> list[Row]:
    """Return the rows of some shards, one shard after another; runs on a worker."""
    known: dict[str, Any] = {
        "again": attempts_before() > 0,
        "node": ray.get_runtime_context().get_node_id(),
    }
    rows = [row for shard in shards for row in compute_shard(function, shard)]
    return [replace(row, peak=peak_bytes(), **known) for row in rows]


def _located(error: CuvisDistError, tried: Sequence[str]) -> CuvisDistError:
    """Return an error about data with the nodes that met it, where there are several."""
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    if not isinstance(error, DataError) or len(address) < 2:
        return error
    return type(error)(f"{error} (on node {', '.join(address.get(n, n) for n in tried)})")


def share_files(shards: Sequence[Piece], at_least: int) -> list[range]:
    """Cut the shards into runs that one task takes, each of one staged file.

    So few nodes fetch a file; it is cut further if files are few. A shard of what need not be
    staged stands alone.

    Parameters
    ----------
    shards : sequence of Shard
        In canonical order.
    at_least : int
        How many tasks keep the workers busy to the end.
    """
    runs: list[range] = []
    for i, shard in enumerate(shards):
        if runs and shard.staged and shard.staged == shards[i - 1].staged:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    pieces = math.ceil(at_least / max(1, len(runs)))
    return [
        run[len(run) * k // n : len(run) * (k + 1) // n]
        for run in runs
        for n in [min(pieces, len(run))]
        for k in range(n)
    ]
