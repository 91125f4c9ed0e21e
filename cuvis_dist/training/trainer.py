"""How does the driver train the unfrozen nodes on many workers, and what comes of it?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

import pytorch_lightning as pl
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training import GradientTrainer as UpstreamGradientTrainer
from cuvis_ai_core.training.config import TrainingConfig
from cuvis_ai_core.training.post_fit import (
    CheckpointRestored,
    EmitFn,
    PostFitCallback,
    PostFitResult,
    TrainEvent,
    TrainHook,
    log_event,
)
from loguru import logger
from pytorch_lightning.callbacks import ModelCheckpoint

from cuvis_dist.archive.frame_cache import frame_cache
from cuvis_dist.errors import DataError, InputError, LostWorkerError
from cuvis_dist.evaluation.seen import Seen
from cuvis_dist.evaluation.steps import AfterFit, Evaluator
from cuvis_dist.execution.asked import trains_here
from cuvis_dist.nodes.state import adopt_all
from cuvis_dist.nodes.survey import outline
from cuvis_dist.plain import NotPlainError
from cuvis_dist.scaling import Scaling
from cuvis_dist.staging import portable
from cuvis_dist.storage import Location, OutputFolder, is_uri, location_of, mirror_of
from cuvis_dist.training.agreement import described, in_words
from cuvis_dist.training.alone import train_here
from cuvis_dist.training.assignment import Assignment, Outcome, TrainerParts
from cuvis_dist.training.checkpoint import LAST, reached
from cuvis_dist.training.configuration import check_training, say_devices


class GradientTrainer(UpstreamGradientTrainer):
    """Upstream's gradient trainer, run as DDP workers under Ray Train.

    ``batch_size`` of the data module stays the global batch size, for any number of workers:
    a step's gradient is the one that a single process would have computed.

    Parameters
    ----------
    pipeline, datamodule, loss_nodes, metric_nodes, training_config, monitors, callbacks
        These are upstream's. Copies of callbacks and monitors run on the workers: what a
        callback's ``state_dict`` has comes back, other attributes of either do not. A
        ``PostFitCallback`` among them gives its ``emit`` and ``metric_nodes`` to the post-fit
        steps, which follow after the training workers have ended.
    emit : callable, optional
        Where the events of epochs and post-fit steps go; the log by default.
    scaling : Scaling, optional
        The settings of the workers; the defaults train in one process on this machine.
    output_dir : path or URI
        Where checkpoints and logs go when the training configuration does not say: a folder that
        all nodes see, or a URI of any file system of ``pyarrow.fs`` (``s3://bucket/runs/x``).

    Attributes
    ----------
    outcome : PostFitResult or None
        Restored checkpoint, calibration and evaluations of the last :meth:`fit`.
    epochs : int
        Epochs that the last :meth:`fit` completed.
    nodes : dict of str to str
        How each node took part in a training step of the last :meth:`fit`, by name: per frame, as
        a mean or jointly, and why.
    seen : dict of str to Seen, or None
        Set to a dictionary, it gets what people can look at of each split that :meth:`fit`
        evaluates.

    Examples
    --------
    >>> pipeline.unfreeze_nodes_by_name(["selector", "rx_detector"])
    >>> trainer = GradientTrainer(pipeline, datamodule, [bce], [metrics],
    ...                           training_config=config,
    ...                           scaling=Scaling(resources={"train_workers": 2}))
    >>> trainer.fit()
    """

    def __init__(
        self,
        pipeline: CuvisPipeline,
        datamodule: pl.LightningDataModule,
        loss_nodes: list[Node],
        metric_nodes: list[Node] | None = None,
        training_config: TrainingConfig | None = None,
        monitors: list | None = None,
        callbacks: list | None = None,
        *,
        emit: EmitFn | None = None,
        scaling: Scaling | None = None,
        output_dir: Location = "outputs",
    ) -> None:
        super().__init__(
            pipeline, datamodule, loss_nodes, metric_nodes, training_config, monitors, callbacks
        )
        self.emit: EmitFn = emit or log_event
        self.scaling = scaling or Scaling()
        self.output = OutputFolder(output_dir)
        self.outcome: PostFitResult | None = None
        self.epochs = 0
        self.nodes: dict[str, str] = {}
        self.seen: dict[str, Seen] | None = None
        self._best: CheckpointRestored | None = None

    def fit(self, *, resume: bool = False) -> None:
        """Train, restore the best checkpoint, calibrate, evaluate val and test.

        A lost worker is replaced, ``resources.max_failures`` times at most, and training goes on
        after the last step whose state was kept: ``<output_dir>/resume/last.ckpt``.

        Parameters
        ----------
        resume : bool
            Go on where an earlier fit of the same pipeline in ``output_dir`` was cut off.

        Raises
        ------
        InputError
            If the configuration cannot run on these workers, no node is unfrozen, or the data
            module cannot serve a split that training needs.
        DataError
            If a frame cannot be read; the message names it.
        ClusterError
            If the workers were lost or one is stuck (the message names its rank), or the cluster
            cannot offer what they need.
        """
        check_training(self.training_config, self.scaling)
        say_devices(self.training_config, self.scaling)
        if not any(parameter.requires_grad for parameter in self.pipeline.parameters()):
            raise InputError(
                "nothing to train: no node of the pipeline has unfrozen parameters. Name nodes in "
                "unfreeze_nodes, or call pipeline.unfreeze_nodes_by_name first"
            )
        self.output.probe()
        if not resume or not self._can_go_on():
            self.output.remove(LAST)
        try:
            result = self._fit()
        except DataError as error:
            if self.scaling.measuring.on_error != "skip":
                raise
            raise DataError(
                f"{error}. Training does not skip frames (measuring.on_error is for phase 1 and "
                "scoring): mend the file, or leave the frame out of data.splits, or its recording "
                "(--without); the same command then goes on"
            ) from error
        self.epochs, self._best = result.epochs, result.checkpoint
        self.nodes = outline(self.pipeline, self.loss_nodes) | in_words(result.plans)
        self.emit(TrainEvent(TrainHook.CHECKPOINT_RESTORED, checkpoint=result.checkpoint))
        given = next((c for c in self.callbacks if isinstance(c, PostFitCallback)), None)
        emit = given.emit if given else self.emit
        evaluator = Evaluator(self.pipeline, self.datamodule, self.scaling, emit, self.seen)
        evaluated = evaluator.post_fit(
            given.metric_nodes if given else None,
            AfterFit(
                result.epochs,
                result.steps + 1,
                self.training_config.release_cuda_cache_on_validation,
            ),
        )
        self.outcome = PostFitResult(
            result.checkpoint, evaluated.calibration, evaluated.evaluations
        )
        if given:
            given.result = self.outcome

    def validate(self, ckpt_path: str | None = None) -> Sequence[Mapping[str, float]]:
        """Return the metrics of the validation split, evaluated on the workers, each frame once."""
        return self._run("validate", ckpt_path).metrics

    def test(self, ckpt_path: str | None = "best") -> Sequence[Mapping[str, float]]:
        """Return the metrics of the test split, evaluated on the workers, each frame once.

        ``"best"`` is the best checkpoint of this trainer's :meth:`fit`, or the current state of
        the pipeline where there is none.
        """
        if ckpt_path == "best":
            ckpt_path = self._best.path if self._best and self._best.restored else None
        return self._run("test", ckpt_path).metrics

    def _can_go_on(self) -> bool:
        """Whether what an earlier fit left can be used, if it left anything."""
        try:
            with mirror_of(self.output) as mirror:
                reached(mirror.pull(LAST))
        except NotPlainError as error:
            logger.warning(
                f"training begins with its first epoch: {self.output.at(LAST)} is not used: {error}"
            )
            return False
        return True

    def _fit(self) -> Outcome:
        """Train; after a loss of workers, go on from the last state that was kept.

        Raises
        ------
        LostWorkerError
            If workers were lost more often than ``resources.max_failures``.
        """
        for failure in count(1):
            try:
                return self._run("fit")
            except LostWorkerError as error:
                if failure > self.scaling.resources.max_failures:
                    raise
                with mirror_of(self.output) as mirror:
                    where = reached(mirror.pull(LAST))
                logger.warning(
                    f"{error}. Training goes on {where} (failure {failure}, at most "
                    f"{self.scaling.resources.max_failures})"
                )
        raise AssertionError

    def _run(self, verb: str, checkpoint: str | None = None) -> Outcome:
        """Let workers, or this process, carry out ``verb``, and take over the nodes' state."""
        what = "training" if verb == "fit" else verb
        if verb != "fit" and self.outcome is None:
            logger.warning(
                f"{verb} without a fit() of this trainer: the pipeline is evaluated as it is, and "
                "must have been trained, or loaded, before"
            )
        parts = self._parts()
        cache = frame_cache(
            self.datamodule, self.scaling.reading.cache, self.scaling.reading.cache_bytes
        )
        decoded = cache.of("train").decoded() if cache else {}
        assignment = Assignment(verb, checkpoint, parts, self.output, self.scaling, cache, decoded)
        if trains_here(self.scaling):
            outcome = train_here(assignment, what, self.emit)
        else:  # what it needs of Ray takes seconds to import
            from cuvis_dist.training.group import train_on_workers

            outcome = train_on_workers(assignment, what, self.emit)
        for note in outcome.notes:
            logger.warning(note)
        for line in described(outcome.plans):
            logger.info(line)
        adopt_all(self.pipeline, outcome.nodes)
        for callback, state in zip(parts.callbacks, outcome.callback_states, strict=True):
            if isinstance(callback, ModelCheckpoint):  # else it would take over less of it
                callback.dirpath = state["dirpath"]
            callback.load_state_dict(state)
        return outcome

    def _parts(self) -> TrainerParts:
        """Return what the ranks make their trainers of, with checkpoints where they belong."""
        for callback in self.callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is not None:
                callback.dirpath = self._checkpoint_folder(str(callback.dirpath))
        return TrainerParts(
            pipeline=self.pipeline,
            datamodule=portable(self.datamodule),
            loss_nodes=[node.name for node in self.loss_nodes],
            metric_nodes=[node.name for node in self.metric_nodes],
            config=self._with_absolute_paths(),
            monitors=self.monitors,
            callbacks=[c for c in self.callbacks if not isinstance(c, PostFitCallback)],
        )

    def _with_absolute_paths(self) -> TrainingConfig:
        """Return the training configuration with the checkpoint folder resolved on this machine.

        A worker has a working directory of its own.
        """
        config = self.training_config.model_copy(deep=True)
        if config.default_root_dir is not None:
            config.default_root_dir = str(location_of(config.default_root_dir))
        if config.callbacks is not None and config.callbacks.checkpoint is not None:
            checkpoint = config.callbacks.checkpoint
            said = "dirpath" in checkpoint.model_fields_set  # else it is the schema's default
            folder = checkpoint.dirpath if said else str(self.output.at("checkpoints"))
            checkpoint.dirpath = self._checkpoint_folder(folder)
        return config

    def _checkpoint_folder(self, folder: str) -> str:
        """Return where a checkpoint folder lies.

        A relative one is meant from the working directory here, or below an output folder that is
        a URI.

        Raises
        ------
        InputError
            If it would be on one node's disk, while the output folder is a URI.
        """
        if self.output.local is not None:
            return str(Path(folder).resolve())
        if self.output.name_of(folder) is not None:
            return folder
        path, here = Path(folder).resolve(), Path.cwd()
        if is_uri(folder) or path == here or not path.is_relative_to(here):
            raise InputError(
                f"checkpoints go to {folder}, which is not below the output folder {self.output}: "
                "give a relative dirpath, which is meant from there"
            )
        return str(self.output.at(path.relative_to(here).as_posix()))
