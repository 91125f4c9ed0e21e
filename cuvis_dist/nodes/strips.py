"""How is a frame cut into strips?

Where every node before the measured ones maps each pixel by itself (see
:func:`~cuvis_dist.nodes.catalogue.is_pixelwise`), rows of a frame go through them strip by strip:
what the nodes allocate on the way then fits a core's cache, and a worker holds one cube whatever
the nodes before do with it. Few nodes get few and large strips: each call of a node costs time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

#: Values in one strip of the widest port, 4 MiB in float32, for so many nodes or more. Fewer nodes
#: hold as much together.
_STRIP_VALUES, _NODES = 1 << 20, 4


def strips(batch: dict[str, Any], nodes: int) -> Iterator[dict[str, Any]]:
    """Cut a batch of one frame into strips of rows, as views, from top to bottom.

    Every ``[1, H, W, ...]`` tensor is cut; a batch whose images differ in size stays whole.

    Parameters
    ----------
    batch : dict
        The frame as a batch of one.
    nodes : int
        How many nodes the strips go through.
    """
    images = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim >= 3}
    sizes = {tuple(v.shape[:3]) for v in images.values()}
    if len(sizes) != 1:
        yield batch
        return
    (_, height, _) = sizes.pop()
    row = max(v[0, :1].numel() for v in images.values())
    values = _STRIP_VALUES * max(1, _NODES // max(1, nodes))
    rows = max(1, values // max(1, row))
    for start in range(0, height, rows):
        yield batch | {k: v[:, start : start + rows] for k, v in images.items()}
