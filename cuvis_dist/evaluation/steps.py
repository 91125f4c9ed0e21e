"""How is a fitted pipeline calibrated and evaluated on the cluster?

By upstream's own post-fit steps and evaluation loop, over batches that all workers compute
(:mod:`~cuvis_dist.evaluation.cluster`). The loop itself runs in the driver, which then holds metric
values and states and, while deciders are calibrated, the scores and masks of the whole split.

A pipeline that leaves something behind with every frame (a sink writes files, a tracker follows
objects) or has a pooled metric that cannot be merged runs on one worker, in order.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytorch_lightning as pl
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.evaluation import (
    EvaluationSummary,
    OnBatch,
    default_metric_nodes,
    evaluate_split,
)
from cuvis_ai_core.training.post_fit import (
    EmitFn,
    EvaluationStatus,
    FrameProgress,
    PostFitCallback,
    PostFitResult,
    TrainEvent,
    TrainHook,
)
from cuvis_ai_schemas.enums import ExecutionStage, NodeCategory, NodeTag
from loguru import logger

from cuvis_dist.archive import FrameCache
from cuvis_dist.archive.frame_cache import frame_cache
from cuvis_dist.errors import without_traceback
from cuvis_dist.evaluation.cluster import ClusterPipeline, Split
from cuvis_dist.evaluation.looking import LookingPipeline
from cuvis_dist.evaluation.merging import unmergeable
from cuvis_dist.evaluation.naming import NamingPipeline
from cuvis_dist.evaluation.seen import Seen
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.pool import Workers
from cuvis_dist.execution.where import begin, in_one_process, settled, use_patience, work_on_splits
from cuvis_dist.execution.worker import prepare_worker
from cuvis_dist.nodes.state import adopt_all
from cuvis_dist.nodes.upstream import select_by_recording
from cuvis_dist.scaling import Scaling
from cuvis_dist.staging import fetched_when_opened
from cuvis_dist.waiting import announce

_POST_FIT_STAGES = (ExecutionStage.INFERENCE, ExecutionStage.VAL, ExecutionStage.TEST)


@dataclass(frozen=True)
class AfterFit:
    """Where a fit has ended, which sinks are told, and how it ran.

    Attributes
    ----------
    epoch, global_step : int
        What the evaluated batches are counted by, as upstream does: an epoch that no training
        used, and a step past the last one.
    release_cuda_cache : bool
        Whether unused GPU memory is given back before each step.
    """

    epoch: int = 0
    global_step: int = 0
    release_cuda_cache: bool = False


@dataclass(frozen=True)
class Evaluator:
    """Calibrates and evaluates one pipeline on one data module, on the workers of the cluster.

    Attributes
    ----------
    pipeline : CuvisPipeline
        A fitted pipeline, on the CPU.
    datamodule : LightningDataModule
        It serves val and test.
    scaling : Scaling
        Workers.
    emit : callable
        Where events go.
    seen : dict of str to Seen, or None
        Where :meth:`post_fit` puts what people can look at, by split, if that is wanted.
    """

    pipeline: CuvisPipeline
    datamodule: pl.LightningDataModule
    scaling: Scaling
    emit: EmitFn
    seen: dict[str, Seen] | None = None

    def post_fit(
        self, metric_nodes: Sequence[Node] | None = None, after: AfterFit | None = None
    ) -> PostFitResult:
        """Calibrate the deciders on val, evaluate val and test; the pipeline takes over the result.

        Parameters
        ----------
        metric_nodes : sequence of Node, optional
            Which metrics are reported; by default those of all metric nodes.
        after : AfterFit, optional
            The fit that has ended; by default one of no steps.

        Returns
        -------
        PostFitResult
            Upstream's record. An evaluation that failed is in it, and does not raise.
        """
        scaling = self._settled({"val": 2, "test": 1})  # val calibrates, too
        begin(scaling, training=None)
        nodes = metric_nodes if metric_nodes is not None else default_metric_nodes(self.pipeline)
        if reason := why_one_worker(self.pipeline, nodes, _POST_FIT_STAGES):
            logger.info(f"calibrated and evaluated on one worker: {reason}")
        announce("calibrating and evaluating")
        names, look = [node.name for node in nodes], self.seen is not None
        steps = _PostFit(names, after or AfterFit(), bool(reason), self._cache(), look)
        # The loop itself mostly waits for the workers, and another of them would have to start.
        place = Workers.evaluating(scaling) if reason else Workers.none(scaling)
        result, fitted, seen = in_one_process(
            _post_fit,
            self.pipeline,
            self.datamodule,
            steps,
            scaling,
            emit=self.emit,
            workers=place,
        )
        adopt_all(self.pipeline, fitted)
        if self.seen is not None:
            self.seen.update(seen)
        return result

    def evaluate(
        self,
        stage: ExecutionStage,
        metric_nodes: Sequence[Node],
        stop_event: threading.Event | None = None,
    ) -> EvaluationSummary:
        """Reduce the metric nodes over the split of ``stage`` (VAL or TEST), every frame once.

        The result is that of upstream's ``evaluate_split`` in one process, for any number of
        workers: pooled metrics are merged, other values averaged over the batches that the data
        module makes.

        Raises
        ------
        InputError
            If the data module cannot serve the split.
        DataError
            If a frame cannot be read or used (the message names it), or frames are missing.
        ClusterError
            If the cluster cannot be reached or lost the work.
        TrainingCancelled
            If the stop event was set; it is read before each batch, but not while one worker does
            it all.
        """
        scaling = self._settled({stage.value: 1})
        begin(scaling, training=None)
        announce(f"evaluating {stage.value}")
        if reason := why_one_worker(self.pipeline, metric_nodes, [stage]):
            logger.info(f"{stage.value} is evaluated on one worker: {reason}")
            return in_one_process(
                _evaluate,
                self.pipeline,
                self.datamodule,
                stage,
                [node.name for node in metric_nodes],
                (scaling, self._cache()),
                emit=self.emit,
                workers=Workers.evaluating(scaling),
            )
        spread: Any = ClusterPipeline(self.pipeline, metric_nodes, scaling)
        split: Any = Split(self.datamodule, stage.value, self._cache())
        with closing(spread), raise_cause(f"evaluating {stage.value}"):
            return evaluate_split(
                spread,
                split,
                stage=stage,
                metric_nodes=metric_nodes,
                stop_event=stop_event,
                on_batch=_progress(stage, self.emit),
            )

    def _cache(self) -> FrameCache | None:
        reading = self.scaling.reading
        return frame_cache(self.datamodule, reading.cache, reading.cache_bytes)

    def _settled(self, times: dict[str, int]) -> Scaling:
        """Return the settings with the choice of where these splits are read, so often each."""
        work = partial(work_on_splits, self.datamodule, self.pipeline, times)
        return settled(self.scaling, f"evaluation of {' and '.join(times)}", work)


def why_one_worker(
    pipeline: CuvisPipeline, metric_nodes: Sequence[Node], stages: Sequence[ExecutionStage]
) -> str | None:
    """Return why the pipeline must see a split in one process, or None when it need not."""
    for node in pipeline.nodes():
        if not any(node.should_execute(stage) for stage in stages):
            continue
        if node.get_category() is NodeCategory.SINK:
            return f"{node.name} writes what it is given ({type(node).__name__})"
        if NodeTag.TRACKING in node.get_tags():
            return f"{node.name} depends on the frames before ({type(node).__name__})"
    for node in metric_nodes:
        if metric := unmergeable(node):
            return f"the {metric} of {node.name} cannot be merged"
    return None


def failed_split(result: PostFitResult) -> str | None:
    """Return why an evaluation failed, or None when none did."""
    for split, outcome in result.evaluations.items():
        if outcome.status is EvaluationStatus.FAILED:
            return f"evaluating {split}: {without_traceback(outcome.error or '')}"
    return None


def _progress(stage: ExecutionStage, emit: EmitFn) -> OnBatch:
    return lambda done, total: emit(
        TrainEvent(TrainHook.EVALUATION_PROGRESS, split=stage, progress=FrameProgress(done, total))
    )


# ---- on the worker ---------------------------------------------------------------------


class _NamedSplits:
    """A data module whose val and test loaders are :class:`Split`, or load as one."""

    def __init__(self, datamodule: pl.LightningDataModule, steps: _PostFit) -> None:
        self._datamodule, self._here, self._cache = datamodule, steps.here, steps.cache
        self.opened: dict[str, Split] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._datamodule, name)

    def setup(self, stage: str | None = None) -> None:
        select_by_recording()
        with fetched_when_opened():
            self._datamodule.setup(stage)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        return self._open("val")

    def test_dataloader(self) -> Any:
        return self._open("test")

    def _open(self, name: str) -> Any:
        if name not in self.opened:
            self.opened[name] = Split(self._datamodule, name, self._cache)
        return self.opened[name].loader() if self._here else self.opened[name]


@dataclass(frozen=True)
class _PostFit:
    """What post-fit steps need to know.

    Attributes
    ----------
    metric_nodes : list of str
        Names of the metric nodes.
    after : AfterFit
        The fit that has ended.
    here : bool
        Whether the process of the loop computes everything.
    cache : FrameCache or None
        Where each node keeps the frames that it has read.
    look : bool
        Whether to keep what people can look at.
    """

    metric_nodes: list[str]
    after: AfterFit
    here: bool
    cache: FrameCache | None
    look: bool = False


def _post_fit(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    steps: _PostFit,
    scaling: Scaling,
    emit: EmitFn,
) -> tuple[PostFitResult, list[Node], dict[str, Seen]]:
    prepare_worker(int(scaling.resources.cpus_per_worker))
    use_patience(scaling)
    nodes = _nodes(pipeline, steps.metric_nodes)
    callback = PostFitCallback(
        emit=emit, metric_nodes=nodes, release_cuda_cache=steps.after.release_cuda_cache
    )
    splits = _NamedSplits(datamodule, steps)
    run: Any = ClusterPipeline(pipeline, nodes, scaling)
    if steps.here:
        pipeline.to("cuda" if scaling.resources.train_gpus else "cpu")
        run = LookingPipeline(pipeline, splits.opened)
    run.seen = {} if steps.look else None
    computing: Any = NamingPipeline(run, splits.opened)
    with closing(run):
        try:
            result = callback.run(
                computing,
                splits,
                restore=False,
                epoch=steps.after.epoch,
                global_step=steps.after.global_step,
            )
        except RuntimeError as error:  # an evaluation raises nothing: see upstream's callback
            raise computing.unlike_sizes() or error from error
    pipeline.cpu()
    return result, list(pipeline.nodes()), run.seen or {}


def _evaluate(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    stage: ExecutionStage,
    metric_nodes: list[str],
    reading: tuple[Scaling, FrameCache | None],
    emit: EmitFn,
) -> EvaluationSummary:
    scaling, cache = reading
    use_patience(scaling)
    pipeline.to("cuda" if scaling.resources.train_gpus else "cpu")
    split = Split(datamodule, stage.value, cache)
    naming: Any = NamingPipeline(pipeline, {stage.value: split})
    return evaluate_split(
        naming,
        split.loader(),
        stage=stage,
        metric_nodes=_nodes(pipeline, metric_nodes),
        on_batch=_progress(stage, emit),
    )


def _nodes(pipeline: CuvisPipeline, names: list[str]) -> list[Node]:
    return [node for node in pipeline.nodes() if node.name in names]
