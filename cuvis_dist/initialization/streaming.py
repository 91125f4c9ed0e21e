"""How is a node fitted that no recipe knows? By its own code, on a stream of its inputs.

Reading and every node before it run on all workers; the node itself runs in one process, which
receives one frame at a time in canonical order (as upstream with ``batch_size: 1`` and no
shuffling). Where a node before it changes its state with every frame, only reading is spread.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import EmitFn, FrameProgress, TrainEvent, TrainHook
from loguru import logger

from cuvis_dist.archive import Archive
from cuvis_dist.errors import CuvisDistError, InputError, LostWorkerError, one_line
from cuvis_dist.execution.pool import Workers
from cuvis_dist.execution.spread import Engine, spread
from cuvis_dist.execution.tally import Tally
from cuvis_dist.execution.where import engine_for, in_one_process
from cuvis_dist.initialization.kept import StoredPass
from cuvis_dist.initialization.measuring import compute_inputs
from cuvis_dist.initialization.passes import PassRecord
from cuvis_dist.initialization.shards import GatherShard
from cuvis_dist.nodes.state import StatefulNodesError, adopt
from cuvis_dist.scaling import Scaling


@dataclass(frozen=True)
class Streamed:
    """A node that was fitted, and how; ``done`` are the frames dealt with."""

    node: Node
    record: PassRecord
    done: int


def require_whole_frames(node: Node, scaling: Scaling) -> None:
    """Raise InputError if only some pixels count: a streamed node reads whole frames."""
    if scaling.measuring.pixels != "all":
        raise InputError(
            f"node {node.name} ({type(node).__name__}) is fitted by its own code on whole frames, "
            f"so that pixels: {scaling.measuring.pixels} cannot be applied to it; use pixels: all"
        )


def stream_pass(
    pipeline: CuvisPipeline,
    archive: Archive,
    node: Node,
    scaling: Scaling,
    emit: EmitFn,
    stored: StoredPass | None = None,
) -> PassRecord:
    """Fit ``node`` on its inputs for every frame of the archive.

    Parameters
    ----------
    stored : StoredPass, optional
        Where to keep the fitted node; one that an earlier run left there is not fitted again.

    Raises
    ------
    InputError
        If only some pixels count: the node's own code reads whole frames.
    DataError
        If a frame cannot be read, or the nodes before cannot use it.
    CuvisDistError
        If the node's own fit failed.
    """
    if stored and stored.earlier:
        earlier: Streamed = stored.earlier
        adopt(node, earlier.node)
        return replace(
            earlier.record, restored_shards=earlier.record.shards, restored_frames=earlier.done
        )
    started = time.perf_counter()
    require_whole_frames(node, scaling)

    def fit(in_order: bool) -> tuple[Node, Tally]:
        arguments = (pipeline, archive, node.name, in_order, scaling)
        for failure in count(1):
            try:
                # The fitting process mostly waits for the readers: it leaves them the CPUs.
                workers = Workers.measuring(scaling)
                return in_one_process(_fit, *arguments, emit=emit, workers=workers, cpus=0)
            except LostWorkerError as error:
                if failure > scaling.resources.max_failures:
                    raise
                logger.warning(f"{error}. It starts anew (failure {failure})")
        raise AssertionError

    try:
        fitted, tally = fit(in_order=False)
    except StatefulNodesError as error:
        logger.info(f"{error} changes with every frame: the nodes before {node.name} run in order")
        fitted, tally = fit(in_order=True)
    adopt(node, fitted)
    record = PassRecord(
        {node.name: {"statistic": "streamed", "pixels": None}},
        tally.frames,
        tally.bytes,
        len(archive.shards(scaling.measuring.shard_frames)),
        time.perf_counter() - started,
        tally.peak,
        tally.skipped,
        repeated=sorted(tally.repeated),
    )
    if stored:
        stored.save(Streamed(fitted, record, tally.done))
    return record


def _fit(
    pipeline: CuvisPipeline,
    archive: Archive,
    name: str,
    in_order: bool,
    scaling: Scaling,
    emit: EmitFn,
) -> tuple[Node, Tally]:
    node = next(n for n in pipeline.nodes() if n.name == name)
    tally = Tally(len(archive), scaling.measuring.max_skipped)

    def stream(engine: Engine) -> Iterator[dict[str, Any]]:
        order = engine.make_order(pipeline, archive, scaling.measuring.on_error == "skip")
        gather = GatherShard(order, None if in_order else name)
        for row in spread(archive.shards(scaling.measuring.shard_frames), gather, engine):
            tally.add(row)
            progress = FrameProgress(tally.done, len(archive))
            emit(TrainEvent(TrainHook.STATISTICAL_PROGRESS, node=name, progress=progress))
            if row.payload is not None:
                frame, data = row.payload
                yield compute_inputs(pipeline, node, data, frame) if in_order else data

    try:
        with engine_for(Workers.measuring(scaling)) as engine:
            node.statistical_initialization(stream(engine))
    except CuvisDistError:
        raise
    except Exception as error:
        raise CuvisDistError(f"node {name} could not be fitted: {one_line(error)}") from error
    return node, tally
