"""Moments beyond what every statistic promises: surrogates, affine maps, variances alone."""

from __future__ import annotations

import numpy as np
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


@pytest.mark.parametrize("diagonal", [True, False])
def test_measuring_the_surrogate_gives_the_moments(diagonal):
    one = Moments.measure(pixels(500, 6), diagonal=diagonal)
    surrogate = one.surrogate()
    assert len(surrogate) == 12
    again = Moments.measure(surrogate, diagonal=diagonal)
    torch.testing.assert_close(again.mean, one.mean, rtol=1e-13, atol=0)
    assert (again.covariance - one.covariance).norm() <= 1e-13 * one.covariance.norm()


RATIOS = [0.0, 1e-3, 1.0, 30.0, 1e3, 1e5]  # of the mean to the deviation; 0: no deviation


@pytest.mark.parametrize("mean", [0.0, 1e-3, -50.1, 123.456, 4095.0, 65_535.3, 1e20])
def test_a_surrogate_for_float32_loses_nothing_by_being_cast(mean):
    """The control is what nodes that cast got before: sigma points farther out, then rounded."""
    deviation = torch.tensor([abs(mean) / ratio if ratio else 0.0 for ratio in RATIOS]).double()
    one = Moments(100, torch.full((len(RATIOS),), mean).double(), deviation**2 * 99)
    surrogate = one.surrogate(single=True)
    assert torch.equal(surrogate.float().double(), surrogate)
    again = Moments.measure_rounded(surrogate, diagonal=True)
    near = one.mean.where(deviation > 0, one.mean.float().double())
    assert ((again.mean - near).abs() <= 1e-11 * abs(mean)).all()
    assert ((again.covariance.sqrt() - deviation).abs() <= 2e-9 * deviation).all()
    wide = deviation * (8191 / 2) ** 0.5
    rounded = torch.cat([one.mean + wide, one.mean - wide]).float().double().reshape(2, -1)
    control = ((rounded - one.mean) ** 2).sum(dim=0) / 8191
    if mean:
        assert (control.sqrt()[-1] / deviation[-1] - 1).abs() > 1e-7


def test_a_surrogate_for_float32_is_of_variances_alone():
    with pytest.raises(ValueError, match="variances alone"):
        Moments.measure(pixels(9, 3)).surrogate(single=True)


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
    with pytest.raises(ValueError, match=r"3 channels and 3 channels \(variances alone"):
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


def errors(ours: Moments, x: torch.Tensor) -> tuple[float, float]:
    """Largest error of a mean in units of max|x|, and of M2 in units of its two deviations."""
    exact = x.double().numpy().astype("longdouble")
    mean = exact.mean(axis=0)
    centred = exact - mean
    scale = (centred**2).sum(axis=0) ** 0.5
    M2 = (centred**2).sum(axis=0) if ours.diagonal else centred.T @ centred
    scale = scale**2 if ours.diagonal else scale[:, None] * scale
    level = abs(exact).max(axis=0)
    return (
        float((abs(ours.mean.numpy() - mean) / level).max()),
        float((abs(ours.M2.numpy() - M2) / scale).max()),
    )


def far_from_zero(x: torch.Tensor) -> torch.Tensor:
    return x * 1e-6 + 1


def far_in_between(x: torch.Tensor) -> torch.Tensor:
    """Those pixels that the shift is estimated from, of all, are the outliers."""
    x[::64] += 1e3
    return x


def dark_above(x: torch.Tensor) -> torch.Tensor:
    x[: len(x) // 3] = 0
    return x


def rising(x: torch.Tensor) -> torch.Tensor:
    return x + torch.arange(len(x))[:, None]


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("channels", [1, 3, 61])
@pytest.mark.parametrize("made", [far_from_zero, far_in_between, dark_above, rising])
def test_no_shift_costs_digits(made, channels, diagonal):
    """Frames of many blocks and a rest, for which an estimate of the mean is good or bad."""
    generator = torch.Generator().manual_seed(4)
    x = made(torch.randn(70_001, channels, generator=generator, dtype=torch.float64))
    of_mean, of_M2 = errors(Moments.measure(x, diagonal=diagonal), x)
    assert of_mean <= 8 * 2.0**-53
    assert of_M2 <= (5e-13 if made is far_in_between else 2e-14)


@pytest.mark.parametrize("diagonal", [True, False])
def test_a_thousand_bands(diagonal):
    x = pixels(700, 1000)
    of_mean, of_M2 = errors(Moments.measure(x, diagonal=diagonal), x)
    assert of_mean <= 8 * 2.0**-53
    assert of_M2 <= 1e-13


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", [0, 1, 64, 30_001, -1])
@pytest.mark.parametrize("diagonal", [True, False])
def test_a_value_that_is_not_finite_is_noticed_wherever_it_is(diagonal, at, value):
    x = torch.rand(60_000, 5)
    x[at, 3] = value
    one = Moments.measure(x, diagonal=diagonal)
    assert not one.is_finite()
    assert torch.isfinite(one.mean).tolist() == [True, True, True, False, True]


def test_a_constant_channel_has_no_variance_at_all():
    x = torch.rand(50_000, 3)
    x[:, 1] = 0.1
    for dtype in (torch.float32, torch.float64):
        one = Moments.measure(x.to(dtype))
        assert one.mean[1] == x.to(dtype)[0, 1].double()
        assert not one.M2[1].any()
    assert torch.equal(one.M2, one.M2.T)


DTYPES = [
    torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32,
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("diagonal", [True, False])
def test_every_dtype_gives_the_bits_of_its_values_in_float64(dtype, diagonal):
    x = torch.as_tensor(np.random.default_rng(2).integers(0, 120, (9_000, 7))).to(dtype)
    of_floats = Moments.measure(x.double(), diagonal=diagonal)
    assert Moments.measure(x, diagonal=diagonal).to_bytes() == of_floats.to_bytes()


@pytest.mark.parametrize("diagonal", [True, False])
def test_the_order_in_memory_changes_no_bit(diagonal):
    x = torch.rand(4, 5_000, 3)
    views = [x[1:, ::2, :2].reshape(-1, 2), x[0].T.contiguous().T, x[0, ::3], x[0, :, [2, 0]]]
    views.append(x[0].clone().requires_grad_())
    for view in views:
        copy = view.detach().clone(memory_format=torch.contiguous_format)
        assert (
            Moments.measure(view, diagonal=diagonal).to_bytes()
            == Moments.measure(copy, diagonal=diagonal).to_bytes()
        )
