"""How is one pass over the archive carried out on Ray?

Ray Data spreads the shards over the cluster; only partials come back. The driver merges them in
a fixed tree, so the result does not depend on who finished first, and lets the nodes freeze.
"""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.data
import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger

from cuvis_dist.archive import Archive, Shard
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.initialization.affine import probe
from cuvis_dist.initialization.measuring import Partial
from cuvis_dist.initialization.plan import Fit, Pass
from cuvis_dist.initialization.shards import MeasureShard, OneByOne, Task, row_error
from cuvis_dist.scaling import Scaling
from cuvis_dist.statistics import MergeTree, Moments, Statistic, from_bytes
from cuvis_dist.workers import raise_cause

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
        Wall-clock time.
    peak_worker_bytes : int
        Largest resident memory of a worker process up to the end of the pass.
    skipped : dict of str to str
        Frames that were left out, by uid, each with its reason.
    """

    nodes: dict[str, dict[str, Any]]
    frames: int
    bytes: int
    shards: int
    seconds: float
    peak_worker_bytes: int
    skipped: dict[str, str] = field(default_factory=dict)


class Tally:
    """Counts what came back, twice: frames listed are frames measured plus frames skipped.

    Parameters
    ----------
    archive : Archive
        What was asked for.
    max_skipped : int
        How many frames may be left out.
    """

    def __init__(self, archive: Archive, max_skipped: int) -> None:
        self.archive, self.max_skipped = archive, max_skipped
        self.frames = self.bytes = self.peak = self.left_out = 0
        self.skipped: dict[str, str] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Count a row; raises DataError when too many frames were skipped."""
        self.frames += row["frames"]
        self.bytes += row["bytes"]
        self.peak = max(self.peak, row["peak"])
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
        if self.done != len(self.archive):
            raise DataError(
                f"the archive lists {len(self.archive)} frames, but {self.frames} were measured "
                f"and {self.left_out} skipped"
            )
        if not self.frames:
            raise DataError(f"none of {len(self.archive)} frames could be used")


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
    measurements = this_pass.by_key()
    measure = MeasureShard(make_task(pipeline, archive, scaling), measurements)
    tree: MergeTree[Partial] = MergeTree(len(shards), Partial.merge)
    tally = Tally(archive, scaling.max_skipped)
    samples: dict[int, dict[str, torch.Tensor]] = {}
    with raise_cause("the pass over the archive"):
        for row in spread(shards, measure, scaling):
            if row["error"]:
                raise row_error(row)
            statistics = map(from_bytes, row["partials"]) if row["frames"] else ()
            partial = Partial(
                dict(zip(measurements, statistics, strict=bool(row["frames"]))), row["first_frame"]
            )
            if tree.add(row["ordinal"], partial):
                tally.add(row)
                on_shard(tally.done)
                if row["ordinal"] <= min(samples, default=row["ordinal"]) and row["frames"]:
                    samples = {row["ordinal"]: pickle.loads(row["samples"])}
    tally.close()
    (probes,) = samples.values()
    fitted, left = freeze_fits(this_pass, tree.root().statistics, probes)
    seconds = time.perf_counter() - started
    record = PassRecord(
        fitted, tally.frames, tally.bytes, len(shards), seconds, tally.peak, tally.skipped
    )
    return record, left


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
    return Task(ray.put(archive), ray.put(pipeline), threads, skip, scaling.pixels, on_gpu)


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
    """Run ``function`` on a row per shard, one task each, and yield its rows as they come.

    Shards of one file that has to be staged share a task, so that few nodes fetch it.
    """
    cpus = ray.cluster_resources().get("CPU", 1) / scaling.cpus_per_worker
    tasks = share_files(shards, 4 * math.ceil(scaling.workers or cpus))
    listed = [{"ordinal": s.ordinal, "start": s.start, "stop": s.stop} for s in shards]
    rows = [{"shards": listed[task.start : task.stop]} for task in tasks]
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
