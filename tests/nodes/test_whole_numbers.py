"""On scenes of whole numbers, is a fitted node as near to rational arithmetic as upstream's?"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from archives import real_scene
from cuvis_ai.node.anomaly.deep_svdd import ZScoreNormalizerGlobal
from cuvis_ai.node.anomaly.lad_detector import LADGlobal
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.normalization import MinMaxNormalizer
from cuvis_ai.node.pretreatments.scaling import MeanCenter, UnitVarianceScaling

from cuvis_dist.nodes.affine import Hop, probe
from cuvis_dist.nodes.catalogue import recipe_for
from cuvis_dist.statistics import Extrema, Moments

pytestmark = pytest.mark.kernels


def generated(lowest: int, highest: int) -> list[np.ndarray]:
    """Frames of correlated bands, in the range of a sensor or of a corner of it."""
    rng = np.random.default_rng(lowest)
    common = rng.normal(0, 1, (5, 30, 40, 3)) @ rng.normal(0, 1, (3, 14))
    noisy = common + rng.normal(0, 0.3, common.shape)
    scaled = (noisy - noisy.min()) / (noisy.max() - noisy.min()) * (highest - lowest)
    return list(np.round(lowest + scaled).astype(np.uint16))


def one_bit() -> list[np.ndarray]:
    """Frames of which the mean is 10⁵ deviations."""
    return list(
        np.random.default_rng(1).integers(65_534, 65_536, (5, 30, 40, 14)).astype(np.uint16)
    )


def airborne(tmp_path) -> list[np.ndarray]:
    real_scene("lhdata", tmp_path)
    return [np.load(path)["cube"].astype(np.uint16) for path in sorted(tmp_path.glob("*.npz"))]


SCENES = {
    "12 bits": lambda _: generated(0, 4095),
    "16 bits": lambda _: generated(0, 65535),
    "bright": lambda _: generated(65_000, 65_535),
    "one bit": lambda _: one_bit(),
    "airborne": airborne,
}


class Case(NamedTuple):
    """A node, and what its buffers are by definition, of mean and covariance."""

    node: Callable[[int], Any]
    buffers: dict[str, Callable[[Any, Any], Any]]


mean_of = lambda mean, cov: mean  # noqa: E731
deviation_of = lambda mean, cov: [math.sqrt(row[i]) for i, row in enumerate(cov)]  # noqa: E731
RX = Case(
    lambda channels: RXGlobal(channels, eps=0.0), {"mu": mean_of, "cov": lambda mean, cov: cov}
)
CASES = {
    "RXGlobal": RX,
    "LADGlobal": Case(lambda channels: LADGlobal(channels), {"M": mean_of}),
    "ZScoreNormalizerGlobal": Case(
        lambda channels: ZScoreNormalizerGlobal(num_channels=channels),
        {"zscore_mean": mean_of, "zscore_std": deviation_of},
    ),
    "UnitVarianceScaling": Case(lambda _: UnitVarianceScaling(), {"std_c": deviation_of}),
    "MeanCenter": Case(lambda _: MeanCenter(), {"mean_c": mean_of}),
}


@pytest.fixture(scope="module", params=SCENES)
def scene(request, tmp_path_factory):
    """The frames, and their mean and covariance as fractions."""
    frames = SCENES[request.param](tmp_path_factory.mktemp("scene"))
    x = np.concatenate([frame.reshape(-1, frame.shape[-1]) for frame in frames]).astype(np.int64)
    n, sums, products = len(x), x.sum(axis=0).tolist(), (x.T @ x).tolist()
    mean = [Fraction(total, n) for total in sums]
    covariance = [
        [Fraction(n * xy - a * b, n * (n - 1)) for xy, b in zip(row, sums, strict=True)]
        for row, a in zip(products, sums, strict=True)
    ]
    return frames, mean, covariance


def moments(frames) -> Any:
    of_each = (Moments.measure(torch.from_numpy(f).reshape(-1, f.shape[-1])) for f in frames)
    return reduce(lambda a, b: a.merge(b), of_each)


def fit(node: Any, statistic: Any) -> None:
    recipe = recipe_for(node)
    alone = recipe.options.get("diagonal")
    recipe.freeze(node, statistic.only_diagonal() if alone else statistic)


def off(found: torch.Tensor, exact: Any) -> float:
    """Relative error in the Frobenius norm."""
    expected = torch.tensor(np.array(exact, dtype=float))
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_no_buffer_is_farther_off_than_upstreams(scene, case):
    """Float32 rounds both; upstream's nodes add up the same whole numbers in float64.

    An entry half-way between two float32 values may fall to either side.
    """
    frames, mean, covariance = scene
    channels = frames[0].shape[-1]
    ours, theirs = case.node(channels), case.node(channels)
    port = recipe_for(ours).port
    theirs.statistical_initialization(
        {port: torch.from_numpy(f[None] * 1.0).float()} for f in frames
    )
    fit(ours, moments(frames))
    for name, by_definition in case.buffers.items():
        exact = by_definition(mean, covariance)
        found = [off(getattr(node, name), exact) for node in (ours, theirs)]
        assert found[0] <= found[1] * (1 + 1e-8), (
            f"{name} is {found[0]:.3g} off, upstream's {found[1]:.3g}"
        )
        assert found[0] < 1e-7


def test_behind_a_normalizer_the_covariance_is_nearer(scene):
    """Upstream's detector is given pixels that were rounded to float32 before it."""
    frames, _, covariance = scene
    cubes = [torch.from_numpy(frame[None] * 1.0).float() for frame in frames]
    normalizer = MinMaxNormalizer()
    of_each = (Extrema.measure(cube.reshape(-1, cube.shape[-1])) for cube in cubes)
    extrema = reduce(Extrema.merge, of_each)
    fit(normalizer, extrema)
    ours, theirs = (RX.node(extrema.channels) for _ in range(2))
    theirs.statistical_initialization(
        {"data": normalizer.forward(data=cube)["normalized"]} for cube in cubes
    )
    hop = Hop(normalizer, "data", "normalized")
    map_of = probe((hop,), cubes[0].reshape(-1, extrema.channels))
    fit(ours, moments(frames).affine(*map_of))
    width = Fraction(int(extrema.maximum.max() - extrema.minimum.min()))
    exact = [[value / width**2 for value in row] for row in covariance]
    in_float64 = [node._welford._M2 / (node._welford.count - 1) for node in (ours, theirs)]
    assert off(in_float64[0], exact) < off(in_float64[1], exact)
    assert off(ours.cov, exact) <= off(theirs.cov, exact)
