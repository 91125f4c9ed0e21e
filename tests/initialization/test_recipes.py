"""Every recipe against the node's own fit on the data themselves, without Ray."""

from __future__ import annotations

import pytest
import torch
from archives import relative_difference
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.channel_selector import SoftChannelSelector
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import MinMaxNormalizer

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
}


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
    data = [{recipe.port: x} for x in frames(1 if recipe.port == "scores" else C, mean)]

    theirs.statistical_initialization(iter(data))
    statistic = recipe.measure(data[0])
    for inputs in data[1:]:
        statistic = statistic.merge(recipe.measure(inputs))
    ours._statistically_initialized = False
    recipe.freeze(ours, statistic)

    assert ours._statistically_initialized
    for key, value in theirs.state_dict().items():
        tolerance = 1e-5 if key == "cov_inv" else 1e-6
        assert relative_difference(ours.state_dict()[key], value) <= tolerance, key


@pytest.mark.parametrize("make", [lambda: RXGlobal(C), lambda: ScoreToLogit()])
def test_too_little_data_is_the_nodes_own_error(make):
    node = make()
    recipe = recipe_for(node)
    pixel = torch.rand(1, 1, 1, 1 if recipe.port == "scores" else C)
    with pytest.raises(RuntimeError, match="insufficient samples"):
        recipe.freeze(node, recipe.measure({recipe.port: pixel}))


def test_order_dependent_settings_and_overriding_subclasses_are_streamed():
    class Mine(RXGlobal):
        def statistical_initialization(self, input_stream):
            super().statistical_initialization(input_stream)

    class Same(RXGlobal):
        pass

    assert recipe_for(MinMaxNormalizer(max_initialization_frames=3)) is None
    assert recipe_for(Mine(C)) is None
    assert recipe_for(Same(C)) == recipe_for(RXGlobal(C))
