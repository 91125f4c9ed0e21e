"""Which nodes map pixels affinely once they are fitted, and by which map?

The map of a chain of nodes is not written down a second time: C + 1 probe pixels go through the
nodes' own ``forward`` in float64, and real pixels decide whether the answer can be trusted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from cuvis_ai.node.anomaly.deep_svdd import ZScoreNormalizerGlobal
from cuvis_ai.node.channel_selector import SoftChannelSelector
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import IdentityNormalizer, MinMaxNormalizer
from cuvis_ai.node.pretreatments.scaling import MeanCenter, UnitVarianceScaling
from cuvis_ai_core.node.node import Node
from torch import Tensor

NodeT = TypeVar("NodeT", bound=Node)

_AFFINE: dict[type[Node], Callable[[Any], tuple[str, str] | None]] = {}

#: Largest difference between the map and the nodes on real pixels, relative to their spread.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Hop:
    """One node of a chain, entered at ``input`` and left at ``output``."""

    node: Node
    input: str
    output: str


def affine(
    node_class: type[NodeT],
) -> Callable[[Callable[[NodeT], tuple[str, str] | None]], None]:
    """Declare that fitted nodes of ``node_class`` map each pixel affinely.

    The decorated function receives a node and returns ``(input port, output port)`` of the map,
    or None when this node's settings make it something else.
    """

    def register(function: Callable[[NodeT], tuple[str, str] | None]) -> None:
        _AFFINE[node_class] = function

    return register


def affine_hop(node: Node, output: str) -> Hop | None:
    """Return the hop that ends at ``output`` of ``node``, or None if it is not affine."""
    for cls in type(node).__mro__:
        if cls in _AFFINE:
            ports = _AFFINE[cls](node) if type(node).forward is cls.forward else None
            return Hop(node, *ports) if ports and ports[1] == output else None
    return None


@torch.no_grad()
def probe(chain: tuple[Hop, ...], pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(A, b)`` of the chain: ``A x + b`` is what it makes of a pixel ``x``.

    Parameters
    ----------
    chain : tuple of Hop
        Fitted nodes, first to last.
    pixels : Tensor
        ``[N, C]`` real pixels on which the map is checked.

    Returns
    -------
    tuple of Tensor
        ``A`` ``[D, C]`` and ``b`` ``[D]``, float64 on the CPU.

    Raises
    ------
    ValueError
        If the chain does something else to the real pixels.
    """
    channels = pixels.shape[-1]
    unit = torch.eye(channels, dtype=torch.float64)
    answers = _through(chain, torch.cat([torch.zeros(1, channels, dtype=torch.float64), unit]))
    b = answers[0].double()
    A = (answers[1:].double() - b).T
    expected = _through(chain, pixels).double()
    got = pixels.double() @ A.T + b
    spread = (expected.max() - expected.min()).clamp(min=1e-30)
    error = float(((got - expected).abs().max() / spread).nan_to_num(torch.inf))
    if error > _TOLERANCE:
        names = " → ".join(hop.node.name for hop in chain)
        raise ValueError(f"{names} is no affine map of these pixels (off by {error:.2g})")
    return A, b


def _through(chain: tuple[Hop, ...], pixels: Tensor) -> Tensor:
    """Run pixels ``[N, C]`` through the nodes as a frame of N rows."""
    device = next((b.device for b in chain[0].node.buffers()), torch.device("cpu"))
    cube = pixels.reshape(1, len(pixels), 1, -1).to(device)
    for hop in chain:
        cube = hop.node.forward(**{hop.input: cube})[hop.output]
    return cube.reshape(len(pixels), -1).cpu()


@affine(IdentityNormalizer)
def _identity(node: IdentityNormalizer) -> tuple[str, str]:
    return "data", "normalized"


@affine(MinMaxNormalizer)
def _min_max(node: MinMaxNormalizer) -> tuple[str, str] | None:
    return ("data", "normalized") if node.use_running_stats else None


@affine(SoftChannelSelector)
def _selector(node: SoftChannelSelector) -> tuple[str, str]:
    return "data", "selected"


@affine(TrainablePCA)
def _pca(node: TrainablePCA) -> tuple[str, str]:
    return "data", "projected"


@affine(ZScoreNormalizerGlobal)
def _z_score(node: ZScoreNormalizerGlobal) -> tuple[str, str]:
    return "data", "normalized"


@affine(MeanCenter)
def _mean_center(node: MeanCenter) -> tuple[str, str]:
    return "cube", "cube"


@affine(UnitVarianceScaling)
def _unit_variance(node: UnitVarianceScaling) -> tuple[str, str]:
    return "cube", "cube"
