"""How good is a saved pipeline on a split of a trainrun's data?"""

from __future__ import annotations

import time

from cuvis_ai_core.training.evaluation import default_metric_nodes
from cuvis_ai_core.training.post_fit import EmitFn, log_event
from cuvis_ai_schemas.enums import ExecutionStage
from loguru import logger

from cuvis_dist.errors import InputError
from cuvis_dist.evaluation import evaluate
from cuvis_dist.execution.session import connect, require_resources, terminable
from cuvis_dist.runs.record import JobRecord, now, recorded
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling


def evaluate_saved(
    trainrun: TrainRun,
    split: str = "test",
    scaling: Scaling | None = None,
    emit: EmitFn | None = None,
    verbose: bool = False,
) -> JobRecord:
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
    JobRecord
        As in ``<output_dir>/result.json``: ``frames``, and ``metrics`` keyed by split and
        ``<node>/<metric>``.

    Raises
    ------
    CuvisDistError
        With a message for people; ``result.json`` then says ``failed``.
    """
    scaling, started = scaling or Scaling(), time.perf_counter()
    pipeline = trainrun.pipeline
    values = {"pipeline": trainrun.config.pipeline, "split": split}
    record = JobRecord("evaluate", trainrun.output, values)
    record.begin()
    with recorded(record), terminable():
        nodes = trainrun.metric_nodes or default_metric_nodes(pipeline)
        if not nodes:
            raise InputError(f"the pipeline {pipeline.name} has no metric node: nothing to report")
        datamodule = trainrun.datamodule(scaling, fitting=False)
        with terminable():  # Ray sets a handler of its own
            connect(scaling, verbose)
            require_resources(scaling, training=scaling.resources.train_gpus > 0)
        summary = evaluate(
            pipeline,
            datamodule,
            ExecutionStage(split),
            metric_nodes=nodes,
            emit=emit or log_event,
            scaling=scaling,
        )
        logger.info(f"evaluated {summary.frames} frames of {split}")
        record.values |= {"frames": summary.frames, "metrics": {split: summary.metrics}}
        record.values["seconds"] = round(time.perf_counter() - started, 3)
        record.status, record.exit_code, record.finished = "done", 0, now()
        record.write()
    return record
