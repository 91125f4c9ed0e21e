"""Extrema and frame quantiles beyond what every statistic promises: surrogates, affine maps."""

from __future__ import annotations

from functools import reduce

import pytest
import torch

from cuvis_dist.statistics import Extrema, FrameQuantiles


def same(a: Extrema, b: Extrema) -> None:
    assert torch.equal(a.minimum, b.minimum)
    assert torch.equal(a.maximum, b.maximum)


def test_measuring_the_surrogate_gives_the_extrema():
    one = Extrema.measure(torch.randn(500, 6) * torch.logspace(-3, 2, 6))
    same(Extrema.measure(one.surrogate()), one)


@pytest.mark.parametrize("count", [1023, 1024, 5000])
@pytest.mark.parametrize("at", [0, 700, -1])
def test_no_pixel_is_missed_in_long_frames(count, at):
    """Which are reduced in rows of many pixels, and what is left over by itself."""
    x = torch.rand(count, 3)
    x[at, 1], x[at, 2] = 7, -7
    one = Extrema.measure(x)
    assert one.maximum[1] == 7
    assert one.minimum[2] == -7
    x[at, 1] = torch.nan
    assert Extrema.measure(x).maximum[1].isnan()


def test_affine_maps_of_channels_by_themselves():
    x = torch.randn(300, 5, dtype=torch.float64)
    A = torch.diag(torch.tensor([1.0, -2, 0, 3, 4], dtype=torch.float64))
    b = torch.randn(5, dtype=torch.float64)
    mapped, measured = Extrema.measure(x).affine(A, b), Extrema.measure(x @ A.T + b)
    torch.testing.assert_close(mapped.minimum, measured.minimum, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(mapped.maximum, measured.maximum, rtol=1e-14, atol=1e-14)
    with pytest.raises(ValueError, match="mixed channels"):
        Extrema.measure(x).affine(torch.ones(4, 5), torch.zeros(4))
    none = Extrema.measure(x[:0]).affine(A, b)
    assert not (none.minimum.isnan() | none.maximum.isnan()).any()
    assert none.surrogate().shape == (0, 5)


@pytest.mark.parametrize(("low", "high"), [(0.005, 0.995), (0.0, 1.0), (0.48, 0.52)])
def test_frame_quantiles_are_the_nodes_own_and_survive_their_surrogate(low, high):
    """To the last bit of ``torch.quantile``, by which the nodes fit themselves."""
    frames = [torch.randn(77, 3) for _ in range(4)]
    one = reduce(
        FrameQuantiles.merge, [FrameQuantiles.measure(f, low=low, high=high) for f in frames]
    )
    assert torch.equal(
        one.minimum.float(), torch.stack([f.quantile(low, dim=0) for f in frames]).amin(0)
    )
    assert torch.equal(
        one.maximum.float(), torch.stack([f.quantile(high, dim=0) for f in frames]).amax(0)
    )
    same(FrameQuantiles.measure(one.surrogate(), low=low, high=high), one)
    with pytest.raises(ValueError, match="measured where they are used"):
        one.affine(torch.eye(3), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int64, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("channels", [1, 3, 3000])
def test_every_dtype_and_order_in_memory(dtype, channels):
    x = torch.randint(0, 200, (9_000 // channels + 40, channels)).to(dtype)
    expected = x.double().amin(0), x.double().amax(0)
    for view in (x, x.T.contiguous().T):
        one = Extrema.measure(view)
        assert torch.equal(one.minimum, expected[0])
        assert torch.equal(one.maximum, expected[1])
