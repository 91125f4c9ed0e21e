"""How good is a saved pipeline on a split of a trainrun's data?"""

from __future__ import annotations

import time

from cuvis_ai_core.training.evaluation import default_metric_nodes
from cuvis_ai_core.training.post_fit import EmitFn, log_event
from cuvis_ai_schemas.enums import ExecutionStage
from loguru import logger

from cuvis_dist.errors import InputError
from cuvis_dist.evaluation.steps import Evaluator
from cuvis_dist.execution.where import work_on_splits
from cuvis_dist.runs.job import job
from cuvis_dist.runs.record import EvaluateRecord
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling


def evaluate_saved(
    trainrun: TrainRun,
    split: str = "test",
    scaling: Scaling | None = None,
    emit: EmitFn | None = None,
    verbose: bool = False,
) -> EvaluateRecord:
    """Evaluate a saved pipeline on ``val`` or ``test``; nothing is fitted or calibrated.

    Parameters
    ----------
    trainrun : TrainRun
        From ``load_trainrun(..., saved=...)``. Its metric nodes are used, or all that the
        pipeline has where it names none.
    split : str
        ``val`` or ``test``.

    Returns
    -------
    EvaluateRecord
        As in ``<output_dir>/result.json``.

    Raises
    ------
    CuvisDistError
        With a message for people; ``result.json`` then says ``failed``.
    """
    scaling, started = scaling or Scaling(), time.perf_counter()
    pipeline = trainrun.pipeline
    record = EvaluateRecord(
        output_dir=str(trainrun.output), pipeline=str(trainrun.config.pipeline), split=split
    )
    with job(record, scaling, verbose) as entered:
        entered.begin()
        nodes = trainrun.metric_nodes or default_metric_nodes(pipeline)
        if not nodes:
            raise InputError(f"the pipeline {pipeline.name} has no metric node: nothing to report")
        datamodule = trainrun.datamodule(scaling, fitting=False)
        on_gpus = scaling.resources.train_gpus > 0
        entered.connect(on_gpus, lambda: work_on_splits(datamodule, pipeline, {split: 1}))
        evaluator = Evaluator(pipeline, datamodule, entered.scaling, emit or log_event)
        summary = evaluator.evaluate(ExecutionStage(split), nodes)
        logger.info(f"evaluated {summary.frames} frames of {split}")
        record.frames, record.metrics = summary.frames, {split: dict(summary.metrics)}
        record.seconds = round(time.perf_counter() - started, 3)
        entered.done()
    return record
