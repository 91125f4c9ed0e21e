"""Can a frame be computed strip by strip, and how is it cut?

Where every node before the measured ones maps each pixel by itself, rows of a frame go through
them strip by strip: what the nodes allocate on the way then fits a core's cache, and a worker
holds one cube whatever the nodes before do with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from cuvis_ai.node.anomaly.deep_svdd import (
    DeepSVDDProjection,
    DeepSVDDScores,
    ZScoreNormalizerGlobal,
)
from cuvis_ai.node.anomaly.lad_detector import LADGlobal
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.channel_selector import SoftChannelSelector
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.data import AnomalyDataNode, CU3SDataNode
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import IdentityNormalizer, MinMaxNormalizer, PerPixelUnitNorm
from cuvis_ai.node.preprocessors import BandpassByWavelength
from cuvis_ai.node.pretreatments.scaling import MeanCenter, UnitVarianceScaling
from cuvis_ai_core.node.node import Node

#: Classes that map each pixel by itself once they are fitted; their subclasses do while they
#: share ``forward``. Any other node is given whole frames.
_PIXELWISE: tuple[type[Node], ...] = (
    AnomalyDataNode,
    BandpassByWavelength,
    CU3SDataNode,
    DeepSVDDProjection,
    DeepSVDDScores,
    IdentityNormalizer,
    LADGlobal,
    MeanCenter,
    MinMaxNormalizer,
    PerPixelUnitNorm,
    RXGlobal,
    ScoreToLogit,
    SoftChannelSelector,
    TrainablePCA,
    UnitVarianceScaling,
    ZScoreNormalizerGlobal,
)

#: Values in one strip of the widest port: 4 MiB in float32.
_STRIP_VALUES = 1 << 20


def is_pixelwise(node: Node) -> bool:
    """Whether ``node`` maps each pixel by itself, given the rest of its frame or not."""
    if isinstance(node, MinMaxNormalizer) and not node.use_running_stats:
        return False
    same = (cls for cls in _PIXELWISE if isinstance(node, cls))
    return any(type(node).forward is cls.forward for cls in same)


def strips(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Cut a batch of one frame into strips of rows, as views, from top to bottom.

    Every ``[1, H, W, ...]`` tensor is cut; a batch whose images differ in size stays whole.
    """
    images = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and v.ndim >= 3}
    sizes = {tuple(v.shape[:3]) for v in images.values()}
    if len(sizes) != 1:
        yield batch
        return
    (_, height, _) = sizes.pop()
    row = max(v[0, :1].numel() for v in images.values())
    rows = max(1, _STRIP_VALUES // max(1, row))
    for start in range(0, height, rows):
        yield batch | {k: v[:, start : start + rows] for k, v in images.items()}
