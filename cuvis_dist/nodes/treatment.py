"""In what ways may a node treat the frames of a training batch?

The words for it; which class does what is in :mod:`~cuvis_dist.nodes.batching`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from cuvis_ai_schemas.enums import ExecutionStage


class Treatment(StrEnum):
    """How a node treats the frames of a batch."""

    PER_FRAME = "per frame"
    """Its outputs for a batch are those of each frame alone."""
    MEAN = "mean"
    """Its output is a number, the mean of those of each frame alone."""
    JOINT = "joint"
    """It needs the whole batch: all frames, in their order."""


@dataclass(frozen=True)
class Batching:
    """How one node treats the frames of a training batch, and why that is believed.

    Attributes
    ----------
    treatment : Treatment
        Leaving aside batch norms and random numbers, where these two say so:
    batch_norms : bool
        Whether batch norms inside the node are all that keeps its frames from being independent.
    random : bool
        Whether it draws random numbers from the process's generators.
    ragged : bool
        Whether the rows of its outputs do not follow the frames: how many there are depends on
        what is in the frames.
    evolves : tuple of ExecutionStage
        Stages other than training in which running the node changes what it does next.
    found : bool
        Whether a probe found this out.
    """

    treatment: Treatment
    why: str
    batch_norms: bool = False
    random: bool = False
    ragged: bool = False
    evolves: tuple[ExecutionStage, ...] = ()
    found: bool = False


@dataclass(frozen=True)
class Use:
    """How a pipeline uses a node.

    Attributes
    ----------
    read : frozenset of str
        Output ports that anything reads.
    framed : frozenset of str
        Input ports whose values have rows for each frame.
    """

    read: frozenset[str]
    framed: frozenset[str] = frozenset()
