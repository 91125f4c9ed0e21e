"""How does one trainrun become a saved pipeline? Both phases, as ``restore-trainrun`` does them.

Everything around them is upstream's; only the two trainers are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
from cuvis_ai_core.training.config import TrainingConfig, create_callbacks_from_config
from cuvis_ai_core.training.post_fit import EmitFn, PostFitCallback, PostFitResult, log_event
from loguru import logger
from pytorch_lightning.utilities.seed import isolate_rng

from cuvis_dist.archive import Contents, open_archive, open_split
from cuvis_dist.errors import CuvisDistError, DataError
from cuvis_dist.evaluation.steps import Evaluator, failed_split
from cuvis_dist.execution.asked import trains_here
from cuvis_dist.execution.session import has_room_for_both
from cuvis_dist.execution.where import Work, work_on_splits
from cuvis_dist.hashing import hash_settings
from cuvis_dist.initialization.card import built
from cuvis_dist.initialization.diagnosis import Finding
from cuvis_dist.initialization.passes import PassRecord
from cuvis_dist.initialization.plan import statistical_nodes
from cuvis_dist.initialization.served import frames_read
from cuvis_dist.initialization.trainer import StatisticalTrainer
from cuvis_dist.nodes.state import hash_state, hash_tensors
from cuvis_dist.nodes.survey import outline
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.nodes.written import Unwritten, read_all
from cuvis_dist.plain import NotPlainError
from cuvis_dist.report.noting import Notebook
from cuvis_dist.report.writing import report_on
from cuvis_dist.runs.dependences import TRAINING, depends_on
from cuvis_dist.runs.initialized import save_phase_1
from cuvis_dist.runs.job import Job, job
from cuvis_dist.runs.record import RunRecord, save_pipeline
from cuvis_dist.runs.resume import Resume
from cuvis_dist.runs.room import require_room_for_copies, require_room_for_run
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling
from cuvis_dist.training.configuration import check_batches, check_training
from cuvis_dist.training.monitoring import check_monitored, measuring_nodes
from cuvis_dist.training.trainer import GradientTrainer
from cuvis_dist.waiting import announce

#: Training workers start beside a phase 1 that one process would end in so many seconds.
_SHORT_SECONDS = 60.0


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
    goes on in the middle of a pass, and phase 2 in that of an epoch. One that is done is left as
    it is. Of a run that depended on something else, phase 1 is used if it
    did not (:mod:`cuvis_dist.runs.dependences`).

    Parameters
    ----------
    trainrun : TrainRun
        From :func:`load_trainrun`. Its pipeline is fitted and trained; its configuration stays
        as it is.
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
    scaling = scaling or Scaling()
    record = RunRecord(
        job=trainrun.job,
        output_dir=str(trainrun.output),
        trainrun=str(trainrun.path),
        name=trainrun.config.name,
        initialization=trainrun.initialization,
        without=[*trainrun.without],
        scaling=scaling.model_dump(mode="json"),
    )
    with job(record, scaling, verbose, locked=trainrun.output) as entered:
        training = trainrun.config.training
        if training is not None:
            check_phase_2(trainrun, training, scaling)
        announce("setting up the data")
        datamodule = trainrun.datamodule(scaling)
        if training is not None:
            check_splits(datamodule, training)
        resume = Resume(trainrun.output_dir, depends_on(trainrun, datamodule, scaling), restart)
        if finished := resume.finished():
            logger.warning(
                f"this run is done since {finished.finished}, its result is in "
                f"{finished.pipeline}; --restart runs it again"
            )
            entered.record = finished
            finished.write()  # result.json is that of the last job in this folder
            return finished
        resume.begin()
        entered.begin()
        notebook = Notebook(trainrun.output, emit or log_event)
        notebook.begin()
        try:
            _Phases(trainrun, datamodule, entered, resume, notebook).run()
        finally:
            notebook.close()
        with record.timed("report"):
            record.report = report_on(trainrun.output, record.as_done())
        entered.done()
        resume.finish()
    return record


def check_phase_2(trainrun: TrainRun, training: TrainingConfig, scaling: Scaling) -> None:
    """Raise InputError for what phase 2 cannot work with, before phase 1 takes its time."""
    trainrun.check_trainable()
    check_training(training, scaling)
    check_monitored(training, trainrun.config.loss_nodes, measuring_nodes(trainrun.metric_nodes))


def check_splits(datamodule: pl.LightningDataModule, training: TrainingConfig) -> None:
    """Raise InputError for a split that phase 2 cannot use, or does not get, before phase 1."""
    with isolate_rng():
        for split in ("train", "val") if training.limit_val_batches != 0 else ("train",):
            check_batches(training, split, len(open_split(datamodule, split)[0]))


def work_of(trainrun: TrainRun, datamodule: pl.LightningDataModule, scaling: Scaling) -> Work:
    """Return how much a trainrun has to do, training apart: the passes, val twice and test."""
    times, frames = {"val": 2, "test": 1, "train": 0}, 0
    if trainrun.weights is None:
        frames = train_readings(trainrun, datamodule, scaling)
    return work_on_splits(datamodule, trainrun.pipeline, times, frames)


def train_readings(trainrun: TrainRun, datamodule: pl.LightningDataModule, scaling: Scaling) -> int:
    """Return how many frames phase 1 reads, each as often as it is read."""
    with isolate_rng(include_cuda=False):
        try:
            archive = open_archive(datamodule, "train")
        except CuvisDistError:  # whoever needs the split says so
            return 0
    measuring = scaling.measuring
    archive = archive.sampled(
        measuring.sample_frames, measuring.sample_fraction, measuring.sample_seed
    )
    contents = Contents({}) if measuring.store is None else Contents.of(archive.frames)
    return frames_read(trainrun.pipeline, datamodule, archive, contents, measuring)


@dataclass(frozen=True)
class _Phases:
    """What is left to do of a trainrun, from the first phase to the saved pipeline."""

    trainrun: TrainRun
    datamodule: pl.LightningDataModule
    job: Job[RunRecord]
    resume: Resume
    notes: Notebook

    @property
    def _record(self) -> RunRecord:
        return self.job.record

    def run(self) -> None:
        trainrun, record = self.trainrun, self._record
        pipeline, trains = trainrun.pipeline, trainrun.config.training is not None
        as_built = built(pipeline)
        with record.timed("start"):
            require_room_for_run(trainrun)
            for contents in self.resume.depends_on.files.values():
                require_room_for_copies(contents, self.job.scaling)
            work = partial(work_of, trainrun, self.datamodule, self.job.scaling)
            self.job.connect(True if trains else None, work)

        if trainrun.weights is None and self._take_initialized():
            logger.warning(
                f"phase 1 was finished before: its result in {self.resume.folder} is used"
            )
        elif trainrun.weights is not None:
            logger.info(f"phase 1 is left out: its result is that of {trainrun.weights}")
        elif statistical_nodes(pipeline):
            self._start_ranks_early(work)
            self._initialize()
        record.initialized = hash_state(pipeline.nodes())
        self.notes.initialized(pipeline, record.initialized, trains)
        record.nodes = outline(pipeline, trainrun.loss_nodes)

        with record.timed("training" if trains else "evaluation"):
            result = self._train() if trains else self._post_fit()
        record.checkpoint, record.calibration = result.checkpoint, result.calibration
        record.metrics |= {
            split: outcome.metrics
            for split, outcome in result.evaluations.items()
            if outcome.metrics
        }
        if trainrun.job == "init":
            saved = save_phase_1(trainrun, as_built, self.resume.depends_on, record)
        else:
            saved = save_pipeline(pipeline, trainrun.output, trainrun.result_name)
        record.pipeline = str(saved)
        self.notes.finished(pipeline, trains)
        if failure := failed_split(result):
            raise DataError(f"the pipeline was saved to {record.pipeline}, but {failure}")

    def _start_ranks_early(self, work: Callable[[], Work]) -> None:
        """Let training workers start beside phase 1, if the cluster has room and that is short.

        Where it is long, they would occupy memory and GPUs for nothing.
        """
        scaling = self.job.scaling
        trains = self.trainrun.config.training is not None and not trains_here(scaling)
        if trains and has_room_for_both(scaling) and work().seconds < _SHORT_SECONDS:
            from cuvis_dist.training.group import end_early, start_early

            self.job.around.callback(end_early)
            start_early(scaling, self.trainrun.output)

    def _take_initialized(self) -> bool:
        """Take over what an earlier run's phase 1 left; return whether it left anything."""
        record, earlier = self._record, self.resume.load_initialized()
        if earlier is None:
            return False
        try:
            passes = [PassRecord(**each) for each in earlier["passes"]]
            findings = [Finding(**each) for each in earlier["findings"]]
            self._check_beginning(earlier["begun"], earlier["unfitted"])
            read_all(self.trainrun.pipeline.nodes(), earlier["nodes"])
        except (NotPlainError, TypeError, AttributeError) as error:
            self.resume.reject_initialized(error)
            return False
        record.passes, record.findings = passes, findings
        record.skipped_frames = earlier["skipped_frames"]
        record.left_out = earlier["left_out"]
        return True

    def _begun(self) -> str:
        """Return a hash of what says with which weights the nodes begin."""
        parts = self.resume.depends_on.parts[TRAINING]
        return hash_settings([self.trainrun.seed, parts["pipeline"]])

    def _check_beginning(self, begun: str, unfitted: dict[str, str]) -> None:
        """Raise NotPlainError if phase 1 began with other random weights, and they are left."""
        if self.trainrun.seed is None or begun == self._begun():
            return
        now = hash_tensors(self.trainrun.pipeline.nodes())
        if others := [name for name, value in unfitted.items() if now.get(name) != value]:
            raise NotPlainError(
                f"{others[0]} begins with other random values, as training.seed says"
            )

    def _initialize(self) -> None:
        """Carry out phase 1, and keep its result for a run that goes on from there."""
        trainrun, record = self.trainrun, self._record
        fitted = statistical_nodes(trainrun.pipeline)
        nodes = [*{*fitted, *nodes_before(trainrun.pipeline, fitted)}]
        before, begins = Unwritten(nodes), hash_tensors(nodes)
        trainer = StatisticalTrainer(
            trainrun.pipeline,
            self.datamodule,
            metric_nodes=trainrun.metric_nodes or None,
            emit=self.notes.emit,
            scaling=self.job.scaling.replace(reading={"verify": False}),  # Resume has done so
            output_dir=trainrun.output_dir,
        )
        with record.timed("initialization"):
            try:
                trainer.fit(resume=True)  # what is there is this run's: see Resume
            finally:
                record.passes, record.left_out = trainer.records, trainer.left_out
                record.skipped_frames = {
                    uid: reason for done in trainer.records for uid, reason in done.skipped.items()
                }
            record.findings = trainer.diagnose()
        self.notes.measured(trainer, hash_state(trainrun.pipeline.nodes()))
        try:
            states = before.write_all(nodes)
        except NotPlainError as error:
            logger.warning(f"phase 1 is carried out again if the run is interrupted: {error}")
            return
        unfitted = {n: v for n, v in hash_tensors(nodes).items() if begins.get(n) == v}
        self.resume.save_initialized(
            nodes=states,
            begun=self._begun(),
            unfitted=unfitted,
            passes=[asdict(each) for each in record.passes],
            skipped_frames=record.skipped_frames,
            left_out=record.left_out,
            findings=[asdict(each) for each in record.findings],
        )

    def _post_fit(self) -> PostFitResult:
        """Calibrate and evaluate what phase 1 made."""
        pipeline, scaling = self.trainrun.pipeline, self.job.scaling
        evaluator = Evaluator(pipeline, self.datamodule, scaling, self.notes.emit, self.notes.seen)
        return evaluator.post_fit(self.trainrun.metric_nodes or None)

    def _train(self) -> PostFitResult:
        """Carry out phase 2, which ends with calibration and evaluation."""
        trainrun, pipeline = self.trainrun, self.trainrun.pipeline
        assert trainrun.config.training is not None
        training = trainrun.config.training.model_copy(deep=True)
        if training.callbacks and training.callbacks.checkpoint:
            local = trainrun.output.local or Path()  # relative ones are meant below a URI
            training.callbacks.checkpoint.dirpath = str(local / "checkpoints")
        pipeline.unfreeze_nodes_by_name(trainrun.config.unfreeze_nodes)
        trainer = GradientTrainer(
            pipeline,
            self.datamodule,
            trainrun.loss_nodes,
            trainrun.metric_nodes,
            training,
            callbacks=[
                PostFitCallback(emit=self.notes.emit, metric_nodes=trainrun.metric_nodes or None),
                *create_callbacks_from_config(training.callbacks),
            ],
            emit=self.notes.emit,
            scaling=self.job.scaling,
            output_dir=trainrun.output_dir,
        )
        trainer.seen = self.notes.seen
        trainer.fit(resume=True)  # what is there is this run's: see Resume
        self._record.epochs, self._record.nodes = trainer.epochs, trainer.nodes
        assert trainer.outcome is not None
        return trainer.outcome
