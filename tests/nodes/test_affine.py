"""Which affine map do fitted nodes compute, and what if they compute none?"""

from __future__ import annotations

import pytest
import torch
from cuvis_ai.node.normalization import MinMaxNormalizer, PerPixelUnitNorm
from cuvis_ai.node.pretreatments.scaling import MeanCenter

from cuvis_dist.nodes.affine import Hop, probe


def pixels():
    return torch.rand(50, 3, generator=torch.Generator().manual_seed(3))


def test_the_map_of_a_chain_is_that_of_its_nodes_one_after_the_other():
    center, scale = MeanCenter(), MinMaxNormalizer(eps=0.0)
    cube = pixels().reshape(1, 10, 5, 3)
    center.statistical_initialization(iter([{"cube": cube}]))
    centered = center.forward(cube=cube)["cube"]
    scale.statistical_initialization(iter([{"data": centered}]))
    A, b = probe((Hop(center, "cube", "cube"), Hop(scale, "data", "normalized")), pixels())

    mean = pixels().double().mean(dim=0)
    lowest, highest = (pixels().double() - mean).aminmax()
    slope = 1 / (highest - lowest)
    torch.testing.assert_close(A, slope * torch.eye(3, dtype=torch.float64), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(b, -slope * (mean + lowest), rtol=1e-5, atol=1e-6)


def test_what_is_no_affine_map_of_real_pixels_is_refused():
    norm = PerPixelUnitNorm(name="norm")
    with pytest.raises(ValueError, match="norm is no affine map of these pixels"):
        probe((Hop(norm, "data", "normalized"),), pixels())
