"""What do the ranks find out about a pipeline before they train it, and agree on?

Rank 0 lets two frames run through copies of the nodes, where that is needed to know how each node
treats the frames of a batch, and tells the others. Frames are read for this from the head of the
split, under random states of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import ExecutionStage
from loguru import logger
from torch.utils.data import Dataset

from cuvis_dist.errors import one_line
from cuvis_dist.nodes.probing import left_alone
from cuvis_dist.nodes.survey import (
    NodePlan,
    evolving_nodes,
    fit_on,
    obvious_plans,
    outline,
    training_survey,
)
from cuvis_dist.nodes.treatment import Treatment
from cuvis_dist.training.gathering import Cut
from cuvis_dist.training.joint import agreed

Batch = dict[str, Any]


@dataclass(frozen=True)
class Head:
    """The first frames of a split.

    Attributes
    ----------
    dataset : Dataset
        The data set of the split.
    collate : callable
        It makes a batch of a list of items.
    """

    dataset: Dataset
    collate: Callable[[list[Any]], Batch]

    def frames(self, count: int) -> Batch:
        """Return a batch of the first frames, fewer if there are fewer."""
        count = min(count, len(self.dataset))  # type: ignore[arg-type]
        with left_alone():
            return self.collate([self.dataset[index] for index in range(count)])

    def two_and_one(self) -> tuple[Batch, Batch]:
        """Return batches of two unlike frames and of the first of them.

        Where the split has one frame only, or the second is of another size, the second is the
        first one upside down.
        """
        one = self.frames(1)
        try:
            two = self.frames(2)
        except RuntimeError:  # frames of unlike sizes do not stack
            two = one
        if _length(two) == _length(one):
            two = _with_mirrored(one)
        return two, one


def agree_on_training(
    pipeline: CuvisPipeline, loss_nodes: Collection[Node], head: Callable[[], Head], cut: Cut
) -> dict[str, NodePlan]:
    """Return how each node runs in a training step, by name; the same on all ranks.

    Parameters
    ----------
    head : callable
        Returns the head of the train split; it is called where frames are needed to know it.

    Raises
    ------
    DataError
        If a frame that is needed to know it cannot be read.
    """
    plans = obvious_plans(pipeline, loss_nodes)
    if plans is not None:
        return plans
    return agreed(lambda: training_survey(pipeline, *head().two_and_one(), loss_nodes), cut)


def agree_on_order(
    pipeline: CuvisPipeline, stage: ExecutionStage, head: Callable[[], Head], cut: Cut
) -> list[str]:
    """Return the nodes for which the order of batches matters at ``stage``; on all ranks alike."""
    return agreed(lambda: evolving_nodes(pipeline, lambda: head().frames(1), stage), cut)


def foresee_training(
    pipeline: CuvisPipeline, loss_nodes: Collection[str], head: Callable[[], Head]
) -> dict[str, str]:
    """Return how each node would run in a training step, in words; nodes are left as they are.

    Nodes that phase 1 has yet to fit are fitted, as copies, on the two frames that are tried.

    Parameters
    ----------
    loss_nodes : collection of str
        Names of the nodes whose outputs are added up.
    head : callable
        Returns the head of the train split; it is called where frames are needed to know it.

    Raises
    ------
    DataError
        If a frame that is needed to know it cannot be read.
    """
    losses = [node for node in pipeline.nodes() if node.name in loss_nodes]
    plans, words = obvious_plans(pipeline, losses), outline(pipeline, losses)
    if plans is None:
        two, one = head().two_and_one()
        trial = copy.deepcopy(pipeline)
        losses = [node for node in trial.nodes() if node.name in loss_nodes]
        try:
            with left_alone():
                fit_on(trial, two)
            plans = training_survey(trial, two, one, losses)
        except Exception as error:  # what needs more than two frames to be fitted
            logger.debug(f"not tried before it is fitted: {one_line(error)}")
            return words
    return words | in_words(plans)


def in_words(plans: dict[str, NodePlan]) -> dict[str, str]:
    """Return what to say about each node."""
    return {name: str(plan) for name, plan in plans.items()}


def described(plans: dict[str, NodePlan]) -> list[str]:
    """Return what to say about the nodes that are not per frame, or were tried out."""
    return [
        f"{name}: {plan}"
        for name, plan in plans.items()
        if plan.batching.found or plan.batching.treatment is not Treatment.PER_FRAME
    ]


def _length(batch: Batch) -> int:
    return max(
        (len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.ndim), default=0
    )


def _with_mirrored(one: Batch) -> Batch:
    def two(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim:
            return torch.cat([value, value.flip(1) if value.ndim > 2 else value])
        return [*value, *value] if isinstance(value, list) else value

    return {name: two(value) for name, value in one.items()}
