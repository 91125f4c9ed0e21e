"""A node class that `cuvis_dist` has never heard of, with all that can be said of one.

A module of its own, so that workers can import it.
"""

from __future__ import annotations

import torch
from cuvis_ai_core.node import Node
from cuvis_ai_schemas.enums import NodeCategory, NodeTag
from cuvis_ai_schemas.pipeline import PortSpec

from cuvis_dist import NodeFacts, Recipe
from cuvis_dist.statistics import Moments

CUBE = PortSpec(dtype=torch.float32, shape=(-1, -1, -1, -1))


def faint_bands(fitted):
    deviation = fitted.node.deviation
    for index in (deviation < fitted.node.least).nonzero().flatten().tolist():
        yield f"{fitted.band(index, len(deviation))} is faint in {fitted.pixels} pixels"


@NodeFacts(
    recipe=Recipe("data", Moments, {"diagonal": True}),
    affine=("data", "standard"),
    pixelwise=True,
    keeps_bands=True,
    health=faint_bands,
)
class Standardizer(Node):
    """Subtracts each band's mean and divides by its standard deviation."""

    _category = NodeCategory.TRANSFORM
    _tags = frozenset({NodeTag.LEARNABLE})
    INPUT_SPECS, OUTPUT_SPECS = {"data": CUBE}, {"standard": CUBE}
    TRAINABLE_BUFFERS = ("mean", "deviation")

    def __init__(self, channels, least=0.0, **kwargs):
        super().__init__(channels=channels, least=least, **kwargs)
        self.least = least
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))

    def statistical_initialization(self, input_stream):
        pixels = torch.cat([batch["data"].flatten(0, -2) for batch in input_stream])
        self.mean, self.deviation = pixels.mean(dim=0).float(), pixels.std(dim=0).float()
        self._statistically_initialized = True

    def forward(self, data, **_):
        return {"standard": (data - self.mean) / self.deviation}
