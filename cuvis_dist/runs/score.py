"""How does a saved pipeline score a split of a trainrun's data?"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

from cuvis_dist.archive import open_archive, write_contents
from cuvis_dist.execution.tally import Tally
from cuvis_dist.execution.where import work_on
from cuvis_dist.hashing import hash_files, hash_settings
from cuvis_dist.runs.job import Job, job
from cuvis_dist.runs.record import ScoreRecord
from cuvis_dist.runs.room import require_room_for_copies, require_room_for_scores
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling
from cuvis_dist.scoring.plan import FINGERPRINT, READ, ScorePlan, plan_scores, ports, scores_folder
from cuvis_dist.scoring.scores import OnFrames, check_scores, compute_scores, write_index
from cuvis_dist.waiting import announce


@dataclass(frozen=True)
class Scoring:
    """Which maps of which frames a saved pipeline computes.

    Attributes
    ----------
    trainrun : TrainRun
        From ``load_trainrun(..., saved=...)``.
    split : str
        ``train``, ``val``, ``test`` or ``predict``: all frames, unless the splits say otherwise.
    outputs : str or None
        Ports to write, as ``node.port,node.port``; by default see
        :func:`~cuvis_dist.scoring.plan.ports`.
    scaling : Scaling
        Workers; ``on_error`` and ``max_skipped`` say what happens to frames that cannot be used.
    """

    trainrun: TrainRun
    split: str = "predict"
    outputs: str | None = None
    scaling: Scaling = field(default_factory=Scaling)

    def plan(self, restart: bool = False) -> ScorePlan:
        """Find out what is to be written; writes nothing, and reads no frame unless it verifies.

        Parameters
        ----------
        restart : bool
            Count nothing as there.

        Raises
        ------
        InputError
            If the data module cannot be set up, an output does not exist, or the folder holds the
            scores of something else.
        """
        trainrun = self.trainrun
        named = ports(trainrun.pipeline, self.outputs)
        archive = open_archive(trainrun.datamodule(self.scaling, fitting=False), self.split)
        data = trainrun.config.data.model_dump(mode="json", include={"data_module", "params"})
        assert trainrun.weights is not None
        depends_on = {
            "pipeline": hash_files(Path(trainrun.config.pipeline), trainrun.weights),
            "data": hash_settings(data),
            "device": hash_settings("gpu" if self.scaling.measuring.gpus else "cpu"),
        }
        folder, verify = scores_folder(trainrun.output), self.scaling.reading.verify
        return plan_scores(archive, named, folder, depends_on, restart, verify)

    def run(
        self, on_frames: OnFrames | None = None, verbose: bool = False, restart: bool = False
    ) -> ScoreRecord:
        """Write ``<output_dir>/scores/<recording>/<index>.npz`` for each frame of the split.

        A file has one array per output, named ``<node>.<port>``, as the node computes it for a
        batch of one frame, without the axis of the batch (``[H, W, 1]`` float32 scores, bool
        decisions), and the frame's ``uid``. It is not compressed: that saved a third of a score
        map's size and took 30 times as long. ``scores/frames.csv`` says which file belongs to
        which frame.

        Frames whose file is there are left as they are, unless they have changed since.

        Parameters
        ----------
        on_frames : callable, optional
            Called with the number of frames done so far, and of those that there are to do.
        verbose : bool
            Show Ray's logs.
        restart : bool
            Replace what is there, whatever it is of.

        Returns
        -------
        ScoreRecord
            As in ``<output_dir>/result.json``.

        Raises
        ------
        CuvisDistError
            With a message for people; ``result.json`` then says ``failed``, and finished files
            stay.
        """
        trainrun, started = self.trainrun, time.perf_counter()
        record = ScoreRecord(
            output_dir=str(trainrun.output),
            pipeline=str(trainrun.config.pipeline),
            split=self.split,
        )
        locked = scores_folder(trainrun.output)
        with job(record, self.scaling, verbose, locked) as entered:
            entered.begin()
            plan = self.plan(restart)
            for file in plan.leftover:
                plan.folder.remove(file)
            content = json.dumps(plan.fingerprint, indent=2) + "\n"
            plan.folder.write(READ, write_contents({"frames": plan.contents}))
            plan.folder.write(FINGERPRINT, content.encode())
            tally = Tally(len(plan.todo), self.scaling.measuring.max_skipped)
            record.scores = str(plan.folder)
            record.outputs = [".".join(port) for port in plan.outputs]
            record.frames = len(plan.archive)
            record.there = len(plan.archive) - len(plan.todo)
            try:
                self._compute(plan, tally, entered, on_frames or (lambda done, total: None))
            finally:
                record.written, record.skipped = tally.frames, tally.skipped
                record.seconds = round(time.perf_counter() - started, 3)
            check_scores(plan, tally)
            write_index(plan, tally.skipped)
            entered.done()
        return record

    def _compute(self, plan: ScorePlan, tally: Tally, entered: Job, on_frames: OnFrames) -> None:
        if not plan.todo:
            return
        pipeline, missing = self.trainrun.pipeline, plan.archive.only(plan.todo)
        require_room_for_scores(self.trainrun, plan)
        require_room_for_copies(plan.contents, self.scaling)
        entered.connect(training=False, work=lambda: work_on(missing, pipeline))
        announce(f"scoring the first of {len(plan.todo)} frames")
        compute_scores(pipeline, plan, entered.scaling, tally, on_frames)
