"""How do all frames of a plan come to be scored, and is each of them there in the end?

Workers write one file of maps per frame, side by side. Where a node changes with every frame
(running normalizers, trackers), a frame's maps depend on the frames before it: all go through one
process, in order, and again from the first one when the job is continued.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger

from cuvis_dist.errors import DataError
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.pool import Workers
from cuvis_dist.execution.spread import spread
from cuvis_dist.execution.tally import Tally
from cuvis_dist.execution.where import engine_for, in_one_process
from cuvis_dist.nodes.state import StatefulNodesError
from cuvis_dist.scaling import Scaling
from cuvis_dist.scoring.frames import ScoreShard, depending, only_for, score_in_order
from cuvis_dist.scoring.plan import INDEX, ScorePlan

OnFrames = Callable[[int, int], None]
"""Called with the number of frames done so far, and of those that there are to do."""


def compute_scores(
    pipeline: CuvisPipeline, plan: ScorePlan, scaling: Scaling, tally: Tally, on_frames: OnFrames
) -> None:
    """Let the workers write what is missing: side by side, or in order where that matters."""
    only_for(pipeline, plan.outputs)
    reason = depending(pipeline)
    workers, skip = Workers.measuring(scaling), scaling.measuring.on_error == "skip"
    if reason is None:
        some = plan.archive.only(plan.todo)
        try:
            with raise_cause("scoring"), engine_for(workers) as engine:
                order = engine.make_order(pipeline, some, skip)
                files = engine.keep([plan.files[i] for i in plan.todo])
                score = ScoreShard(order, files, plan.folder, plan.outputs)
                for row in spread(some.shards(scaling.measuring.shard_frames), score, engine):
                    tally.add(row)
                    on_frames(tally.done, len(plan.todo))
            return
        except StatefulNodesError as error:
            reason = str(error)
    logger.warning(
        f"{reason} changes with every frame: all frames are computed in order, in one process"
    )
    todo = set(plan.todo)
    engine = engine_for(workers)
    files = engine.keep([file if i in todo else "" for i, file in enumerate(plan.files)])
    # The state of one process goes from frame to frame: no other node is asked.
    order = replace(engine.make_order(pipeline, plan.archive, skip), elsewhere=False)
    tally.clear()

    def deliver(done: Any) -> None:
        on_frames(done, len(plan.archive))

    row = in_one_process(
        score_in_order,
        ScoreShard(order, files, plan.folder, plan.outputs, carries_state=True),
        len(plan.archive),
        scaling.measuring.max_skipped,
        emit=deliver,
        workers=workers,
        retries=scaling.resources.max_failures,
    )
    tally.add(row)


def check_scores(plan: ScorePlan, tally: Tally) -> None:
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


def write_index(plan: ScorePlan, skipped: dict[str, str]) -> None:
    """Say which file belongs to which frame."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["uid", "recording", "file"])
    for frame, file in zip(plan.archive.frames, plan.files, strict=True):
        table.writerow([frame.uid, frame.recording, "" if frame.uid in skipped else file])
    plan.folder.write(INDEX, text.getvalue().encode())
