"""How is a fitted pipeline calibrated and evaluated on the cluster?

By upstream's own post-fit steps and evaluation loop, run on one worker: the driver may have no
GPU and little memory. Spreading a split over all workers is not done yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytorch_lightning as pl
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.evaluation import EvaluationSummary, evaluate_split
from cuvis_ai_core.training.post_fit import (
    EmitFn,
    EvaluationStatus,
    FrameProgress,
    PostFitCallback,
    PostFitResult,
    TrainEvent,
    TrainHook,
)
from cuvis_ai_schemas.enums import ExecutionStage

from cuvis_dist.archive import open_split
from cuvis_dist.errors import DataError
from cuvis_dist.scaling import Scaling
from cuvis_dist.session import connect
from cuvis_dist.workers import adopt_all, on_worker


def post_fit(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    *,
    metric_nodes: Sequence[Node] | None,
    emit: EmitFn,
    scaling: Scaling,
    release_cuda_cache: bool = False,
) -> PostFitResult:
    """Calibrate the deciders on val, evaluate val and test; ``pipeline`` takes over the result.

    Returns
    -------
    PostFitResult
        Upstream's record. An evaluation that failed is in it, and does not raise.
    """
    connect(scaling)
    result, nodes = on_worker(
        _post_fit,
        pipeline,
        datamodule,
        _names(metric_nodes),
        release_cuda_cache,
        scaling.gpus_per_worker > 0,
        emit=emit,
        scaling=scaling,
        gpus=scaling.gpus_per_worker,
    )
    adopt_all(pipeline, nodes)
    return result


def evaluate(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    stage: ExecutionStage,
    *,
    metric_nodes: Sequence[Node],
    emit: EmitFn,
    scaling: Scaling,
) -> EvaluationSummary:
    """Reduce the metric nodes over the split of ``stage`` (VAL or TEST)."""
    connect(scaling)
    return on_worker(
        _evaluate,
        pipeline,
        datamodule,
        stage,
        _names(metric_nodes) or [],
        scaling.gpus_per_worker > 0,
        emit=emit,
        scaling=scaling,
        gpus=scaling.gpus_per_worker,
    )


def failed_split(result: PostFitResult) -> str | None:
    """Return why an evaluation failed, or None when none did."""
    for split, outcome in result.evaluations.items():
        if outcome.status is EvaluationStatus.FAILED:
            return f"evaluating {split}: {outcome.error}"
    return None


# ---- on the worker ---------------------------------------------------------------------


def _post_fit(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    metric_nodes: list[str] | None,
    release_cuda_cache: bool,
    on_gpu: bool,
    emit: EmitFn,
) -> tuple[PostFitResult, list[Node]]:
    pipeline.to("cuda" if on_gpu else "cpu")
    callback = PostFitCallback(
        emit=emit,
        metric_nodes=_nodes(pipeline, metric_nodes),
        release_cuda_cache=release_cuda_cache,
    )
    result = callback.run(pipeline, datamodule, restore=False)
    pipeline.cpu()
    return result, list(pipeline.nodes())


def _evaluate(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    stage: ExecutionStage,
    metric_nodes: list[str],
    on_gpu: bool,
    emit: EmitFn,
) -> EvaluationSummary:
    pipeline.to("cuda" if on_gpu else "cpu")
    loader, _ = open_split(datamodule, stage.value)
    try:
        return evaluate_split(
            pipeline,
            loader,
            stage=stage,
            metric_nodes=_nodes(pipeline, metric_nodes) or [],
            on_batch=lambda done, total: emit(
                TrainEvent(
                    TrainHook.EVALUATION_PROGRESS, split=stage, progress=FrameProgress(done, total)
                )
            ),
        )
    except OSError as error:
        raise DataError(f"cannot read the {stage.value} split: {error}") from error


def _names(nodes: Sequence[Node] | None) -> list[str] | None:
    return None if nodes is None else [node.name for node in nodes]


def _nodes(pipeline: CuvisPipeline, names: list[str] | None) -> list[Node] | None:
    return None if names is None else [node for node in pipeline.nodes() if node.name in names]
