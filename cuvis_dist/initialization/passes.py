"""How is one pass over the archive carried out on Ray?

Ray Data spreads the shards over the cluster; only partials come back. The driver merges them in
a fixed tree, so the result does not depend on who finished first, and lets the nodes freeze.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import ray
import ray.data
import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cuvis_dist.archive import Archive, Shard
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.initialization.affine import probe
from cuvis_dist.initialization.measuring import Partial
from cuvis_dist.initialization.plan import Fit, Pass
from cuvis_dist.initialization.shards import MeasureShard, OneByOne, Task, row_error
from cuvis_dist.initialization.stored import StoredPass
from cuvis_dist.scaling import Scaling
from cuvis_dist.statistics import MergeTree, Moments, Statistic, from_bytes
from cuvis_dist.workers import raise_cause

#: How many other nodes are asked for a recording that one cannot read.
_OTHER_NODES = 3

#: Tasks of a pass at most, unless there are very many workers, which need some each.
_TASKS, _TASKS_PER_WORKER = 1000, 32

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
        Frames measured, and the bytes of their tensors.
    shards : int
        Units of work.
    seconds : float
        Wall-clock time, that of an earlier run which was cut off included.
    peak_worker_bytes : int
        Largest resident memory of a worker process up to the end of the pass.
    skipped : dict of str to str
        Frames that were left out, by uid, each with its reason.
    restored_shards, restored_frames : int
        How many of them an earlier run, which was cut off, had dealt with.
    repeated : list of int
        Ordinals of the shards that were run again, since a worker or node was lost (with the few
        others of the same task, in an archive of more than a thousand shards) or the node could
        not read the recording.
    """

    nodes: dict[str, dict[str, Any]]
    frames: int
    bytes: int
    shards: int
    seconds: float
    peak_worker_bytes: int
    skipped: dict[str, str] = field(default_factory=dict)
    restored_shards: int = 0
    restored_frames: int = 0
    repeated: list[int] = field(default_factory=list)


class Tally:
    """Counts what came back, twice: frames listed are frames measured plus frames skipped.

    Parameters
    ----------
    listed : int
        Frames that were asked for.
    max_skipped : int
        How many frames may be left out.
    """

    def __init__(self, listed: int, max_skipped: int) -> None:
        self.listed, self.max_skipped = listed, max_skipped
        self.frames = self.bytes = self.peak = self.left_out = 0
        self.skipped: dict[str, str] = {}
        self.repeated: set[int] = set()

    def add(self, row: dict[str, Any]) -> None:
        """Count a row; raises DataError when too many frames were skipped."""
        self.frames += row["frames"]
        self.bytes += row["bytes"]
        self.peak = max(self.peak, row["peak"])
        if row["again"]:
            self.repeated.add(row["ordinal"])
        for uid, reason in pickle.loads(row["skipped"]):
            logger.warning(f"skipped: {reason}")
            self.skipped[uid] = reason
            self.left_out += 1  # a frame that samples_per_frame repeats has one uid
        if self.left_out > self.max_skipped:
            raise DataError(
                f"{self.left_out} frames cannot be used, more than max_skipped "
                f"({self.max_skipped}). The last: {list(self.skipped.values())[-1]}"
            )

    @property
    def done(self) -> int:
        """Frames dealt with."""
        return self.frames + self.left_out

    def close(self) -> None:
        """Raise DataError unless every frame of the archive was measured or skipped."""
        if self.done != self.listed:
            raise DataError(
                f"the archive lists {self.listed} frames, but {self.frames} were measured "
                f"and {self.left_out} skipped"
            )
        if not self.frames:
            raise DataError(f"none of {self.listed} frames could be used")


class Measured:
    """What a pass has measured and merged so far.

    Parameters
    ----------
    shards : int
        Of the archive.
    tally : Tally
        Counts what comes back.

    Attributes
    ----------
    probes : dict of str to Tensor
        By measurement, some pixels of the first shard that has any.
    seconds : float
        Time that it took.
    """

    def __init__(self, shards: int, tally: Tally) -> None:
        self.tree: MergeTree[Partial] = MergeTree(shards, Partial.merge)
        self.tally = tally
        self.probes: dict[str, torch.Tensor] = {}
        self.seconds = 0.0
        self._first = shards

    @property
    def done(self) -> int:
        """Frames dealt with."""
        return self.tally.done

    def add(self, row: dict[str, Any], measurements: Iterable[str]) -> bool:
        """Merge and count a row; False (and no effect) when its shard was added before.

        Raises
        ------
        DataError
            If the shard does not fit the others, or too many frames were skipped.
        """
        statistics = map(from_bytes, row["partials"]) if row["frames"] else ()
        partial = Partial(
            dict(zip(measurements, statistics, strict=bool(row["frames"]))), row["first_frame"]
        )
        if not self.tree.add(row["ordinal"], partial):
            return False
        self.tally.add(row)
        if row["ordinal"] < self._first and row["frames"]:
            self._first, self.probes = row["ordinal"], pickle.loads(row["samples"])
        return True


def measure_pass(
    pipeline: CuvisPipeline,
    archive: Archive,
    this_pass: Pass,
    scaling: Scaling,
    on_shard: OnShard,
    stored: StoredPass | None = None,
) -> tuple[PassRecord, list[Fit]]:
    """Carry out the measurements of ``this_pass`` over the archive and freeze its nodes.

    Parameters
    ----------
    stored : StoredPass, optional
        Where to keep what is measured; what an earlier run left there is not measured again.

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
    shards = archive.shards(scaling.shard_frames)
    earlier: Measured | None = stored.earlier if stored else None
    measured = earlier or Measured(len(shards), Tally(len(archive), scaling.max_skipped))
    missing = [shard for shard in shards if shard.ordinal not in measured.tree]
    restored = len(shards) - len(missing), measured.tally.done
    if missing:
        _measure(pipeline, archive, missing, this_pass, scaling, on_shard, measured, stored)
    tally = measured.tally
    tally.close()
    fitted, left = freeze_fits(this_pass, measured.tree.root().statistics, measured.probes)
    record = PassRecord(
        fitted,
        tally.frames,
        tally.bytes,
        len(shards),
        measured.seconds,
        tally.peak,
        tally.skipped,
        *restored,
        sorted(tally.repeated),
    )
    return record, left


def _measure(
    pipeline: CuvisPipeline,
    archive: Archive,
    shards: list[Shard],
    this_pass: Pass,
    scaling: Scaling,
    on_shard: OnShard,
    measured: Measured,
    stored: StoredPass | None,
) -> None:
    """Measure ``shards`` and add them to ``measured``, which is kept however this ends."""
    started = time.perf_counter() - measured.seconds
    measurements = this_pass.by_key()
    measure = MeasureShard(make_task(pipeline, archive, scaling), measurements)
    by_ordinal = {shard.ordinal: shard for shard in shards}
    whole = False  # an interruption can come at any moment, in the middle of a merge too
    try:
        with raise_cause("the pass over the archive"):
            for row in spread(shards, measure, scaling):
                if row["unreadable"]:
                    row = read_elsewhere(row, measure, by_ordinal[row["ordinal"]], scaling)
                if row["error"]:
                    raise row_error(row)
                whole = False
                added = measured.add(row, measurements)
                measured.seconds = time.perf_counter() - started
                whole = True
                if added:
                    if stored:
                        stored.save_if_due(measured)
                    on_shard(measured.tally.done)
    finally:
        if stored and whole:
            stored.save(measured)


def freeze_fits(
    this_pass: Pass, merged: dict[str, Statistic], probes: dict[str, torch.Tensor]
) -> tuple[dict[str, dict[str, Any]], list[Fit]]:
    """Let the nodes of a pass freeze what was measured for them, in order.

    Parameters
    ----------
    this_pass : Pass
        What was measured, and for which nodes.
    merged : dict of str to Statistic
        By measurement, of the whole archive.
    probes : dict of str to Tensor
        By measurement, real pixels ``[N, C]`` to check affine maps on.

    Returns
    -------
    tuple of dict and list of Fit
        Per fitted node its statistic and number of pixels, and the fits that have to be measured
        directly (see :func:`measure_pass`).
    """
    fitted: dict[str, dict[str, Any]] = {}
    left: list[Fit] = []
    for fit in this_pass.fits:
        statistic = merged[fit.source.key]
        if fit.chain:
            try:
                if left:
                    raise ValueError(f"{left[0].node.name} is not fitted yet")
                statistic = statistic.affine(*probe(fit.chain, probes[fit.source.key]))
            except ValueError as error:
                logger.info(f"{fit.node.name} is measured directly: {error}")
                left.append(fit)
                continue
        _freeze(fit, statistic)
        fitted[fit.node.name] = {"statistic": str(fit), "pixels": statistic.n}
    return fitted, left


def _freeze(fit: Fit, statistic: Statistic) -> None:
    if not statistic.n:
        raise DataError(
            f"no pixel is left for node {fit.node.name}: masks and the setting pixels leave all out"
        )
    if isinstance(statistic, Moments) and fit.recipe.options.get("diagonal"):
        statistic = statistic.only_diagonal()
    try:
        fit.recipe.freeze(fit.node, statistic)
    except Exception as error:
        raise CuvisDistError(
            f"node {fit.node.name} could not be fitted: {one_line(error)}"
        ) from error


def make_task(pipeline: CuvisPipeline, archive: Archive, scaling: Scaling) -> Task:
    """Put the pipeline as it is now, and the archive, where every worker can fetch them."""
    threads = math.floor(scaling.cpus_per_worker)
    skip, on_gpu = scaling.on_error == "skip", scaling.worker_gpus > 0
    elsewhere = len(_readers(scaling)) > 1
    refs = ray.put(archive), ray.put(pipeline)
    probed = scaling.max_skipped if skip else 0
    return Task(*refs, threads, skip, probed, scaling.pixels, on_gpu, elsewhere)


def _readers(scaling: Scaling) -> list[str]:
    """Return the ids of the nodes that can run a worker."""
    need = {"CPU": scaling.cpus_per_worker, "GPU": scaling.worker_gpus}
    return [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(k, 0) >= v for k, v in need.items())
    ]


def read_elsewhere(
    row: dict[str, Any], measure: MeasureShard, shard: Shard, scaling: Scaling
) -> dict[str, Any]:
    """Run a shard whose recording a node cannot read on other nodes; return the row of one.

    The last node that is tried decides whether the frame is skipped.

    Raises
    ------
    DataError
        If none of them can read it; the message names them.
    """
    tried = [row["node"]]
    others = [node for node in _readers(scaling) if node not in tried][:_OTHER_NODES]
    for node in others:
        logger.warning(f"{row_error(row)}; another node is asked")
        last = node == others[-1]
        there = MeasureShard(replace(measure.task, elsewhere=not last), measure.measurements)
        options: dict[str, Any] = {
            "num_cpus": scaling.cpus_per_worker,
            "num_gpus": scaling.worker_gpus or None,
            "max_retries": 3,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
        }
        (row,) = ray.get(ray.remote(**options)(_run).remote(there, as_row(shard)))
        if not row["error"]:
            return row | {"again": True}
        if not row["unreadable"]:
            break
        tried.append(row["node"])
    raise row_error(row, *(node for node in tried if node != row["node"]))


def _run(measure: MeasureShard, shard: dict[str, int]) -> list[dict[str, Any]]:
    return measure(shard)


def as_row(shard: Shard) -> dict[str, int]:
    """Return what a worker is told of a shard."""
    return {"ordinal": shard.ordinal, "start": shard.start, "stop": shard.stop}


def share_files(shards: list[Shard], at_least: int) -> list[range]:
    """Cut the shards into tasks, each of one staged file; more per file if files are few.

    Parameters
    ----------
    shards : list of Shard
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
    pieces = math.ceil(at_least / len(runs))
    return [
        run[len(run) * k // n : len(run) * (k + 1) // n]
        for run in runs
        for n in [min(pieces, len(run))]
        for k in range(n)
    ]


def spread(shards: list[Shard], function: Any, scaling: Scaling) -> Iterator[dict[str, Any]]:
    """Run ``function`` on every shard, and yield its rows as they come.

    A task takes one shard; those of one file that has to be staged, so that few nodes fetch it; or
    several where there are very many: Ray Data needs some ten milliseconds of the driver for each
    task. (Not where the rows carry cubes.)
    """
    cpus = ray.cluster_resources().get("CPU", 1) / scaling.cpus_per_worker
    runs = share_files(shards, 4 * math.ceil(scaling.workers or cpus))
    tasks = max(_TASKS, int(_TASKS_PER_WORKER * (scaling.workers or cpus)))
    each = 1 if function.ordered else math.ceil(len(runs) / tasks)
    rows = []
    for first in range(0, len(runs), each):
        start, stop = runs[first].start, runs[first : first + each][-1].stop
        rows.append({"shards": [as_row(shard) for shard in shards[start:stop]]})
    workers = min(scaling.workers, len(rows)) if scaling.workers else None
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
        OneByOne(function),
        compute=ray.data.TaskPoolStrategy(size=workers),
        num_cpus=scaling.cpus_per_worker,
        num_gpus=scaling.worker_gpus or None,
    )
    dataset.context.execution_options.preserve_order = function.ordered
    dataset.context.enable_progress_bars = False
    return iter(dataset.iter_rows())
