"""How does a saved pipeline score an archive? Workers write one file of maps per frame.

A frame's file is written by the worker that computed it, whole or not at all, so that no cube and
no map passes through the driver, and what is there need not be computed again.

Where a node changes with every frame (running normalizers, trackers), a frame's maps depend on
the frames before it: all go through one process, in order, and again from the first one when the
job is continued.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ray
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger

from cuvis_dist.errors import DataError
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.session import connect, require_resources, terminable
from cuvis_dist.execution.spread import StatefulNodesError, Tally, make_task, spread
from cuvis_dist.execution.worker import on_worker
from cuvis_dist.runs.record import JobRecord, now, recorded
from cuvis_dist.runs.resume import only_run
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling
from cuvis_dist.scoring.frames import ScoreShard, only_for, score_in_order, tracking
from cuvis_dist.scoring.plan import FINGERPRINT, INDEX, ScorePlan, plan_scores, scores_folder

OnFrames = Callable[[int, int], None]
"""Called with the number of frames done so far, and of those that there are to do."""


def score_archive(
    trainrun: TrainRun,
    split: str = "predict",
    outputs: str | None = None,
    scaling: Scaling | None = None,
    on_frames: OnFrames | None = None,
    verbose: bool = False,
    restart: bool = False,
) -> JobRecord:
    """Write ``<output_dir>/scores/<recording>/<index>.npz`` for each frame of a split.

    A file has one array per output, named ``<node>.<port>``, as the node computes it for a batch
    of one frame, without the axis of the batch (``[H, W, 1]`` float32 scores, bool decisions),
    and the frame's ``uid``. It is not compressed: that saved a third of a score map's size and
    took 30 times as long. ``scores/frames.csv`` says which file belongs to which frame.

    Frames whose file is there are left as they are. Options are those of :func:`plan_scores`;
    ``on_error`` and ``max_skipped`` of ``scaling`` say what happens to frames that cannot be used.

    Returns
    -------
    JobRecord
        As in ``<output_dir>/result.json``: ``frames`` listed, ``written``, ``there`` before, and
        ``skipped`` with reasons, by uid.

    Raises
    ------
    CuvisDistError
        With a message for people; ``result.json`` then says ``failed``, and finished files stay.
    """
    with only_run(scores_folder(trainrun)):
        return _score_alone(
            trainrun,
            split,
            outputs,
            scaling or Scaling(),
            on_frames or (lambda done, total: None),
            verbose,
            restart,
        )


def _score_alone(
    trainrun: TrainRun,
    split: str,
    outputs: str | None,
    scaling: Scaling,
    on_frames: OnFrames,
    verbose: bool,
    restart: bool,
) -> JobRecord:
    started = time.perf_counter()
    values = {"pipeline": trainrun.config.pipeline, "split": split}
    record = JobRecord("score", trainrun.output, values)
    record.begin()
    with recorded(record), terminable():
        plan = plan_scores(trainrun, split, outputs, scaling, restart)
        for file in plan.leftover:
            plan.folder.remove(file)
        content = json.dumps(plan.fingerprint, indent=2) + "\n"
        plan.folder.write(FINGERPRINT, content.encode())
        tally = Tally(len(plan.todo), scaling.measuring.max_skipped)
        record.values |= {
            "scores": str(plan.folder),
            "outputs": [".".join(port) for port in plan.outputs],
            "frames": len(plan.archive),
            "there": len(plan.archive) - len(plan.todo),
        }
        try:
            if plan.todo:
                with terminable():  # Ray sets a handler of its own
                    connect(scaling, verbose)
                    require_resources(scaling, training=False)
                _compute(trainrun.pipeline, plan, scaling, tally, on_frames)
        finally:
            record.values |= {"written": tally.frames, "skipped": tally.skipped}
            record.values["seconds"] = round(time.perf_counter() - started, 3)
        _check(plan, tally)
        _write_index(plan, tally.skipped)
        record.status, record.exit_code, record.finished = "done", 0, now()
        record.write()
    return record


def _write_index(plan: ScorePlan, skipped: dict[str, str]) -> None:
    """Say which file belongs to which frame."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["uid", "recording", "file"])
    for frame, file in zip(plan.archive.frames, plan.files, strict=True):
        table.writerow([frame.uid, frame.recording, "" if frame.uid in skipped else file])
    plan.folder.write(INDEX, text.getvalue().encode())


def _check(plan: ScorePlan, tally: Tally) -> None:
    """Raise DataError unless every frame was skipped or has its file."""
    there = set(plan.folder.names())
    frames = zip(plan.archive.frames, plan.files, strict=True)
    lost = [f"{frame}" for frame, file in frames if file not in there]
    if tally.done != tally.listed or len(lost) != len(tally.skipped):
        raise DataError(
            f"of {tally.listed} frames {tally.frames} were written and {len(tally.skipped)} "
            f"skipped, but {len(lost)} have no file in {plan.folder}"
            f"{': ' if lost else ''}{', '.join(lost[:3])}"
        )


def _compute(
    pipeline: CuvisPipeline, plan: ScorePlan, scaling: Scaling, tally: Tally, on_frames: OnFrames
) -> None:
    """Let the workers write what is missing: side by side, or in order where that matters."""
    only_for(pipeline, plan.outputs)
    reason = tracking(pipeline)
    if reason is None:
        some = plan.archive.only(plan.todo)
        files = [plan.files[i] for i in plan.todo]
        job = ScoreShard(
            make_task(pipeline, some, scaling), ray.put(files), plan.folder, plan.outputs
        )
        try:
            with raise_cause("scoring"):
                for row in spread(some.shards(scaling.measuring.shard_frames), job, scaling):
                    tally.add(row)
                    on_frames(tally.done, len(plan.todo))
            return
        except StatefulNodesError as error:
            reason = str(error)
    logger.warning(
        f"{reason} changes with every frame: all frames are computed in order, in one process"
    )
    todo = set(plan.todo)
    files = [file if i in todo else "" for i, file in enumerate(plan.files)]
    task = replace(make_task(pipeline, plan.archive, scaling), elsewhere=False)
    tally.clear()

    def deliver(done: Any) -> None:
        on_frames(done, len(plan.archive))

    row = on_worker(
        score_in_order,
        ScoreShard(task, ray.put(files), plan.folder, plan.outputs, carries_state=True),
        len(plan.archive),
        scaling.measuring.max_skipped,
        emit=deliver,
        cpus=scaling.resources.cpus_per_worker,
        gpus=scaling.measuring.gpus,
        retries=3,
    )
    tally.add(row)
