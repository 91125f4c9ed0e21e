"""What is known about each node class? One entry per class, with all that the rest asks about it.

A new node of upstream's gets one entry here and one row in the tables of ``tests/nodes``; one's own
class is decorated with :class:`NodeFacts`. Classes without an entry work: they are fitted by their
own code on a stream of their inputs, given whole frames, and end chains of affine nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from cuvis_ai.node.anomaly.deep_svdd import (
    DeepSVDDCenterTracker,
    DeepSVDDProjection,
    DeepSVDDScores,
    ZScoreNormalizerGlobal,
)
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
from cuvis_ai.node.data import AnomalyDataNode, CU3SDataNode
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import (
    IdentityNormalizer,
    MinMaxNormalizer,
    PercentileNormalizer,
    PerPixelUnitNorm,
)
from cuvis_ai.node.preprocessors import BandpassByWavelength
from cuvis_ai.node.pretreatments.scaling import MeanCenter, UnitVarianceScaling
from cuvis_ai.node.svm import OneClassSVMDetector
from cuvis_ai.node.unmixing.nmf import NMFUnmixing
from cuvis_ai_core.node.node import Node

from cuvis_dist.nodes import health, yardsticks
from cuvis_dist.nodes.affine import Hop
from cuvis_dist.nodes.recipe import (
    CollectedRecipe,
    ColoursRecipe,
    InvertedRecipe,
    PooledRecipe,
    Recipe,
)
from cuvis_dist.nodes.yardsticks import Yardstick
from cuvis_dist.statistics import Extrema, FrameQuantiles, Moments, PixelSample

ClassT = TypeVar("ClassT", bound=type[Node])

#: The facts are kept on the class itself: a class of a notebook, which travels to workers by value,
#: takes them along.
_HOME = "_cuvis_dist_facts"

#: A subclass shares a fact of its base only while it shares the method that the fact is about.
_ABOUT = {
    "recipe": "statistical_initialization",
    "affine": "forward",
    "pixelwise": "forward",
}


@dataclass(frozen=True)
class NodeFacts:
    """What is known about one node class; decorates the class.

    Everything has a default, and a fact that a class does not state is that of its base. The
    first three may depend on a node's settings: then they are functions of the node.

    Attributes
    ----------
    recipe : Recipe, or function of a node that returns one or None
        How the node is fitted. None from the function: these settings ask for something that
        merges no statistic, and the node is streamed.
    affine : tuple of str, or function of a node that returns one or None
        ``(input port, output port)`` between which the fitted node maps each pixel affinely.
        Moments and extrema behind it are then derived instead of measured.
    pixelwise : bool, or function of a node that returns one
        Whether the fitted node maps each pixel by itself, so that a frame may be given to it a
        few rows at a time.
    keeps_bands : bool
        Whether its output bands are its input bands, so that a wavelength still names one.
    annotation : str
        The output port with the annotation of a frame, nonzero where an anomaly is marked.
    health : function of :class:`~cuvis_dist.nodes.health.Fitted` that yields messages
        What looks bad about the fitted state. Without one, bounds of zero width do.
    yardsticks : dict of str to Yardstick
        In what a change of a buffer is measured, by its name: see
        :mod:`~cuvis_dist.nodes.yardsticks`.

    Examples
    --------
    >>> @NodeFacts(recipe=Recipe("data", Moments), affine=("data", "white"), pixelwise=True)
    ... class Whitening(Node): ...
    """

    recipe: Recipe | Callable[[Any], Recipe | None] | None = None
    affine: tuple[str, str] | Callable[[Any], tuple[str, str] | None] | None = None
    pixelwise: bool | Callable[[Any], bool] | None = None
    keeps_bands: bool | None = None
    annotation: str | None = None
    health: health.Check | None = None
    yardsticks: Mapping[str, Yardstick] | None = None

    def __call__(self, node_class: ClassT) -> ClassT:
        """State these facts about ``node_class``, and return it."""
        setattr(node_class, _HOME, self)
        return node_class


# ---- what the rest asks ----------------------------------------------------------------


def recipe_for(node: Node) -> Recipe | None:
    """Return the recipe of ``node``, or None when it must be streamed."""
    recipe = _stated(type(node), "recipe")
    return recipe(node) if callable(recipe) else recipe


def is_known(node_class: type[Node]) -> bool:
    """Whether a recipe, or the decision to stream, was made for this class."""
    return _stated(node_class, "recipe") is not None


def affine_hop(node: Node, output: str) -> Hop | None:
    """Return the hop that ends at ``output`` of ``node``, or None if it is not affine."""
    affine = _stated(type(node), "affine")
    ports = affine(node) if callable(affine) else affine
    return Hop(node, *ports) if ports and ports[1] == output else None


def is_pixelwise(node: Node) -> bool:
    """Whether ``node`` maps each pixel by itself, given the rest of its frame or not."""
    pixelwise = _stated(type(node), "pixelwise")
    return bool(pixelwise(node) if callable(pixelwise) else pixelwise)


def keeps_bands(node: Node) -> bool:
    """Whether the bands that ``node`` gives are those that it was given."""
    return bool(_stated(type(node), "keeps_bands"))


def annotation_port(node: Node) -> str | None:
    """Return the output port that carries the annotation of a frame, if ``node`` has one."""
    return _stated(type(node), "annotation")


def check(fitted: health.Fitted) -> list[str]:
    """Return a message for each thing that looks bad about a fitted node."""
    look: health.Check = _stated(type(fitted.node), "health") or health.bounds
    return list(look(fitted))


def yardsticks_of(node_class: type[Node]) -> Mapping[str, Yardstick]:
    """Return in what changes of a class's buffers are measured, by name, as far as is known."""
    return _stated(node_class, "yardsticks") or {}


def _stated(node_class: type[Node], fact: str) -> Any:
    """Return what the nearest class that states ``fact`` says, or None."""
    for base in node_class.__mro__:
        value = getattr(vars(base).get(_HOME), fact, None)
        if value is not None:
            method = _ABOUT.get(fact)
            same = method is None or getattr(node_class, method) is getattr(base, method)
            return value if same else None
    return None


# ---- facts that depend on a node's settings --------------------------------------------


def _extrema(node: MinMaxNormalizer) -> Recipe | None:
    # A cap on the frames depends on their order.
    return Recipe("data", Extrema) if node.max_initialization_frames is None else None


def _percentiles(node: PercentileNormalizer) -> Recipe | None:
    if node.statistical_fit == "pooled":
        sample = {"size": node.max_fit_values, "seed": node.seed}
        return PooledRecipe("data", PixelSample, sample)
    if not _carries(node.quantile_low, node.quantile_high):
        return None
    options = {"low": node.quantile_low, "high": node.quantile_high}
    return (InvertedRecipe if node.invert else Recipe)("data", FrameQuantiles, options)


def _colours(node: ChannelSelectorBase) -> Recipe | None:
    low, high = node._NORM_QUANTILE_LOW, node._NORM_QUANTILE_HIGH
    if not _carries(low, high):
        return None
    return ColoursRecipe("cube", FrameQuantiles, {"low": low, "high": high})


def _carries(low: float, high: float) -> bool:
    """Whether the surrogate frame of :class:`FrameQuantiles` has these quantiles exactly."""
    return low < 0.49 and high > 0.51


def _collected(
    node: KMeansClusterer | GaussianMixtureClusterer | OneClassSVMDetector | NMFUnmixing,
) -> Recipe | None:
    if node.max_fit_pixels <= 0:
        return None  # asks for every pixel
    options = {"size": node.max_fit_pixels, "seed": node.fit_seed}
    return CollectedRecipe("cube", PixelSample, options)


def _streamed(node: Node) -> None:
    """Decide that nodes of a class are streamed: no mergeable statistic would do."""


# ---- the entries -----------------------------------------------------------------------

_DIAGONAL = {"diagonal": True}
#: For nodes that cast their input to float32 before they measure.
_SINGLE = {"single": True}

CATALOGUE: dict[type[Node], NodeFacts] = {
    AnomalyDataNode: NodeFacts(pixelwise=True),
    BandpassByWavelength: NodeFacts(pixelwise=True),
    ChannelSelectorBase: NodeFacts(recipe=_colours, yardsticks=yardsticks.bounds()),
    CU3SDataNode: NodeFacts(pixelwise=True, keeps_bands=True, annotation="mask"),
    DeepSVDDCenterTracker: NodeFacts(recipe=Recipe("embeddings", Moments, _DIAGONAL)),
    DeepSVDDProjection: NodeFacts(pixelwise=True),
    DeepSVDDScores: NodeFacts(pixelwise=True),
    GaussianMixtureClusterer: NodeFacts(recipe=_collected),
    IdentityNormalizer: NodeFacts(affine=("data", "normalized"), pixelwise=True),
    KMeansClusterer: NodeFacts(recipe=_collected),
    LADGlobal: NodeFacts(recipe=Recipe("data", Moments, _DIAGONAL), pixelwise=True),
    LearnableChannelMixer: NodeFacts(recipe=Recipe("data", Moments)),
    MeanCenter: NodeFacts(
        recipe=Recipe("cube", Moments, _DIAGONAL, _SINGLE),
        affine=("cube", "cube"),
        pixelwise=True,
        keeps_bands=True,
    ),
    MinMaxNormalizer: NodeFacts(
        recipe=_extrema,
        affine=lambda node: ("data", "normalized") if node.use_running_stats else None,
        pixelwise=lambda node: node.use_running_stats,
        keeps_bands=True,
        yardsticks=yardsticks.bounds(),
    ),
    NMFUnmixing: NodeFacts(recipe=_collected),
    OneClassSVMDetector: NodeFacts(recipe=_collected),
    PercentileNormalizer: NodeFacts(
        recipe=_percentiles, keeps_bands=True, yardsticks=yardsticks.bounds()
    ),
    PerPixelUnitNorm: NodeFacts(pixelwise=True),
    RXGlobal: NodeFacts(
        recipe=Recipe("data", Moments),
        pixelwise=True,
        health=health.rx_covariance,
        yardsticks=yardsticks.mean_and_covariance("mu", "cov"),
    ),
    ScoreToLogit: NodeFacts(
        recipe=Recipe("scores", Moments, _DIAGONAL),
        pixelwise=True,
        health=health.mean_score,
    ),
    SoftChannelSelector: NodeFacts(
        recipe=Recipe("data", Moments, _DIAGONAL),
        affine=("data", "selected"),
        pixelwise=True,
        keeps_bands=True,
        health=health.channel_variances,
    ),
    # Ranks bands by histograms and ROC curves of every labelled pixel: no sample would do.
    SupervisedSelectorBase: NodeFacts(recipe=_streamed),
    TrainablePCA: NodeFacts(
        recipe=Recipe("data", Moments),
        affine=("data", "projected"),
        pixelwise=True,
        health=health.components,
    ),
    UnitVarianceScaling: NodeFacts(
        recipe=Recipe("cube", Moments, _DIAGONAL, _SINGLE),
        affine=("cube", "cube"),
        pixelwise=True,
        keeps_bands=True,
        health=health.deviations,
    ),
    ZScoreNormalizerGlobal: NodeFacts(
        recipe=Recipe("data", Moments, _DIAGONAL),
        affine=("data", "normalized"),
        pixelwise=True,
        keeps_bands=True,
        health=health.z_scores,
        yardsticks=yardsticks.mean_and_deviation("zscore_mean", "zscore_std"),
    ),
}

for _node_class, _facts in CATALOGUE.items():
    _facts(_node_class)
