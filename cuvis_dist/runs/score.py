"""How does a saved pipeline score an archive, as a job?"""

from __future__ import annotations

import json
import time

from cuvis_dist.execution.session import connect, require_resources, terminable
from cuvis_dist.execution.tally import Tally
from cuvis_dist.runs.record import JobRecord, now, recorded
from cuvis_dist.runs.resume import only_run
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling
from cuvis_dist.scoring.plan import FINGERPRINT, plan_scores, scores_folder
from cuvis_dist.scoring.scores import OnFrames, check_scores, compute_scores, write_index


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
                compute_scores(trainrun.pipeline, plan, scaling, tally, on_frames)
        finally:
            record.values |= {"written": tally.frames, "skipped": tally.skipped}
            record.values["seconds"] = round(time.perf_counter() - started, 3)
        check_scores(plan, tally)
        write_index(plan, tally.skipped)
        record.status, record.exit_code, record.finished = "done", 0, now()
        record.write()
    return record
