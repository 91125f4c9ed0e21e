"""Every recipe against the node's own fit on the data themselves, without Ray."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from archives import relative_difference
from cuvis_ai.node.anomaly.deep_svdd import DeepSVDDCenterTracker, ZScoreNormalizerGlobal
from cuvis_ai.node.anomaly.lad_detector import LADGlobal
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.channel_mixer import LearnableChannelMixer
from cuvis_ai.node.channel_selector import (
    FixedWavelengthSelector,
    HighContrastSelector,
    SoftChannelSelector,
)
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import MinMaxNormalizer, PercentileNormalizer
from cuvis_ai.node.pretreatments.scaling import MeanCenter, UnitVarianceScaling

from cuvis_dist.initialization import recipe_for

C = 12
NODES = {
    "min-max": lambda: MinMaxNormalizer(),
    "selector, variance": lambda: SoftChannelSelector(3, C, init_method="variance"),
    "selector, uniform": lambda: SoftChannelSelector(3, C),
    "rx": lambda: RXGlobal(C),
    "rx, no cached inverse": lambda: RXGlobal(C, cache_inverse=False),
    "pca": lambda: TrainablePCA(C, 4),
    "score to logit": lambda: ScoreToLogit(),
    "lad": lambda: LADGlobal(C),
    "z-score": lambda: ZScoreNormalizerGlobal(num_channels=C),
    "svdd center": lambda: DeepSVDDCenterTracker(rep_dim=C),
    "mixer": lambda: LearnableChannelMixer(C, 3, init_method="pca"),
    "mean center": lambda: MeanCenter(),
    "unit variance": lambda: UnitVarianceScaling(),
    "percentile": lambda: PercentileNormalizer(C, norm_mode="statistical"),
    "percentile, inverted": lambda: PercentileNormalizer(C, norm_mode="statistical", invert=True),
    "band selector": lambda: FixedWavelengthSelector(norm_mode="statistical"),
    "index selector": lambda: HighContrastSelector(norm_mode="statistical"),
}


def measure(recipe, node, *batches):
    """Measure batches one by one and merge."""
    return reduce(
        lambda a, b: a.merge(b),
        [recipe.statistic.measure(recipe.pixels(node, b), **recipe.options) for b in batches],
    )


def frames(channels, mean):
    """Five frames of reflectance-like pixels with correlated bands."""
    generator = torch.Generator().manual_seed(11)
    mixing = torch.randn(channels, channels, generator=generator) * 0.1
    return [torch.randn(1, 9, 7, channels, generator=generator) @ mixing + mean for _ in range(5)]


@pytest.mark.parametrize("mean", [0.3, 300.0], ids=["reflectance", "large mean"])
@pytest.mark.parametrize("name", NODES)
def test_fitting_on_the_surrogate_equals_fitting_on_the_data(name, mean):
    ours, theirs = NODES[name](), NODES[name]()
    ours.load_state_dict(theirs.state_dict())
    recipe = recipe_for(ours)
    wavelengths = np.linspace(430, 910, C).astype(np.int32)
    cubes = frames(1 if recipe.port == "scores" else C, mean)
    data = [{recipe.port: x, "wavelengths": wavelengths} for x in cubes]

    theirs.statistical_initialization(iter(data))
    statistic = measure(recipe, ours, *data)
    ours._statistically_initialized = False
    recipe.freeze(ours, statistic)

    for key, value in theirs.state_dict().items():
        tolerance = 1e-5 if key == "cov_inv" else 1e-6
        assert relative_difference(ours.state_dict()[key], value) <= tolerance, key


@pytest.mark.parametrize("make", [lambda: RXGlobal(C), lambda: ScoreToLogit()])
def test_too_little_data_is_the_nodes_own_error(make):
    node = make()
    recipe = recipe_for(node)
    pixel = torch.rand(1, 1, 1, 1 if recipe.port == "scores" else C)
    with pytest.raises(RuntimeError, match="insufficient samples"):
        recipe.freeze(node, measure(recipe, node, {recipe.port: pixel}))


def test_order_dependent_settings_and_overriding_subclasses_are_streamed():
    class Mine(RXGlobal):
        def statistical_initialization(self, input_stream):
            super().statistical_initialization(input_stream)

    class Same(RXGlobal):
        pass

    assert recipe_for(MinMaxNormalizer(max_initialization_frames=3)) is None
    assert recipe_for(Mine(C)) is None
    assert recipe_for(Same(C)) == recipe_for(RXGlobal(C))
