"""By which affine map do fitted nodes take pixels from one port to another?

The map of a chain of nodes is not written down a second time: C + 1 probe pixels go through the
nodes' own ``forward`` in float64, and real pixels decide whether the answer can be trusted. Which
nodes may be in a chain says :mod:`~cuvis_dist.nodes.catalogue`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cuvis_ai_core.node.node import Node
from torch import Tensor

#: Largest difference between the map and the nodes on real pixels, relative to their spread.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Hop:
    """One node of a chain, entered at ``input`` and left at ``output``."""

    node: Node
    input: str
    output: str


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
        If the chain does something else to the real pixels, or there are none.
    """
    if not len(pixels):
        raise ValueError("the first frame has no pixels that count, to check its affine map on")
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
