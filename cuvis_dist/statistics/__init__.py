"""What is a mergeable statistic? Pure tensors: no Ray, no cuvis.ai, no files."""

from cuvis_dist.statistics.drawn import Drawn, DrawnSample
from cuvis_dist.statistics.extrema import Extrema, FrameQuantiles
from cuvis_dist.statistics.moments import ExactMoments, Moments
from cuvis_dist.statistics.sample import PixelSample
from cuvis_dist.statistics.statistic import Statistic, from_arrow, from_bytes
from cuvis_dist.statistics.tree import MergeTree

__all__ = [
    "Drawn",
    "DrawnSample",
    "ExactMoments",
    "Extrema",
    "FrameQuantiles",
    "MergeTree",
    "Moments",
    "PixelSample",
    "Statistic",
    "from_arrow",
    "from_bytes",
]
