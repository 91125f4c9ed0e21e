"""What does a node class need to be fitted: which statistic of which input port?

A recipe never writes into a node. The merged statistic becomes a few surrogate pixels, and
the node's own ``statistical_initialization`` reads those instead of the archive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.channel_selector import SoftChannelSelector
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import MinMaxNormalizer
from cuvis_ai_core.node.node import Node
from torch import Tensor

from cuvis_dist.statistics import Extrema, Moments, Statistic

NodeT = TypeVar("NodeT", bound=Node)


@dataclass(frozen=True)
class Recipe:
    """How one node is fitted.

    Attributes
    ----------
    port : str
        The input port that ``statistical_initialization`` reads, channels last.
    statistic : type of Statistic
        What the node computes from that port.
    options : dict
        Keyword arguments of ``statistic.measure``.
    """

    port: str
    statistic: type[Statistic]
    options: dict[str, Any] = field(default_factory=dict)

    def measure(self, inputs: dict[str, Any]) -> Statistic:
        """Measure the statistic on what a node receives for one batch.

        Raises
        ------
        KeyError
            If the port is not among the inputs.
        """
        value: Tensor = inputs[self.port]
        return self.statistic.measure(value.reshape(-1, value.shape[-1]), **self.options)

    def freeze(self, node: Node, statistic: Statistic) -> None:
        """Let ``node`` fit itself on the surrogate pixels of ``statistic``."""
        pixels = statistic.surrogate()
        batches = [{self.port: pixels.reshape(1, -1, 1, statistic.channels)}] if len(pixels) else []
        device = next((b.device for b in node.buffers()), torch.device("cpu"))
        # A single-use generator, as upstream's: some nodes take the first batch with next()
        # and go on iterating.
        node.statistical_initialization(
            {port: value.to(device) for port, value in batch.items()} for batch in batches
        )

    def __str__(self) -> str:
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"{self.statistic.name}({self.port}{options})"


_RECIPES: dict[type[Node], Callable[[Any], Recipe | None]] = {}


def recipe(
    node_class: type[NodeT],
) -> Callable[[Callable[[NodeT], Recipe | None]], Callable[[NodeT], Recipe | None]]:
    """Register how nodes of ``node_class`` are fitted.

    The decorated function receives a node and returns its :class:`Recipe`, or None when this
    node's settings ask for something that merges no statistic; the node is then streamed.
    """

    def register(function: Callable[[NodeT], Recipe | None]) -> Callable[[NodeT], Recipe | None]:
        _RECIPES[node_class] = function
        return function

    return register


def recipe_for(node: Node) -> Recipe | None:
    """Return the recipe of ``node``, or None when it must be streamed.

    A subclass shares the recipe of its base only while it shares its
    ``statistical_initialization``.
    """
    for cls in type(node).__mro__:
        if cls in _RECIPES:
            same = type(node).statistical_initialization is cls.statistical_initialization
            return _RECIPES[cls](node) if same else None
    return None


@recipe(MinMaxNormalizer)
def _min_max(node: MinMaxNormalizer) -> Recipe | None:
    # A cap on the frames depends on their order.
    return Recipe("data", Extrema) if node.max_initialization_frames is None else None


@recipe(SoftChannelSelector)
def _soft_channel_selector(node: SoftChannelSelector) -> Recipe:
    return Recipe("data", Moments, {"diagonal": True})


@recipe(RXGlobal)
def _rx_global(node: RXGlobal) -> Recipe:
    return Recipe("data", Moments)


@recipe(TrainablePCA)
def _trainable_pca(node: TrainablePCA) -> Recipe:
    return Recipe("data", Moments)


@recipe(ScoreToLogit)
def _score_to_logit(node: ScoreToLogit) -> Recipe:
    return Recipe("scores", Moments)
