"""Is what the catalogue says of each class true? Asked of the nodes themselves, without Ray."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from archives import relative_difference
from cuvis_ai.node.anomaly.rx_detector import RXGlobal, RXPerBatch
from cuvis_ai.node.channel_selector import (
    SupervisedFullSpectrumSelector,
)
from cuvis_ai.node.clustering.kmeans import KMeansClusterer
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.data import LentilsAnomalyDataNode
from cuvis_ai.node.normalization import (
    MinMaxNormalizer,
)
from cuvis_ai.node.pretreatments.scaling import MeanCenter
from node_rows import NODES, C

from cuvis_dist import NodeFacts
from cuvis_dist.nodes import strips as cutting
from cuvis_dist.nodes.affine import probe
from cuvis_dist.nodes.catalogue import (
    CATALOGUE,
    affine_hop,
    annotation_port,
    is_known,
    is_pixelwise,
    keeps_bands,
    recipe_for,
)
from cuvis_dist.nodes.strips import strips


def rows(holds):
    """The names of the rows whose nodes ``holds`` is true of."""
    return [name for name, make in NODES.items() if holds(make())]


def merged(node):
    """Whether all pixels make the node's statistic, and no sample of them."""
    recipe = recipe_for(node)
    return recipe is not None and not recipe.statistic.located


def affine_ports(node):
    hops = [affine_hop(node, output) for output in node.OUTPUT_SPECS]
    return [(hop.input, hop.output) for hop in hops if hop is not None]


def test_every_class_of_the_catalogue_has_a_row():
    described = set()
    for make in NODES.values():
        described.add(next(cls for cls in type(make()).__mro__ if cls in CATALOGUE))
    assert described == set(CATALOGUE)


# ---- recipes ---------------------------------------------------------------------------


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
@pytest.mark.parametrize("name", rows(merged))
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


def test_order_dependent_settings_are_streamed():
    assert recipe_for(MinMaxNormalizer(max_initialization_frames=3)) is None
    assert recipe_for(KMeansClusterer(n_clusters=2, max_fit_pixels=0)) is None
    assert recipe_for(SupervisedFullSpectrumSelector(num_spectral_bands=C)) is None


# ---- affine maps -----------------------------------------------------------------------


@pytest.mark.parametrize("name", rows(affine_ports))
def test_affine_nodes_map_pixels_affinely(name):
    node, (cube, *_) = NODES[name](), frames(C, 0.3)
    ((input_port, output_port),) = affine_ports(node)
    if node.requires_initial_fit:
        node.statistical_initialization(iter([{input_port: cube}]))
    pixels = cube.reshape(-1, C)
    A, b = probe((affine_hop(node, output_port),), pixels)
    with torch.no_grad():
        expected = node.forward(**{input_port: cube})[output_port].reshape(len(pixels), -1)
    torch.testing.assert_close(pixels.double() @ A.T + b, expected.double(), rtol=1e-5, atol=1e-6)


# ---- pixel by pixel --------------------------------------------------------------------


def one_frame(node):
    """What a node of the catalogue may be given, of one frame."""
    generator = torch.Generator().manual_seed(5)
    channels = 1 if "scores" in node.INPUT_SPECS else C
    cube = torch.rand(1, 37, 11, channels, generator=generator)
    wavelengths = torch.linspace(430, 910, channels).int()[None]
    ports = dict.fromkeys(("cube", "data", "embeddings", "scores"), cube) | {
        "mask": torch.randint(0, 3, (1, 37, 11), generator=generator, dtype=torch.int32),
        "wavelengths": wavelengths,
        "center": torch.rand(channels, generator=generator),
    }
    if "wavelengths" in node.INPUT_SPECS and len(node.INPUT_SPECS["wavelengths"].shape) == 1:
        ports["wavelengths"] = wavelengths[0]
    return {port: value for port, value in ports.items() if port in node.INPUT_SPECS}


@pytest.mark.parametrize("name", rows(is_pixelwise))
def test_pixelwise_nodes_give_the_same_for_strips(name, monkeypatch):
    """A class that looks at a pixel's neighbours must not say that it is pixelwise."""
    node = NODES[name]()
    whole = one_frame(node)
    channels = next(value for value in whole.values() if value.ndim == 4).shape[-1]
    monkeypatch.setattr(cutting, "_STRIP_VALUES", 5 * 11 * channels)
    if node.requires_initial_fit:
        node.statistical_initialization(iter([whole]))
    with torch.no_grad():
        expected = node.forward(**whole)
        parts = [node.forward(**part) for part in strips(whole, nodes=4)]
    assert len(parts) == 8
    images = [k for k, v in expected.items() if isinstance(v, torch.Tensor) and v.ndim >= 3]
    for port in images:
        got = torch.cat([part[port] for part in parts], dim=1)
        torch.testing.assert_close(got, expected[port], rtol=1e-6, atol=1e-7)
    assert images


def test_nodes_that_look_at_the_frame_are_given_whole_frames():
    assert not is_pixelwise(RXPerBatch())
    assert not is_pixelwise(MinMaxNormalizer(use_running_stats=False))
    assert not affine_ports(MinMaxNormalizer(use_running_stats=False))


# ---- subclasses ------------------------------------------------------------------------


def test_a_subclass_shares_what_its_methods_share():
    class Same(RXGlobal):
        pass

    class OtherFit(RXGlobal):
        def statistical_initialization(self, input_stream):
            super().statistical_initialization(input_stream)

    class OtherForward(MeanCenter):
        def forward(self, cube, **_):
            return {"cube": cube - cube.mean(dim=(1, 2), keepdim=True)}

    assert recipe_for(Same(C)) == recipe_for(RXGlobal(C))
    assert is_pixelwise(Same(C))
    assert recipe_for(OtherFit(C)) is None
    assert not is_known(OtherFit)
    assert is_pixelwise(OtherFit(C))
    assert recipe_for(OtherForward()) == recipe_for(MeanCenter())
    assert not is_pixelwise(OtherForward())
    assert affine_hop(OtherForward(), "cube") is None


def test_a_subclass_has_the_facts_that_it_states_and_its_bases_others():
    @NodeFacts(pixelwise=False)
    class Blurred(MeanCenter):
        def forward(self, cube, **_):
            return super().forward(cube=(cube + cube.roll(1, dims=2)) / 2)

    assert not is_pixelwise(Blurred())
    assert is_pixelwise(MeanCenter())
    assert keeps_bands(Blurred())
    assert recipe_for(Blurred()) == recipe_for(MeanCenter())
    lentils = LentilsAnomalyDataNode(normal_class_ids=[0])
    assert annotation_port(lentils) == "mask"
    assert keeps_bands(lentils)
    assert is_pixelwise(lentils)


def test_facts_travel_with_a_class_that_travels_by_value(ray_session):
    """As a class of a notebook does, whose module no worker can import."""
    import ray

    @NodeFacts(pixelwise=lambda node: node.channels == C)
    class Mine(RXGlobal):
        channels = C

        def forward(self, data, **_):
            return {"scores": data[..., :1]}

    there = ray.remote(num_cpus=0)(is_pixelwise)
    assert ray.get(there.remote(Mine(C)))
