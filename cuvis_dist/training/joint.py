"""How does a training step on one rank compute what one process would on the whole batch?

Nodes that treat each frame by itself run on the rank's frames, and are left alone. A loss that is
a mean is weighed by the rank's share of the frames. A joint node runs on the whole batch on every
rank: what it takes with rows of frames is gathered, what it gives with rows of frames is cut back
to the rank's own. So it computes the same everywhere, moves its state alike, and draws the same
numbers, since all ranks take over rank 0's random state for the step. Batch norms that alone keep
a node from being per frame exchange moments instead. Why the gradients that meet in DDP are those
of the whole batch is derived in :mod:`~cuvis_dist.training.gathering`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.errors import InputError
from cuvis_dist.nodes.probing import random_states, set_random_states
from cuvis_dist.nodes.rows import Rows, map_rows
from cuvis_dist.nodes.survey import NodePlan
from cuvis_dist.nodes.treatment import Treatment
from cuvis_dist.training.batchnorm import batch_norms, synchronized
from cuvis_dist.training.gathering import Cut, gather, gather_list

Forward = Callable[..., dict[str, Any]]


class JointStep:
    """Runs training steps of a pipeline as parts of steps of one process.

    Parameters
    ----------
    pipeline : CuvisPipeline
        Its nodes are changed only within :meth:`of`.
    plans : mapping of str to NodePlan
        By node name, the same on all ranks.
    waiting : callable
        It returns a context in which other ranks are waited for.
    """

    def __init__(
        self,
        pipeline: CuvisPipeline,
        plans: Mapping[str, NodePlan],
        waiting: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._waiting = waiting
        named = {node.name: node for node in pipeline.nodes()}
        chosen = [(named[name], plan) for name, plan in plans.items()]
        self._joint = [(n, p) for n, p in chosen if p.batching.treatment is Treatment.JOINT]
        self._means = [n for n, p in chosen if p.batching.treatment is Treatment.MEAN]
        self._norms = [norm for n, p in chosen if p.batching.batch_norms for norm in batch_norms(n)]
        self._random = any(plan.batching.random for _, plan in chosen)

    @contextmanager
    def of(self, cut: Cut) -> Iterator[None]:
        """Let the nodes compute for the batch that ``cut`` describes."""
        if len(cut.sizes) == 1:
            yield
            return
        with ExitStack() as stack:
            for node, plan in self._joint:
                stack.enter_context(_replaced(node, self._whole(node, plan, cut)))
            for node in self._means:
                stack.enter_context(_replaced(node, _weighed(node, cut.weight)))
            stack.enter_context(synchronized(self._norms, cut, self._waiting))
            if self._random:
                with self._waiting():
                    share_random_state(cut)
            yield

    def _whole(self, node: Node, plan: NodePlan, cut: Cut) -> Forward:
        forward = node.forward

        def whole(**inputs: Any) -> dict[str, Any]:
            with self._waiting():
                gathered = _gathered(node, inputs, plan, cut)
            return {
                port: _cut_back(node, value, plan.outputs.get(port, 0), cut)
                for port, value in forward(**gathered).items()
            }

        return whole


@contextmanager
def _replaced(node: Node, forward: Forward) -> Iterator[None]:
    """Give a node another ``forward``; a pipeline calls it by that name."""
    before = node.__dict__.get("forward")
    node.forward = forward
    try:
        yield
    finally:
        if before is None:
            del node.__dict__["forward"]
        else:
            node.forward = before


def _weighed(node: Node, weight: float) -> Forward:
    forward = node.forward

    def weighed(**inputs: Any) -> dict[str, Any]:
        return {port: weight * value for port, value in forward(**inputs).items()}

    return weighed


def _gathered(node: Node, inputs: dict[str, Any], plan: NodePlan, cut: Cut) -> dict[str, Any]:
    """Return the inputs of the whole batch: one agreement, then one message per tensor."""
    found: list[tuple[Any, int]] = []
    held = max(1, cut.mine)

    def find(value: Any, each: int) -> Any:
        _require_rows(node, value, held, each)
        found.append((value, each))
        return value

    ports = {port: rows for port, rows in plan.inputs.items() if port in inputs}
    for port, rows in ports.items():
        map_rows(inputs[port], rows, find)
    tensors = [(_tensor(value), each) for value, each in found if not isinstance(value, list)]
    whole = iter(
        gather([t for t, _ in tensors], cut, [each for _, each in tensors], plan.alike)
        if tensors
        else []
    )

    def replace(value: Any, each: int) -> Any:
        if isinstance(value, list):
            return gather_list(value, cut, each)
        gathered = next(whole)
        return gathered.numpy() if isinstance(value, np.ndarray) else gathered

    return inputs | {port: map_rows(inputs[port], rows, replace) for port, rows in ports.items()}


def _tensor(value: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def _cut_back(node: Node, value: Any, rows: Rows, cut: Cut) -> Any:
    frames = sum(cut.sizes)

    def own(part: Any, each: int) -> Any:
        _require_rows(node, part, frames, each)
        return cut.own(part, each)

    return map_rows(value, rows, own)


def _require_rows(node: Node, value: Any, frames: int, each: int) -> None:
    if len(value) != frames * each:
        raise InputError(
            f"{node.name} has a value with {len(value)} rows for {frames} frames, where {each} "
            "per frame were found before training: they cannot be told apart by frames"
        )


def share_random_state(cut: Cut) -> None:
    """Let all ranks go on from rank 0's random state."""
    states = [random_states() if cut.rank == 0 else None]
    dist.broadcast_object_list(states, src=_first_of(cut), group=cut.group)
    if cut.rank != 0:
        set_random_states(cast(tuple, states[0]))


def _first_of(cut: Cut) -> int:
    return 0 if cut.group is None else dist.get_global_rank(cut.group, 0)


def agreed(find: Callable[[], Any], cut: Cut) -> Any:
    """Return what ``find`` returns on rank 0, on every rank; raise what it raises."""
    answer: list[Any] = [None]
    if cut.rank == 0:
        try:
            answer = [find()]
        except Exception as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=_first_of(cut), group=cut.group)
    if isinstance(answer[0], Exception):
        raise answer[0]
    return answer[0]
