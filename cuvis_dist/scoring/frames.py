"""What does a worker do with a frame? It computes the maps and writes their file.

Frames go through the pipeline one at a time: a file does not depend on how frames are batched or
dealt. Only the nodes that the outputs depend on run; labels are not needed unless these read them.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import EmitFn
from cuvis_ai_schemas.enums import ExecutionStage, NodeTag
from cuvis_ai_schemas.execution import Context

from cuvis_dist.archive import Frame, Shard
from cuvis_dist.errors import ClusterError, DataError, one_line
from cuvis_dist.execution.spread import Order, Row
from cuvis_dist.execution.worker import fetch_once
from cuvis_dist.nodes.state import StatefulNodesError, StateWatch
from cuvis_dist.nodes.survey import evolving_nodes
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.scoring.plan import refuse_links
from cuvis_dist.storage import OutputFolder


def only_for(pipeline: CuvisPipeline, outputs: list[tuple[str, str]]) -> None:
    """Let only the nodes run that the outputs depend on: no sinks, metrics or losses."""
    names = {node for node, _ in outputs}
    targets = [node for node in pipeline.nodes() if node.name in names]
    needed = nodes_before(pipeline, targets) | set(targets)
    for node in pipeline.nodes():
        if node not in needed:
            node.should_execute = _never


def _never(stage: object) -> bool:
    return False


def _running(pipeline: CuvisPipeline) -> list[Node]:
    return [n for n in pipeline.nodes() if n.should_execute(ExecutionStage.INFERENCE)]


def depending(pipeline: CuvisPipeline) -> str | None:
    """Name the nodes that are known to depend on the frames before, or return None."""
    tracking = [node.name for node in _running(pipeline) if NodeTag.TRACKING in node.get_tags()]
    names = [*tracking, *evolving_nodes(pipeline, None, ExecutionStage.INFERENCE)]
    return ", ".join(dict.fromkeys(names)) or None


@functools.lru_cache(maxsize=1)
def _checked(pipeline: Any) -> set[bool]:
    """Return what this process notes about a pipeline: True once its nodes were tried out."""
    return set()


class ScoreShard:
    """Scores a shard and writes its files: one row that says how many.

    Parameters
    ----------
    order : Order
        Pipeline and archive.
    files : ObjectRef of list of str
        The file of each frame, relative to ``folder``; empty where it is there already.
    folder : OutputFolder
        ``<output_dir>/scores``.
    outputs : list of tuple of str
        Node and port of each map.
    carries_state : bool
        Frames come in order, and what nodes keep of one is for the next.
    """

    ordered = False

    def __init__(
        self,
        order: Order,
        files: Any,
        folder: OutputFolder,
        outputs: list[tuple[str, str]],
        carries_state: bool = False,
    ) -> None:
        self.order, self.files, self.folder, self.outputs = order, files, folder, outputs
        self.carries_state = carries_state

    def __call__(self, shard: Shard) -> list[Row]:
        """Return the row of ``shard``."""
        written, skipped = 0, []
        for uid, reason in self.frames(range(shard.start, shard.stop)):
            if reason:
                skipped.append((uid, reason))
            else:
                written += 1
        return [Row(shard.ordinal, frames=written, skipped=tuple(skipped))]

    def frames(self, indices: range) -> Iterator[tuple[str, str]]:
        """Score frames and write their files; yields each one's uid, and why it was skipped.

        Raises
        ------
        DataError
            If a frame cannot be used, and none may be skipped.
        StatefulNodesError
            Before a file is written that depends on the frames before.
        """
        archive, pipeline = self.order.open()
        files = fetch_once(self.files)
        running = _running(pipeline)
        for module in pipeline.torch_layers:
            module.eval()
        watch = StateWatch(running)
        for index in indices:
            frame = archive.frames[index]
            try:
                batch = archive.read(index)
                maps = self._maps(pipeline, batch, index, frame)
            except DataError as error:
                self.order.leave_out(error)
                yield frame.uid, str(error)
                continue
            if not self.carries_state:
                watch.require_unchanged()
                self._require_steady(pipeline, batch)
            if files[index]:
                self._write(files[index], frame, maps)
            yield frame.uid, ""

    def _require_steady(self, pipeline: CuvisPipeline, batch: dict[str, Any]) -> None:
        """Raise StatefulNodesError if nodes that nobody described change when they are run.

        Copies of them are, on the first frame of each process, before it writes a file.
        """
        checked = _checked(self.order.pipeline)
        if not checked:
            frames = lambda: pipeline.move_batch_to_device(batch)  # noqa: E731
            if names := evolving_nodes(pipeline, frames, ExecutionStage.INFERENCE):
                raise StatefulNodesError(*names)
            checked.add(True)

    @torch.no_grad()
    def _maps(
        self, pipeline: CuvisPipeline, batch: dict[str, Any], index: int, frame: Frame
    ) -> dict[str, np.ndarray]:
        try:
            outputs = pipeline.forward(
                batch=pipeline.move_batch_to_device(batch),
                context=Context(stage=ExecutionStage.INFERENCE, batch_idx=index, global_step=index),
                free_consumed_ports=True,
                keep_ports=self.outputs,
            )
            return {".".join(port): _array(outputs[port]) for port in self.outputs}
        except Exception as error:
            raise DataError(f"{frame} cannot be used: {one_line(error)}") from error

    def _write(self, file: str, frame: Frame, maps: dict[str, np.ndarray]) -> None:
        refuse_links(self.folder.local, [file])
        content = io.BytesIO()
        arrays: dict[str, Any] = maps | {"uid": np.array(frame.uid)}
        np.savez(content, **arrays)
        try:
            self.folder.write(file, content.getvalue())
        except OSError as error:
            raise ClusterError(
                f"the scores of {frame} cannot be written to {self.folder.at(file)}: "
                f"{one_line(error)}"
            ) from error


def _array(value: torch.Tensor) -> np.ndarray:
    array = value.detach().cpu().numpy()
    return array[0] if array.ndim and len(array) == 1 else array


def score_in_order(score: ScoreShard, frames: int, max_skipped: int, emit: EmitFn) -> Row:
    """Score all frames in this process and return one row for them."""
    files, written, skipped = fetch_once(score.files), 0, []
    say: Any = emit
    for done, (uid, reason) in enumerate(score.frames(range(frames)), 1):
        if reason:
            if not files[done - 1]:  # what follows would begin from another state
                raise DataError(f"{reason}. Its scores are there, but not those of later frames")
            skipped.append((uid, reason))
            if len(skipped) > max_skipped:
                break
        elif files[done - 1]:
            written += 1
        if done % math.ceil(frames / 100) == 0:
            say(done)
    return Row(0, frames=written, skipped=tuple(skipped))
