"""How does one trainrun become a saved pipeline? Both phases, as ``restore-trainrun`` does them.

Everything around them is upstream's; only the two trainers are ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytorch_lightning as pl
from cuvis_ai_core.training.config import create_callbacks_from_config
from cuvis_ai_core.training.post_fit import EmitFn, PostFitCallback, PostFitResult, log_event
from loguru import logger

from cuvis_dist.errors import DataError
from cuvis_dist.evaluation import failed_split, post_fit
from cuvis_dist.execution.session import connect, require_resources, terminable
from cuvis_dist.hashing import hash_files
from cuvis_dist.initialization import StatisticalTrainer, statistical_nodes
from cuvis_dist.nodes.state import adopt_all, hash_state
from cuvis_dist.runs.record import RunRecord, now, recorded, save_pipeline
from cuvis_dist.runs.resume import Resume, fingerprint, only_run
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling
from cuvis_dist.training import GradientTrainer, check_training


def run_trainrun(
    trainrun: TrainRun,
    scaling: Scaling | None = None,
    emit: EmitFn | None = None,
    verbose: bool = False,
    restart: bool = False,
) -> RunRecord:
    """Run both phases of a trainrun, or the one that is left of it, and save the pipeline.

    Without a ``training`` block that is the first, after :meth:`TrainRun.training_only` the
    second.

    A run of the same trainrun that was cut off in the same ``output_dir`` is continued: phase 1
    goes on in the middle of a pass, and phase 2 after its last finished epoch. One
    that is done is left as it is.

    Parameters
    ----------
    trainrun : TrainRun
        From :func:`load_trainrun`.
    scaling : Scaling, optional
        Workers, and what is measured.
    emit : callable, optional
        Where the events of both phases go; the log by default.
    restart : bool
        Run from the beginning, whatever an earlier run left.

    Returns
    -------
    RunRecord
        As in ``<output_dir>/run.json``.

    Raises
    ------
    CuvisDistError
        With a message for people; ``run.json`` then says ``failed``, and an earlier saved
        pipeline is still in place.
    """
    with only_run(trainrun.output):
        return _run_alone(trainrun, scaling or Scaling(), emit or log_event, verbose, restart)


def _run_alone(
    trainrun: TrainRun, scaling: Scaling, emit: EmitFn, verbose: bool, restart: bool
) -> RunRecord:
    record = RunRecord(
        str(trainrun.path),
        trainrun.config.name,
        str(trainrun.output_dir),
        job=trainrun.job,
        weights=str(trainrun.weights) if trainrun.weights else None,
        scaling=scaling.model_dump(mode="json"),
    )
    trainrun.output.probe()
    with recorded(record), terminable():
        if trainrun.config.training is not None:
            trainrun.check_trainable()
            check_training(trainrun.config.training, scaling)
        datamodule = trainrun.datamodule(scaling)
        parts = fingerprint(trainrun.config, trainrun.pipeline, datamodule, scaling)
        parts["job"] = trainrun.job
        if trainrun.weights is not None:
            parts["weights"] = hash_files(trainrun.weights)
        resume = Resume(trainrun.output_dir, parts, restart)
    if finished := resume.finished():
        logger.warning(
            f"this run is done since {finished.finished}, its result is in {finished.pipeline}; "
            "--restart runs it again"
        )
        finished.write()  # result.json is that of the last job in this folder
        return finished
    resume.begin()
    record.write()
    with recorded(record), terminable():
        _run(trainrun, datamodule, scaling, record, resume, emit, verbose)
        record.status, record.exit_code, record.finished = "done", 0, now()
        record.write()
    resume.finish()
    return record


def _run(
    trainrun: TrainRun,
    datamodule: pl.LightningDataModule,
    scaling: Scaling,
    record: RunRecord,
    resume: Resume,
    emit: EmitFn,
    verbose: bool,
) -> None:
    pipeline, config = trainrun.pipeline, trainrun.config
    with _timed(record, "start"), terminable():  # Ray sets a handler of its own
        connect(scaling, verbose)
        if config.training is not None:
            require_resources(scaling)

    metric_nodes = trainrun.metric_nodes or None
    if earlier := resume.load_initialized():
        logger.warning(f"phase 1 was finished before: its result in {resume.folder} is used")
        adopt_all(pipeline, earlier["nodes"])
        record.passes, record.skipped_frames = earlier["passes"], earlier["skipped_frames"]
        record.findings = earlier["findings"]
    elif trainrun.weights is not None:
        logger.info(f"phase 1 is left out: its result is that of {trainrun.weights}")
    elif statistical_nodes(pipeline):
        with _timed(record, "initialization"):
            trainer = StatisticalTrainer(
                pipeline,
                datamodule,
                metric_nodes=metric_nodes,
                emit=emit,
                scaling=scaling,
                output_dir=trainrun.output_dir,
            )
            try:
                trainer.fit(resume=True)  # what is there is this run's: see Resume
            finally:
                record.passes = trainer.records
                record.skipped_frames = {
                    uid: reason for done in trainer.records for uid, reason in done.skipped.items()
                }
            record.findings = trainer.diagnose()
        resume.save_initialized(
            nodes=list(pipeline.nodes()),
            passes=record.passes,
            skipped_frames=record.skipped_frames,
            findings=record.findings,
        )

    record.initialized = hash_state(pipeline.nodes())

    if config.training is None:
        with _timed(record, "evaluation"):
            result = post_fit(
                pipeline, datamodule, metric_nodes=metric_nodes, emit=emit, scaling=scaling
            )
    else:
        with _timed(record, "training"):
            result = _train(trainrun, datamodule, scaling, record, emit)
    _record_post_fit(record, result)

    record.pipeline = str(save_pipeline(pipeline, trainrun.output, trainrun.result_name))
    if failure := failed_split(result):
        raise DataError(f"the pipeline was saved to {record.pipeline}, but {failure}")


def _train(
    trainrun: TrainRun,
    datamodule: pl.LightningDataModule,
    scaling: Scaling,
    record: RunRecord,
    emit: EmitFn,
) -> PostFitResult:
    config, pipeline = trainrun.config, trainrun.pipeline
    training = config.training
    assert training is not None
    if training.callbacks and training.callbacks.checkpoint:
        local = trainrun.output.local or Path()  # relative ones are meant below a URI
        training.callbacks.checkpoint.dirpath = str(local / "checkpoints")
    pipeline.unfreeze_nodes_by_name(config.unfreeze_nodes)
    trainer = GradientTrainer(
        pipeline,
        datamodule,
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        training,
        callbacks=[
            PostFitCallback(emit=emit, metric_nodes=trainrun.metric_nodes or None),
            *create_callbacks_from_config(training.callbacks),
        ],
        emit=emit,
        scaling=scaling,
        output_dir=trainrun.output_dir,
    )
    trainer.fit(resume=True)  # what is there is this run's: see Resume
    record.epochs = trainer.epochs
    assert trainer.outcome is not None
    return trainer.outcome


def _record_post_fit(record: RunRecord, result: PostFitResult) -> None:
    record.checkpoint, record.calibration = result.checkpoint, result.calibration
    for split, outcome in result.evaluations.items():
        if outcome.metrics:
            record.metrics[split] = outcome.metrics


@contextmanager
def _timed(record: RunRecord, phase: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        record.seconds[phase] = round(time.perf_counter() - started, 3)
