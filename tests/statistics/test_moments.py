"""Moments beyond what every statistic promises: surrogates, affine maps, variances alone."""

from __future__ import annotations

import pytest
import torch

from cuvis_dist.statistics import Moments

pytestmark = pytest.mark.kernels


def close(a: Moments, b: Moments, tolerance: float = 1e-12) -> None:
    assert a.n == b.n
    for ours, theirs in ((a.mean, b.mean), (a.M2, b.M2)):
        assert ours.shape == theirs.shape
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def pixels(count: int, channels: int, rank: int | None = None) -> torch.Tensor:
    """Correlated pixels whose channels have very different sizes."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(count, rank or channels, generator=generator, dtype=torch.float64)
    mixing = torch.randn(rank or channels, channels, generator=generator, dtype=torch.float64)
    return (x @ mixing + 3) * torch.logspace(-3, 2, channels, dtype=torch.float64)


@pytest.mark.parametrize("means", [0, 1, 100])
@pytest.mark.parametrize("diagonal", [True, False])
def test_measuring_the_surrogate_gives_the_moments(means, diagonal):
    """Copies of the mean change the other pixels, not what they carry."""
    one = Moments.measure(pixels(500, 6), diagonal=diagonal)
    surrogate = one.surrogate(means)
    assert len(surrogate) == 12 + means
    again = Moments.measure(surrogate, diagonal=diagonal)
    torch.testing.assert_close(again.mean, one.mean, rtol=1e-13, atol=0)
    assert (again.covariance - one.covariance).norm() <= 1e-13 * one.covariance.norm()


def test_the_surrogate_of_a_singular_covariance():
    one = Moments.measure(pixels(8, 20, rank=7))
    again = Moments.measure(one.surrogate())
    assert (again.covariance - one.covariance).norm() <= 1e-12 * one.covariance.norm()


@pytest.mark.parametrize("rows", [4, 5, 9])
def test_affine_maps(rows):
    x = pixels(300, 5)
    A, b = torch.randn(rows, 5, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
    close(Moments.measure(x).affine(A, b), Moments.measure(x @ A.T + b))
    with pytest.raises(ValueError, match="variances alone"):
        Moments.measure(x, diagonal=True).affine(A, b)


def test_variances_of_a_full_covariance():
    x = pixels(300, 5)
    close(Moments.measure(x).only_diagonal(), Moments.measure(x, diagonal=True))


def test_variances_and_a_covariance_are_not_merged():
    x = torch.rand(9, 3)
    with pytest.raises(ValueError, match=r"M2 \(3, 3\) and \(3,\)"):
        Moments.measure(x).merge(Moments.measure(x, diagonal=True))


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_frame_of_many_blocks_is_measured_in_float64(diagonal):
    """200,000 float32 pixels of one sign, far from zero, against numpy's long double."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200_000, 4, generator=generator) * 1e-3 + 50
    exact = x.numpy().astype("longdouble")
    centred = exact - exact.mean(axis=0)
    ours = Moments.measure(x, diagonal=diagonal)
    M2 = (centred**2).sum(axis=0) if diagonal else centred.T @ centred
    assert abs(ours.mean.numpy() / exact.mean(axis=0) - 1).max() <= 1e-15
    scale = (centred**2).sum(axis=0) ** 0.5
    scale = scale**2 if diagonal else scale[:, None] * scale
    assert (abs(ours.M2.numpy() - M2) / scale).max() <= 1e-12
    in_float32 = torch.cov(x.T) * (len(x) - 1)
    if not diagonal:
        assert (abs(in_float32.numpy() - M2) / scale).max() > 1e-9, "the data are too easy"
