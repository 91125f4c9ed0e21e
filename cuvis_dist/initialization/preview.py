"""What would phase 1 read, hold and take? Answered on this machine, without Ray."""

from __future__ import annotations

import copy
import os
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from torch import Tensor

from cuvis_dist.archive import Archive, Contents, batch_bytes, open_archive
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.execution.worker import peak_bytes, prepare_worker
from cuvis_dist.initialization.drawing import drawing_for
from cuvis_dist.initialization.levels import planned
from cuvis_dist.initialization.measured import Outcome
from cuvis_dist.initialization.measuring import Measurer, Partial, compute_inputs
from cuvis_dist.initialization.passes import freeze_fits
from cuvis_dist.initialization.plan import Pass, measured_directly, share
from cuvis_dist.initialization.sampling import fit_later
from cuvis_dist.initialization.served import filling, readings
from cuvis_dist.initialization.shards import together
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.scaling import Scaling

#: What a worker holds before it has read anything: the imports of torch, Ray and cuvis.ai.
_EMPTY_WORKER_BYTES = 1_050_000_000
#: Frames that are measured, per pass, to estimate its time.
_CALIBRATION_FRAMES = 5


@dataclass(frozen=True)
class Cost:
    """What one pass asks of a worker.

    Attributes
    ----------
    step : Pass
        The pass.
    worker_bytes : int
        Memory of a worker, at least; measured where ``seconds`` is.
    seconds : float or None
        To read and measure one frame on one worker (median), if it was tried.
    exact : dict of str to bool
        Which measurements are free of rounding, as far as that was looked at.
    from_store : int
        How many frames are not read, since a store has what is measured of them.
    """

    step: Pass
    worker_bytes: int
    seconds: float | None = None
    exact: dict[str, bool] = field(default_factory=dict)
    from_store: int = 0

    @property
    def rounding(self) -> str:
        """What is measured without rounding and what is not, in words; empty for a stream."""
        by_words: dict[str, list[str]] = {}
        for key, (_, recipe) in self.step.by_key().items():
            known = self.exact.get(key, recipe.statistic.exact or None)
            by_words.setdefault(_ROUNDING[known], []).append(key)
        return "; ".join(f"{words}: {', '.join(keys)}" for words, keys in by_words.items())


_ROUNDING = {
    True: "exact",
    False: "rounded",
    None: "exact where values are whole numbers below 65536",
}


@dataclass(frozen=True)
class Preview:
    """What phase 1 would do.

    Attributes
    ----------
    costs : list of Cost
        Pass by pass.
    frames, shards : int
        How many of them each pass reads.
    frame_bytes : int
        Size of the first frame's tensors, read to find out.
    workers : int
        For how many workers :attr:`seconds` holds.
    batch_frames : int
        How many frames a streamed node is given at a time.
    shuffled : bool
        Whether upstream would shuffle the frames that a streamed node is given.
    filled : int or None
        How many frames are read into the store first, where the bulk is looked for in it.
    """

    costs: list[Cost]
    frames: int
    shards: int
    frame_bytes: int
    workers: int
    batch_frames: int
    shuffled: bool
    filled: int | None

    @property
    def batches(self) -> str:
        """What a streamed node is given, in words."""
        some = (
            f"batches of {self.batch_frames} frames" if self.batch_frames > 1 else "single frames"
        )
        shuffling = " (upstream would shuffle them)" if self.shuffled else ""
        return f"{some} in canonical order{shuffling}"

    @property
    def seconds(self) -> float | None:
        """Estimated time of all passes, start-up apart; None without a calibration."""
        each = [cost.seconds for cost in self.costs if cost.seconds is not None]
        if len(each) < len(self.costs):
            return None
        first = sum(each[:1]) * (self.filled or 0)
        return (sum(each) * self.frames + first) / min(self.workers, self.shards)


def preview(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    scaling: Scaling,
    calibrate: bool = False,
) -> Preview:
    """Return what phase 1 would do; reads one frame, or a few per pass to ``calibrate``.

    Raises
    ------
    InputError
        If the data module cannot be set up.
    DataError
        If a frame cannot be read or used.
    """
    archive = open_archive(datamodule, "train").sampled(
        scaling.measuring.sample_frames,
        scaling.measuring.sample_fraction,
        scaling.measuring.sample_seed,
    )
    first = archive.read(0)
    frame_bytes = batch_bytes(first)
    stored = scaling.measuring.store is not None
    contents = Contents.of(archive.frames) if stored else Contents({})
    args = pipeline, datamodule, archive, contents, scaling.measuring
    if calibrate:
        threads = torch.get_num_threads()
        prepare_worker(int(scaling.resources.cpus_per_worker))
        try:
            costs = _tried(copy.deepcopy(pipeline), archive, scaling)
        finally:
            torch.set_num_threads(threads)
    else:
        sizes = frame_bytes, archive.batch_size
        costs = [
            Cost(
                step,
                _worker_bytes(pipeline, step, *sizes),
                exact=_exact_at_first(pipeline, archive, step, scaling, first),
                from_store=len(archive) - read if stored else 0,
            )
            for step, read in readings(*args)
        ]
    workers = scaling.resources.workers or max(
        1, int((os.cpu_count() or 1) / scaling.resources.cpus_per_worker)
    )
    shards = len(archive.shards(scaling.measuring.shard_frames))
    batches = archive.batch_size, archive.shuffled
    return Preview(
        costs, len(archive), shards, frame_bytes, workers, *batches, filled=filling(*args)
    )


def _worker_bytes(pipeline: CuvisPipeline, step: Pass, frame_bytes: int, batch_frames: int) -> int:
    """Estimate a worker's memory: one cube, and one per node where whole frames go through.

    A batch of them where a node is streamed, and its frames beside it.
    """
    cubes = 1
    if step.streamed is not None:
        cubes += len(nodes_before(pipeline, [step.streamed]))
        cubes = batch_frames * cubes + (batch_frames if batch_frames > 1 else 0)
    else:
        measurer = Measurer(pipeline, step.by_key())
        if not measurer.by_strips:
            cubes += len(nodes_before(pipeline, measurer.targets))
    return _EMPTY_WORKER_BYTES + cubes * frame_bytes


def _exact_at_first(
    pipeline: CuvisPipeline, archive: Archive, step: Pass, scaling: Scaling, batch: dict[str, Any]
) -> dict[str, bool]:
    """Measure the first frame where nothing before needs a fit; nothing where it cannot be used."""
    measured = [measurement.node for measurement in step.measurements]
    if any(node.requires_initial_fit for node in nodes_before(pipeline, measured)):
        return {}
    measurer = Measurer(copy.deepcopy(pipeline), step.by_key(), scaling.measuring.pixels)
    try:
        partial, _ = measurer.frame(batch, archive.frames[0], 0)
    except DataError:
        return {}
    return {key: statistic.exact for key, statistic in partial.statistics.items()}


def _tried(pipeline: CuvisPipeline, archive: Archive, scaling: Scaling) -> list[Cost]:
    """Carry the plan out on a few frames, other ones in every pass: the first reading is cold."""
    costs: list[Cost] = []
    plan = deque(planned(pipeline, scaling.measuring))
    while plan:
        step = plan.popleft()
        few = archive.sampled(_CALIBRATION_FRAMES, None, scaling.measuring.sample_seed + len(costs))
        if step.streamed is not None:
            costs.append(_try_streaming(pipeline, few, step, step.streamed))
            continue
        measurer = Measurer(pipeline, step.by_key(), scaling.measuring.pixels)
        drawing = drawing_for(pipeline, step, scaling.measuring, len(archive))
        partial, probes = Partial({}, ""), dict[str, Tensor]()
        seconds, drawn = [], []
        for position, frame in enumerate(few.frames):
            started = time.perf_counter()
            batch = few.read(position)
            measured, probes = measurer.frame(batch, frame, position)
            partial = partial.merge(measured)
            if drawing:
                drawn.append(drawing.frame(pipeline, batch, frame, position))
            seconds.append(time.perf_counter() - started)
        _, left = freeze_fits(step, partial.statistics, probes)
        more = [share([measured_directly(pipeline, fit)]) for fit in left]
        if left:
            more += step.later
        elif step.later:
            kept = together(drawn)
            outcome = Outcome(partial.statistics, probes, [kept] if kept else None)
            more = fit_later(pipeline, few, step, outcome, scaling).left
        plan.extendleft(reversed(more))
        exact = {key: statistic.exact for key, statistic in partial.statistics.items()}
        costs.append(Cost(step, peak_bytes(), statistics.median(seconds), exact))
    return costs


def _try_streaming(pipeline: CuvisPipeline, few: Archive, step: Pass, node: Node) -> Cost:
    """Read and compute a node's inputs; its own fit takes as long as it takes."""
    inputs, seconds = [], []
    for position, frame in enumerate(few.frames):
        started = time.perf_counter()
        inputs.append(compute_inputs(pipeline, node, few.read(position), str(frame)))
        seconds.append(time.perf_counter() - started)
    try:
        node.statistical_initialization(iter(inputs))
    except Exception as error:
        raise CuvisDistError(f"node {node.name} could not be fitted: {one_line(error)}") from error
    return Cost(step, peak_bytes(), statistics.median(seconds))
