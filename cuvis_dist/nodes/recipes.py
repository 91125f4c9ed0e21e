"""What does a node class need to be fitted: which statistic of which input port?

A recipe never writes into a node. The merged statistic becomes a few surrogate pixels, and
the node's own ``statistical_initialization`` reads those instead of the archive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from cuvis_ai.node.anomaly.deep_svdd import DeepSVDDCenterTracker, ZScoreNormalizerGlobal
from cuvis_ai.node.anomaly.lad_detector import LADGlobal
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.channel_mixer import LearnableChannelMixer
from cuvis_ai.node.channel_selector import (
    ChannelSelectorBase,
    SoftChannelSelector,
    SupervisedSelectorBase,
)
from cuvis_ai.node.clustering.gmm import GaussianMixtureClusterer
from cuvis_ai.node.clustering.kmeans import KMeansClusterer
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import MinMaxNormalizer, PercentileNormalizer
from cuvis_ai.node.pretreatments.scaling import MeanCenter, UnitVarianceScaling
from cuvis_ai.node.svm import OneClassSVMDetector
from cuvis_ai.node.unmixing.nmf import NMFUnmixing
from cuvis_ai_core.node.metric_utils import subsample_hw
from cuvis_ai_core.node.node import Node
from torch import Tensor

from cuvis_dist.statistics import Extrema, FrameQuantiles, Moments, PixelSample, Statistic

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


# ---- moments ---------------------------------------------------------------------------

_DIAGONAL = {"diagonal": True}
#: For nodes that cast their input to float32 before they measure.
_WIDE = {"means": 8192}


@recipe(RXGlobal)
def _rx_global(node: RXGlobal) -> Recipe:
    return Recipe("data", Moments)


@recipe(TrainablePCA)
def _trainable_pca(node: TrainablePCA) -> Recipe:
    return Recipe("data", Moments)


@recipe(LearnableChannelMixer)
def _channel_mixer(node: LearnableChannelMixer) -> Recipe:
    return Recipe("data", Moments)


@recipe(SoftChannelSelector)
def _soft_channel_selector(node: SoftChannelSelector) -> Recipe:
    return Recipe("data", Moments, _DIAGONAL)


@recipe(ScoreToLogit)
def _score_to_logit(node: ScoreToLogit) -> Recipe:
    return Recipe("scores", Moments, _DIAGONAL)


@recipe(LADGlobal)
def _lad_global(node: LADGlobal) -> Recipe:
    return Recipe("data", Moments, _DIAGONAL)


@recipe(ZScoreNormalizerGlobal)
def _z_score(node: ZScoreNormalizerGlobal) -> Recipe:
    return Recipe("data", Moments, _DIAGONAL)


@recipe(DeepSVDDCenterTracker)
def _svdd_center(node: DeepSVDDCenterTracker) -> Recipe:
    return Recipe("embeddings", Moments, _DIAGONAL)


@recipe(MeanCenter)
def _mean_center(node: MeanCenter) -> Recipe:
    return Recipe("cube", Moments, _DIAGONAL, _WIDE)


@recipe(UnitVarianceScaling)
def _unit_variance(node: UnitVarianceScaling) -> Recipe:
    return Recipe("cube", Moments, _DIAGONAL, _WIDE)


# ---- extrema and percentile bounds -----------------------------------------------------


@recipe(MinMaxNormalizer)
def _min_max(node: MinMaxNormalizer) -> Recipe | None:
    # A cap on the frames depends on their order.
    return Recipe("data", Extrema) if node.max_initialization_frames is None else None


class _InvertedRecipe(Recipe):
    """Measures what the node measures, the negated values, and hands them back as they came."""

    shareable = False

    def pixels(self, node: Node, inputs: dict[str, Any]) -> Tensor:
        return -super().pixels(node, inputs)

    def freeze(self, node: Node, statistic: Statistic) -> None:
        assert isinstance(statistic, FrameQuantiles)
        low, high = -statistic.maximum, -statistic.minimum
        super().freeze(node, replace(statistic, minimum=low, maximum=high))


@recipe(PercentileNormalizer)
def _percentile(node: PercentileNormalizer) -> Recipe | None:
    if node.statistical_fit == "pooled":
        sample = {"size": node.max_fit_values, "seed": node.seed}
        return _PooledRecipe("data", PixelSample, sample)
    if not _carries(node.quantile_low, node.quantile_high):
        return None
    options = {"low": node.quantile_low, "high": node.quantile_high}
    return (_InvertedRecipe if node.invert else Recipe)("data", FrameQuantiles, options)


class _SelectorRecipe(Recipe):
    """Percentile bounds of the colours that a band selector makes of a cube.

    Colours are no affine map of the cube (an index is a ratio), so they are what is measured,
    and the surrogate consists of colours too: the node's own fit gets them in place of those
    that it would make.
    """

    shareable = False

    def pixels(self, node: Any, inputs: dict[str, Any]) -> Tensor:
        return node._compute_raw_rgb(inputs["cube"], inputs["wavelengths"]).reshape(-1, 3)

    def freeze(self, node: Any, statistic: Statistic) -> None:
        colours = statistic.surrogate().float().reshape(1, -1, 1, 3)
        batches = [{"cube": colours, "wavelengths": None}] if colours.numel() else []
        node._compute_raw_rgb = lambda cube, wavelengths: cube
        try:
            node.statistical_initialization(iter(batches))
        finally:
            del node._compute_raw_rgb


@recipe(ChannelSelectorBase)
def _band_selector(node: ChannelSelectorBase) -> Recipe | None:
    low, high = node._NORM_QUANTILE_LOW, node._NORM_QUANTILE_HIGH
    if not _carries(low, high):
        return None
    return _SelectorRecipe("cube", FrameQuantiles, {"low": low, "high": high})


def _carries(low: float, high: float) -> bool:
    """Whether the surrogate frame of :class:`FrameQuantiles` has these quantiles exactly."""
    return low < 0.49 and high > 0.51


# ---- samples of pixels -----------------------------------------------------------------


class _CollectedRecipe(Recipe):
    """The pixels that a node would collect; a connected mask chooses the foreground."""

    shareable = False

    def counts(self, node: Node, inputs: dict[str, Any]) -> Tensor | None:
        mask = inputs.get("mask")
        return None if mask is None else mask.reshape(-1) > 0


def _collected(
    node: KMeansClusterer | GaussianMixtureClusterer | OneClassSVMDetector | NMFUnmixing,
) -> Recipe | None:
    if node.max_fit_pixels <= 0:
        return None  # asks for every pixel
    options = {"size": node.max_fit_pixels, "seed": node.fit_seed}
    return _CollectedRecipe("cube", PixelSample, options)


recipe(KMeansClusterer)(_collected)
recipe(GaussianMixtureClusterer)(_collected)
recipe(OneClassSVMDetector)(_collected)
recipe(NMFUnmixing)(_collected)


class _PooledRecipe(Recipe):
    """Every ``fit_subsample``-th pixel in both axes of a frame."""

    shareable = False
    by_strips = False

    def counts(self, node: Any, inputs: dict[str, Any]) -> Tensor:
        chosen = torch.zeros((*inputs[self.port].shape[:-1], 1), dtype=torch.bool)
        subsample_hw(chosen, node.fit_subsample).fill_(True)
        return chosen.reshape(-1)

    def freeze(self, node: Any, statistic: Statistic) -> None:
        # As frames of one pixel, of which the node's own stride leaves all.
        frames = statistic.surrogate().reshape(-1, 1, 1, statistic.channels)
        frames = frames.to(node.running_min.device)
        node.statistical_initialization({self.port: cube} for cube in frames.split(len(frames)))


# ---- nodes that are streamed -----------------------------------------------------------


@recipe(SupervisedSelectorBase)
def _supervised_selector(node: SupervisedSelectorBase) -> None:
    """Ranks bands by histograms and ROC curves of every labelled pixel: no sample would do."""


def is_known(node_class: type[Node]) -> bool:
    """Whether a recipe, or the decision to stream, was made for this class."""
    return any(
        cls in _RECIPES and node_class.statistical_initialization is cls.statistical_initialization
        for cls in node_class.__mro__
    )
