"""How is one node fitted: from which statistic of which input port?

A recipe never writes into a node. The merged statistic becomes a few surrogate pixels, and
the node's own ``statistical_initialization`` reads those instead of the archive. Which class has
which recipe says :mod:`~cuvis_dist.nodes.catalogue`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from cuvis_ai_core.node.metric_utils import subsample_hw
from cuvis_ai_core.node.node import Node
from torch import Tensor

from cuvis_dist.statistics import FrameQuantiles, Statistic


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
    surrogate : dict
        Keyword arguments of ``statistic.surrogate``.
    """

    port: str
    statistic: type[Statistic]
    options: dict[str, Any] = field(default_factory=dict)
    surrogate: dict[str, Any] = field(default_factory=dict)

    def pixels(self, node: Node, inputs: dict[str, Any]) -> Tensor:
        """Return the pixels ``[N, C]`` to measure, of what the node receives for one frame.

        Raises
        ------
        KeyError
            If the port is not among the inputs.
        """
        value: Tensor = inputs[self.port]
        return value.reshape(-1, value.shape[-1])

    def counts(self, node: Node, inputs: dict[str, Any]) -> Tensor | None:
        """Return which of these pixels the node takes, ``[N]`` bool; None for all of them."""
        return None

    #: Whether the measurement is the same for every node that is fed from the same port.
    shareable: ClassVar[bool] = True

    @property
    def by_strips(self) -> bool:
        """Whether a frame may be measured a few rows at a time.

        Not where a subclass has pixels of its own making, which might need the whole frame.
        """
        return type(self).pixels is Recipe.pixels and not self.statistic.whole_frame

    def freeze(self, node: Node, statistic: Statistic) -> None:
        """Let ``node`` fit itself on the surrogate pixels of ``statistic``."""
        pixels = statistic.surrogate(**self.surrogate)
        device = next((b.device for b in node.buffers()), torch.device("cpu"))
        cubes = [pixels.reshape(1, -1, 1, statistic.channels).to(device)] if len(pixels) else []
        # A single-use generator, as upstream's: some nodes take the first batch with next()
        # and go on iterating.
        node.statistical_initialization({self.port: cube} for cube in cubes)

    def describe(self, of: str) -> str:
        """Return e.g. ``Moments(data.cube, diagonal=True)``."""
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"{self.statistic.name}({of}{options})"

    def __str__(self) -> str:
        return self.describe(self.port)


class InvertedRecipe(Recipe):
    """Measures what the node measures, the negated values, and hands them back as they came."""

    shareable = False

    def pixels(self, node: Node, inputs: dict[str, Any]) -> Tensor:
        """Return the negated values."""
        return -super().pixels(node, inputs)

    def freeze(self, node: Node, statistic: Statistic) -> None:
        """Let ``node`` fit itself on the values as they came."""
        assert isinstance(statistic, FrameQuantiles)
        low, high = -statistic.maximum, -statistic.minimum
        super().freeze(node, replace(statistic, minimum=low, maximum=high))


class ColoursRecipe(Recipe):
    """Percentile bounds of the colours that a band selector makes of a cube.

    Colours are no affine map of the cube (an index is a ratio), so they are what is measured,
    and the surrogate consists of colours too: the node's own fit gets them in place of those
    that it would make.
    """

    shareable = False

    def pixels(self, node: Any, inputs: dict[str, Any]) -> Tensor:
        """Return the colours of the cube, as the node makes them."""
        return node._compute_raw_rgb(inputs["cube"], inputs["wavelengths"]).reshape(-1, 3)

    def freeze(self, node: Any, statistic: Statistic) -> None:
        """Let ``node`` fit itself on colours that it takes for those of a cube."""
        colours = statistic.surrogate().float().reshape(1, -1, 1, 3)
        batches = [{"cube": colours, "wavelengths": None}] if colours.numel() else []
        node._compute_raw_rgb = lambda cube, wavelengths: cube
        try:
            node.statistical_initialization(iter(batches))
        finally:
            del node._compute_raw_rgb


class CollectedRecipe(Recipe):
    """The pixels that a node would collect; a connected mask chooses the foreground."""

    shareable = False

    def counts(self, node: Node, inputs: dict[str, Any]) -> Tensor | None:
        """Return which pixels the mask marks; None without one."""
        mask = inputs.get("mask")
        return None if mask is None else mask.reshape(-1) > 0


class PooledRecipe(Recipe):
    """Every ``fit_subsample``-th pixel in both axes of a frame."""

    shareable = False
    by_strips = False

    def counts(self, node: Any, inputs: dict[str, Any]) -> Tensor:
        """Return which pixels the node's own stride leaves."""
        chosen = torch.zeros((*inputs[self.port].shape[:-1], 1), dtype=torch.bool)
        subsample_hw(chosen, node.fit_subsample).fill_(True)
        return chosen.reshape(-1)

    def freeze(self, node: Any, statistic: Statistic) -> None:
        """Let ``node`` fit itself on the sample."""
        # As frames of one pixel, of which the node's own stride leaves all.
        frames = statistic.surrogate().reshape(-1, 1, 1, statistic.channels)
        frames = frames.to(node.running_min.device)
        node.statistical_initialization({self.port: cube} for cube in frames.split(len(frames)))
