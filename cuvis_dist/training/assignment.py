"""What does the driver tell a rank to do, and what does rank 0 bring back?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytorch_lightning as pl
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.config import TrainingConfig
from cuvis_ai_core.training.post_fit import CheckpointRestored, EmitFn
from pytorch_lightning import Callback

from cuvis_dist.archive import FrameCache
from cuvis_dist.nodes.survey import NodePlan
from cuvis_dist.scaling import Scaling
from cuvis_dist.storage import OutputFolder
from cuvis_dist.training.watch import Beat


@dataclass(frozen=True)
class TrainerParts:
    """What upstream's gradient trainer is made of, as the driver had it.

    Attributes
    ----------
    pipeline : CuvisPipeline
        The nodes, as they are at the start.
    datamodule : LightningDataModule
        The user's own.
    loss_nodes, metric_nodes : list of str
        Names of nodes of the pipeline, of which every rank has a copy.
    config : TrainingConfig
        The training configuration, with absolute paths.
    monitors : list
        Objects that are told the loss of each step.
    callbacks : list of Callback
        The user's own, less the post-fit steps.
    """

    pipeline: CuvisPipeline
    datamodule: pl.LightningDataModule
    loss_nodes: list[str]
    metric_nodes: list[str]
    config: TrainingConfig
    monitors: list[Any]
    callbacks: list[Callback]


class WatchOver(Protocol):
    """How a rank reaches the :class:`~cuvis_dist.training.watch.Watch` over its group."""

    def begin(self, group: str, world_size: int) -> None:
        """Note that a group of so many ranks has begun."""

    def beat(self, beat: Beat) -> str | None:
        """Take a rank's beat; return who is stuck, in words, or None."""

    def end(self) -> None:
        """End this rank, whose main thread may be in a call that does not return."""


@dataclass(frozen=True)
class Driver:
    """How a rank reaches the driver, and what it must know of its process.

    Attributes
    ----------
    emit : callable
        It takes events of training to the driver.
    watch : WatchOver
        It notices ranks that are stuck.
    directory : str
        The driver's working directory, against which relative paths are meant.
    """

    emit: EmitFn
    watch: Any
    directory: str


@dataclass(frozen=True)
class Assignment:
    """Everything that a rank needs.

    Attributes
    ----------
    verb : str
        ``fit``, ``validate`` or ``test``.
    checkpoint : str or None
        Lightning checkpoint to evaluate; a fit goes on from its own, if that is there.
    parts : TrainerParts
        What is trained or evaluated, and how.
    output : OutputFolder
        Where checkpoints and logs belong.
    scaling : Scaling
        The settings of the run.
    cache : FrameCache or None
        Where each node keeps the frames that it has read.
    decoded : dict of int to str
        By frame of the train split, the Ray node that has decoded it in phase 1.
    """

    verb: str
    checkpoint: str | None
    parts: TrainerParts
    output: OutputFolder
    scaling: Scaling
    cache: FrameCache | None = None
    decoded: Mapping[int, str] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        """Whether each rank has a GPU, or a part of one."""
        return self.scaling.resources.train_gpus > 0


@dataclass(frozen=True)
class Seat:
    """Which rank a process is, and what whoever started it knows about its group.

    Attributes
    ----------
    rank, world_size : int
        Which one it is, of how many.
    run, group : str
        Names that this training, and this group of ranks, has and no other; where ranks come or
        go, another group carries on with the training.
    node : str
        The Ray node of its process, where there is one.
    driver : Driver
        The process that gave the assignment.
    lightning : dict
        Keywords of ``pl.Trainer`` by which ranks find each other.
    """

    rank: int
    world_size: int
    run: str
    group: str
    node: str
    driver: Driver
    lightning: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What rank 0 brings back, on the CPU.

    Attributes
    ----------
    nodes : list of Node
        The pipeline's nodes, with the state that they have now.
    checkpoint : CheckpointRestored or None
        The best checkpoint of a fit, as far as it was restored.
    epochs, steps : int
        Epochs that a fit has completed, and steps of its optimizers.
    metrics : sequence of mapping
        What an evaluation found.
    callback_states : tuple of dict
        The states of the assignment's callbacks, in their order.
    notes : tuple of str
        What the driver shall say, once each.
    plans : dict of str to NodePlan
        How each node ran in a training step, by name; empty for one rank.
    """

    nodes: list[Node]
    checkpoint: CheckpointRestored | None
    epochs: int
    steps: int
    metrics: Sequence[Mapping[str, float]]
    callback_states: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]
    plans: dict[str, NodePlan]
