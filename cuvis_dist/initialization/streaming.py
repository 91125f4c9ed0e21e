"""How is a node fitted that no recipe knows? By its own code, on a stream of its inputs.

Reading and every node before it run on all workers; the node itself runs in one process, which
receives the data module's own batches in canonical order (as upstream without shuffling). Where a
node before it changes with every frame, only reading is spread: all nodes before it run in that
process too, and what they have become goes back with the fitted node.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import count
from typing import Any

import torch
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
from cuvis_dist.initialization.kept_pass import KeptPass
from cuvis_dist.initialization.measuring import compute_inputs
from cuvis_dist.initialization.passes import PassRecord
from cuvis_dist.initialization.plan import Pass
from cuvis_dist.initialization.shards import GatherShard
from cuvis_dist.nodes.probing import digest, random_states, set_random_states
from cuvis_dist.nodes.state import adopt_all
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.nodes.written import Unwritten, read_all
from cuvis_dist.plain import NotPlainError
from cuvis_dist.scaling import Scaling


@dataclass(frozen=True)
class Streamed:
    """What a streamed fit leaves.

    Attributes
    ----------
    nodes : list of Node
        The fitted node, and those before it that changed.
    random : tuple
        The random states after the fit.
    tally : Tally
        Which frames were read.
    """

    nodes: list[Node]
    random: tuple
    tally: Tally


@dataclass(frozen=True)
class _Fit:
    """The name of the node to fit, whether in order, and the random states before it."""

    name: str
    in_order: bool
    random: tuple


def require_whole_frames(node: Node, scaling: Scaling) -> None:
    """Raise InputError if only some pixels count: a streamed node reads whole frames."""
    if scaling.measuring.pixels != "all":
        raise InputError(
            f"node {node.name} ({type(node).__name__}) is fitted by its own code on whole frames, "
            f"so that pixels: {scaling.measuring.pixels} cannot be applied to it; use pixels: all"
        )
    if scaling.measuring.robust_pixels is not None:
        raise InputError(
            f"node {node.name} ({type(node).__name__}) is fitted by its own code on whole frames, "
            "so that no pixel of them can be left out (measuring.robust_pixels): use "
            "measuring.robust, which leaves out frames"
        )


def stream_pass(
    pipeline: CuvisPipeline,
    archive: Archive,
    this_pass: Pass,
    scaling: Scaling,
    emit: EmitFn,
    stored: KeptPass | None = None,
) -> PassRecord:
    """Fit the streamed node of a pass on its inputs for every frame of the archive.

    Parameters
    ----------
    stored : KeptPass, optional
        Where to keep the fitted node; one that an earlier run left there is not fitted again.

    Raises
    ------
    InputError
        If only some pixels count: the node's own code reads whole frames.
    DataError
        If a frame cannot be read, or the nodes before cannot use it.
    StatefulNodesError
        If nodes before turn out to change with every frame, and the pass is not in order.
    CuvisDistError
        If the node's own fit failed.
    """
    node = this_pass.streamed
    assert node is not None
    if stored and (earlier := stored.taken(partial(_taken, pipeline))):
        return earlier
    started = time.perf_counter()
    require_whole_frames(node, scaling)
    before = Unwritten([node, *nodes_before(pipeline, [node])]) if stored else None
    fit = _Fit(node.name, bool(this_pass.after), random_states())
    for failure in count(1):
        try:
            # The fitting process mostly waits for the readers: it leaves them the CPUs.
            fitted = in_one_process(
                _fit,
                pipeline,
                archive,
                fit,
                scaling,
                emit=emit,
                workers=Workers.measuring(scaling),
                cpus=0,
            )
            break
        except LostWorkerError as error:
            if failure > scaling.resources.max_failures:
                raise
            logger.warning(f"{error}. It starts anew (failure {failure})")
    adopt_all(pipeline, fitted.nodes)
    set_random_states(fitted.random)
    tally = fitted.tally
    record = PassRecord(
        {node.name: {"statistic": "streamed", "pixels": None}},
        tally.frames,
        tally.bytes,
        len(archive.whole_batches(scaling.measuring.shard_frames)),
        time.perf_counter() - started,
        tally.peak,
        tally.skipped,
        repeated=sorted(tally.repeated),
    )
    if stored and before:
        names = {each.name for each in fitted.nodes}
        changed = [each for each in pipeline.nodes() if each.name in names]
        try:
            nodes = before.write_all(changed)
        except NotPlainError as error:
            logger.warning(f"{node.name} is fitted again if the run is interrupted: {error}")
            return record
        kept = {"nodes": nodes, "random": fitted.random, "record": asdict(record)}
        stored.save(kept | {"done": tally.done})
    return record


def _taken(pipeline: CuvisPipeline, kept: dict[str, Any]) -> PassRecord:
    """Take over what an earlier run fitted; return what is said about the pass."""
    record = PassRecord(**kept["record"])
    read_all(pipeline.nodes(), kept["nodes"])
    set_random_states(kept["random"])
    return replace(record, restored_shards=record.shards, restored_frames=kept["done"])


def _fit(
    pipeline: CuvisPipeline, archive: Archive, fit: _Fit, scaling: Scaling, emit: EmitFn
) -> Streamed:
    name, in_order = fit.name, fit.in_order
    node = next(n for n in pipeline.nodes() if n.name == name)
    before = {n: digest(n) for n in (nodes_before(pipeline, [node]) if in_order else ())}
    tally = Tally(len(archive), scaling.measuring.max_skipped)

    def stream(engine: Engine) -> Iterator[dict[str, Any]]:
        torch.empty((), dtype=torch.int64).random_()  # as a loader does when it is iterated
        order = engine.make_order(pipeline, archive, scaling.measuring.on_error == "skip")
        gather = GatherShard(order, None if in_order else name)
        for row in spread(archive.whole_batches(scaling.measuring.shard_frames), gather, engine):
            tally.add(row)
            progress = FrameProgress(tally.done, len(archive))
            emit(TrainEvent(TrainHook.STATISTICAL_PROGRESS, node=name, progress=progress))
            if row.payload is not None:
                frames, data = row.payload
                yield compute_inputs(pipeline, node, data, frames) if in_order else data

    set_random_states(fit.random)
    try:
        with engine_for(Workers.measuring(scaling)) as engine:
            node.statistical_initialization(stream(engine))
    except CuvisDistError:
        raise
    except Exception as error:
        raise CuvisDistError(f"node {name} could not be fitted: {one_line(error)}") from error
    changed = [n for n, earlier in before.items() if digest(n) != earlier]
    return Streamed([node, *changed], random_states(), tally)
