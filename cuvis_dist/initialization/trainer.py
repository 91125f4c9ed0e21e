"""How does an archive become frozen buffers? The trainer of phase 1."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytorch_lightning as pl
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer
from cuvis_ai_core.training.evaluation import EvaluationSummary, default_metric_nodes
from cuvis_ai_core.training.post_fit import EmitFn, FrameProgress, TrainEvent, TrainHook
from cuvis_ai_schemas.enums import ExecutionStage
from loguru import logger

from cuvis_dist.archive import Archive, Contents, Frame, open_archive
from cuvis_dist.archive.frame_cache import frame_cache
from cuvis_dist.errors import DataError, InputError
from cuvis_dist.evaluation.steps import Evaluator
from cuvis_dist.execution.where import Work, begin, settled, work_on
from cuvis_dist.initialization.card import Source
from cuvis_dist.initialization.diagnosis import Finding, diagnose
from cuvis_dist.initialization.from_store import Filler, measure_stored
from cuvis_dist.initialization.inside import Inside
from cuvis_dist.initialization.kept_pass import KeptPass, identify, renew
from cuvis_dist.initialization.levels import planned
from cuvis_dist.initialization.measured import Outcome
from cuvis_dist.initialization.passes import PassRecord, measure_pass
from cuvis_dist.initialization.plan import Pass, measured_directly, share
from cuvis_dist.initialization.robust import bulk_of, moments_of
from cuvis_dist.initialization.sampling import fit_later
from cuvis_dist.initialization.served import can_be_stored, frames_read, unseen
from cuvis_dist.initialization.stored import StoredPass
from cuvis_dist.initialization.streaming import require_whole_frames, stream_pass
from cuvis_dist.nodes.state import StatefulNodesError
from cuvis_dist.scaling import Scaling
from cuvis_dist.storage import Location, OutputFolder
from cuvis_dist.store import Store


class StatisticalTrainer(UpstreamStatisticalTrainer):
    """Upstream's statistical trainer, with the archive spread over a Ray cluster.

    Parameters
    ----------
    pipeline, datamodule, stop_event, metric_nodes, emit
        As upstream's.
    scaling : Scaling, optional
        Workers, and what is measured; the defaults use this machine.
    output_dir : path or URI
        Where ``fit(resume=True)`` keeps what it has measured.

    Attributes
    ----------
    records : list of PassRecord
        What each pass of the last :meth:`fit` read and fitted.
    left_out : dict of str to str
        Frames that are not of the bulk, by uid, each with how far it is from it: see the setting
        ``measuring.robust``.
    outcomes : list of (Pass, Outcome)
        What those passes measured that were no streams, without pixels.
    frames, contents : sequence of Frame, and Contents
        The frames that it was given, and their files as they were.

    Examples
    --------
    >>> scaling = Scaling(resources={"workers": 4})
    >>> trainer = StatisticalTrainer(pipeline, datamodule, scaling=scaling)
    >>> trainer.fit()
    >>> trainer.validate().metrics
    """

    def __init__(
        self,
        pipeline: CuvisPipeline,
        datamodule: pl.LightningDataModule,
        stop_event: threading.Event | None = None,
        metric_nodes: Sequence[Node] | None = None,
        emit: EmitFn | None = None,
        *,
        scaling: Scaling | None = None,
        output_dir: Location = "outputs",
    ) -> None:
        super().__init__(pipeline, datamodule, stop_event, metric_nodes, emit)
        self.scaling = scaling or Scaling()
        self.output = OutputFolder(output_dir)
        self.records: list[PassRecord] = []
        self.left_out: dict[str, str] = {}
        self.outcomes: list[tuple[Pass, Outcome]] = []
        self.frames: Sequence[Frame] = ()
        self.contents = Contents({})
        self._store: Store | None = None
        self._inside: Inside | None = None

    def fit(self, *, resume: bool = False) -> None:
        """Fit every statistical node of the pipeline on the train split.

        Parameters
        ----------
        resume : bool
            Keep what each pass has measured in ``<output_dir>/resume/passes``, and go on from what
            an earlier such fit of the same pipeline and archive left there. The result has the
            same bits. Otherwise nothing is kept.

        Raises
        ------
        InputError
            If the data module cannot serve the train split, or ``pixels`` cannot be applied to a
            node that is streamed.
        DataError
            If a frame cannot be read or measured, or a file changes meanwhile; the message names
            it.
        ClusterError
            If the cluster cannot be reached, has not what one worker needs, or lost the work.
        TrainingCancelled
            If the stop event was set.
        """
        self.records, self.outcomes, self.left_out = [], [], {}
        self.frames, self.contents, self._inside = (), Contents({}), None
        store = self.scaling.measuring.store
        self._store = None if store is None else Store(store, holds=True)
        plan, scaling = self._planned(), self.scaling  # before anything is read
        if not plan:
            logger.info("No statistical nodes to train")
            return
        archive = self._open().sampled(
            scaling.measuring.sample_frames,
            scaling.measuring.sample_fraction,
            scaling.measuring.sample_seed,
        )
        contents = Contents.of(archive.frames, scaling.reading.verify)
        self.frames, self.contents = archive.frames, contents
        if resume:
            renew(self.output, contents)
        work = partial(self._work, archive)
        self.scaling = settled(scaling, "the fit of phase 1", work)
        begin(self.scaling, training=False)
        if scaling.measuring.robust is not None or scaling.measuring.robust_pixels is not None:
            archive = self._bulk(plan[0], archive)
            contents = contents.only(archive.frames)
            self.frames, self.contents = archive.frames, contents

        outer_owner = self.pipeline.structure_frozen_by
        self.pipeline.freeze_structure("StatisticalTrainer.fit")
        number, found = 0, set[str]()
        try:
            while plan:
                self._raise_if_cancelled()
                number += 1
                this_pass = replace(plan.popleft(), inside=self._inside)
                in_store = self._in_store(this_pass, archive)
                keeps = resume and in_store is None  # a store keeps more
                kept = self._kept(number, this_pass, archive) if keeps else None
                try:
                    further = self._run(this_pass, archive, kept, in_store)
                    plan.extendleft(reversed(further))
                    contents.require_unchanged(archive.frames, f"pass {number}")
                except StatefulNodesError as error:
                    found |= {*error.names}
                    plan = self._planned(found)
        finally:
            if outer_owner is None:
                self.pipeline.unfreeze_structure()
            else:
                self.pipeline.freeze_structure(outer_owner)
        self._raise_if_cancelled()

    def _planned(self, found: Collection[str] = ()) -> deque[Pass]:
        """Return the passes that are left, where ``found`` turned out to change with every frame.

        Raises
        ------
        InputError
            If only some pixels count, and a node has to be streamed.
        """
        done = {name for record in self.records for name in record.nodes}
        fitted = [node for node in self.pipeline.nodes() if node.name in done]
        plan = deque(planned(self.pipeline, self.scaling.measuring, found, fitted))
        behind: dict[tuple[str, ...], list[str]] = {}
        for step in plan:
            if step.streamed is not None:
                require_whole_frames(step.streamed, self.scaling)
            if step.streamed is not None and step.after:
                behind.setdefault(step.after, []).append(step.streamed.name)
        for changing, names in behind.items():
            if not found or {*found} & {*changing}:  # else it was said before
                logger.info(
                    f"{', '.join(changing)} changes with every frame: fitting {', '.join(names)} "
                    "in order"
                )
        return plan

    def _work(self, archive: Archive) -> Work:
        """Return how much there is to do."""
        args = self.pipeline, self.datamodule, archive, self.contents, self.scaling.measuring
        return work_on(archive, self.pipeline, frames_read(*args))

    def _in_store(self, this_pass: Pass, archive: Archive) -> StoredPass | None:
        """Return a pass in the store; None if there is no store that keeps what it measures."""
        done = {name for record in self.records for name in record.nodes}
        measuring = self.scaling.measuring
        if self._store is None or not can_be_stored(this_pass, self.pipeline, done):
            return None
        if hidden := unseen(archive, self.contents):
            logger.warning(
                f"the store {self._store} is not used: the files of {len(hidden)} frames, such "
                f"as {hidden[0]}, cannot be seen from here, so that nobody could tell whether they "
                "have changed"
            )
            return None
        return StoredPass(
            self._store, self.pipeline, self.datamodule, archive, this_pass, measuring
        )

    def _bulk(self, this_pass: Pass, archive: Archive) -> Archive:
        """Return the archive without the frames that are not of its bulk; note whose pixels are."""
        stored = self._in_store(this_pass, archive)
        if stored is None:
            raise InputError(
                "measuring.robust and robust_pixels look for the bulk in what a store has of each "
                "frame: name one (--store FOLDER) that can keep what the first pass measures"
            )
        moments_of(this_pass)  # before anything is read
        filler = Filler(stored, self.pipeline, self.contents, self.scaling, lambda done: None)
        outside, self._inside = bulk_of(filler, self.scaling.measuring)
        for position, words in outside.items():
            frame = archive.frames[position]
            self.left_out[frame.uid] = f"{frame}: {words}"
        if outside:
            logger.info(f"{len(outside)} of {len(archive)} frames are left out of the fit")
        return archive.only([i for i in range(len(archive)) if i not in outside])

    def _kept(self, number: int, this_pass: Pass, archive: Archive) -> KeptPass:
        scaling = self.scaling
        return KeptPass(
            self.output,
            number,
            identify(self.pipeline, archive, this_pass, scaling),
            scaling.resources.save_seconds,
        )

    def _run(
        self,
        this_pass: Pass,
        archive: Archive,
        kept: KeptPass | None,
        in_store: StoredPass | None,
    ) -> list[Pass]:
        """Carry out one pass between the start and end events of its nodes.

        Returns passes that turned out to be needed before the next one of the plan.
        """
        logger.debug(f"Pass over {len(archive)} frames {this_pass}")
        if this_pass.of_frames and archive.batch_size > 1:
            logger.warning(
                f"{', '.join(this_pass.of_frames)}: fitted frame by frame, as with batch_size: 1; "
                f"upstream's bounds would be those of batches of {archive.batch_size} frames"
            )

        def progress(hook: TrainHook, done: int) -> None:
            self._raise_if_cancelled()
            for node in this_pass.nodes:
                frames = FrameProgress(done, len(archive))
                self.emit(TrainEvent(hook, node=node.name, progress=frames))

        done = 0
        if kept and kept.earlier:
            done = kept.earlier["done"]
            logger.warning(
                f"pass {kept.number} goes on: {done} of {len(archive)} frames were read before"
            )
        progress(TrainHook.STATISTICAL_NODE_START, done)
        further: list[Pass] = []
        if this_pass.streamed is not None:
            record = stream_pass(self.pipeline, archive, this_pass, self.scaling, self.emit, kept)
        else:
            measured = partial(progress, TrainHook.STATISTICAL_PROGRESS)
            if in_store is not None:
                filler = Filler(in_store, self.pipeline, self.contents, self.scaling, measured)
                record, left, outcome = measure_stored(filler)
            else:
                record, left, outcome = measure_pass(
                    self.pipeline, archive, this_pass, self.scaling, measured, kept
                )
            self.outcomes.append((this_pass, replace(outcome, probes={}, drawn=None)))
            further = [share([measured_directly(self.pipeline, fit)]) for fit in left]
            if left:
                further += this_pass.later  # a reading each: what they need is not fitted yet
            elif this_pass.later:
                started = time.perf_counter()
                sampled = fit_later(self.pipeline, archive, this_pass, outcome, self.scaling)
                seconds = record.seconds + time.perf_counter() - started
                record = replace(record, nodes=record.nodes | sampled.nodes, seconds=seconds)
                further = sampled.left
        self.records.append(record)
        for name in record.nodes:
            self.emit(TrainEvent(TrainHook.STATISTICAL_NODE_END, node=name))
        return further

    def diagnose(self) -> list[Finding]:
        """Return what looks bad about the last :meth:`fit`; nothing when it looks sound.

        Reads one frame when a band is to be named, for its wavelengths.
        """
        return diagnose(self.pipeline, self.records, self.wavelengths)

    def source(self) -> Source:
        """Return what the last :meth:`fit` was made from, for the card of an initialization."""
        measuring = self.scaling.measuring
        return Source(self.frames, self.contents, self.records, self.diagnose(), measuring)

    def wavelengths(self) -> Any:
        """Return the wavelengths of the first frame, in nm; None where it has none. Reads it."""
        try:
            return self._open().read(0).get("wavelengths")
        except DataError:  # a frame that the fit skipped
            return None

    def _open(self) -> Archive:
        """Return the archive of all frames of the train split."""
        reading = self.scaling.reading
        cache = frame_cache(self.datamodule, reading.cache, reading.cache_bytes)
        return open_archive(self.datamodule, "train", cache)

    def validate(self) -> EvaluationSummary:
        """Evaluate the validation split on the cluster; metrics keyed ``<node>/<metric>``."""
        return self._evaluate_on_cluster(ExecutionStage.VAL)

    def test(self) -> EvaluationSummary:
        """Evaluate the test split on the cluster; metrics keyed ``<node>/<metric>``."""
        return self._evaluate_on_cluster(ExecutionStage.TEST)

    def _evaluate_on_cluster(self, stage: ExecutionStage) -> EvaluationSummary:
        nodes = (
            self.metric_nodes
            if self.metric_nodes is not None
            else default_metric_nodes(self.pipeline)
        )
        evaluator = Evaluator(self.pipeline, self.datamodule, self.scaling, self.emit)
        return evaluator.evaluate(stage, nodes, self.stop_event)
