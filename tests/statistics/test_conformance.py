"""Every statistic: any partition, any order, empty, one pixel, pickle, Arrow, exact reference."""

from __future__ import annotations

import pickle
from fractions import Fraction
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuvis_dist.statistics import (
    Extrema,
    FrameQuantiles,
    Moments,
    from_arrow,
    from_bytes,
)

STATISTICS = {
    "moments": Moments.measure,
    "diagonal": lambda x: Moments.measure(x, diagonal=True),
    "extrema": Extrema.measure,
}
everywhere = pytest.mark.parametrize("measure", STATISTICS.values(), ids=STATISTICS.keys())


def values(statistic):
    return [v for v in vars(statistic).values() if isinstance(v, torch.Tensor)]


def close(a, b, scale=1.0):
    assert a.n == b.n
    for x, y in zip(values(a), values(b), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9 * scale)


@st.composite
def pixels_and_cuts(draw):
    n, channels = draw(st.integers(0, 40)), draw(st.integers(1, 5))
    seed, offset = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.0, 1.0, -300.0]))
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed)) + offset
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=4)))
    return x, [x[a:b] for a, b in zip([0, *cuts], [*cuts, n], strict=True)]


@everywhere
@settings(max_examples=60, deadline=None)
@given(pixels_and_cuts(), st.randoms())
def test_any_partition_in_any_order_gives_the_whole(measure, case, random):
    x, parts = case
    random.shuffle(parts)
    merged = reduce(lambda a, b: a.merge(b), [measure(part) for part in parts])
    close(merged, measure(x), scale=1e5)


@everywhere
@settings(max_examples=30, deadline=None)
@given(pixels_and_cuts())
def test_merge_is_commutative_and_associative(measure, case):
    _, parts = case
    a, b, c = (measure(part) for part in (parts * 3)[:3])
    close(a.merge(b), b.merge(a), 1e5)
    close(a.merge(b).merge(c), a.merge(b.merge(c)), 1e5)


@everywhere
def test_empty_is_the_identity(measure):
    some, none = measure(torch.rand(9, 3)), measure(torch.zeros(0, 3))
    for merged in (some.merge(none), none.merge(some)):
        assert all(torch.equal(x, y) for x, y in zip(values(merged), values(some), strict=True))
        assert merged.n == 9
    assert none.surrogate().shape == (0, 3)


@everywhere
def test_one_pixel_is_its_own_surrogate(measure):
    pixel = torch.tensor([[1.5, -2.0, 7.0]])
    assert torch.equal(measure(pixel).surrogate(), pixel.double())


@everywhere
@pytest.mark.parametrize("n", [0, 1, 50])
def test_pickle_and_arrow_round_trips_keep_every_bit(measure, n):
    one = measure(torch.rand(n, 4))
    for other in (
        pickle.loads(pickle.dumps(one)),
        from_arrow(one.to_arrow()),
        from_bytes(one.to_bytes()),
    ):
        assert type(other) is type(one)
        assert other.n == n
        assert all(torch.equal(x, y) for x, y in zip(values(one), values(other), strict=True))


def test_arrow_of_something_else_is_refused():
    import pyarrow as pa

    with pytest.raises(ValueError, match="not a statistic"):
        from_arrow(pa.RecordBatch.from_pydict({"n": [1]}))


@everywhere
def test_unlike_channels_are_refused(measure):
    with pytest.raises(ValueError, match=r"3 .* 4 channels"):
        measure(torch.rand(5, 3)).merge(measure(torch.rand(5, 4)))


@everywhere
def test_measuring_the_surrogate_gives_the_statistic(measure):
    one = measure(torch.rand(500, 6) * torch.logspace(-3, 2, 6))
    again = measure(one.surrogate())
    if isinstance(one, Moments):
        torch.testing.assert_close(again.mean, one.mean, rtol=1e-13, atol=0)
        again_cov, cov = again.covariance, one.covariance
        assert (again_cov - cov).norm() <= 1e-13 * cov.norm()
    else:
        assert torch.equal(again.minimum, one.minimum)
        assert torch.equal(again.maximum, one.maximum)


def test_surrogate_of_a_singular_covariance():
    x = torch.randn(8, 20, dtype=torch.float64)  # rank 7 of 20
    one = Moments.measure(x)
    again = Moments.measure(one.surrogate())
    assert (again.covariance - one.covariance).norm() <= 1e-12 * one.covariance.norm()


@pytest.mark.parametrize("full", [True, False], ids=["mixing", "scaling"])
def test_affine_maps(full):
    x = torch.rand(300, 5, dtype=torch.float64)
    A = (
        torch.randn(4, 5, dtype=torch.float64)
        if full
        else torch.diag(torch.tensor([1.0, -2, 0, 3, 4]))
    )
    b = torch.randn(len(A), dtype=torch.float64)
    close(Moments.measure(x).affine(A, b), Moments.measure(x @ A.double().T + b))
    if full:
        with pytest.raises(ValueError, match="mixed channels"):
            Extrema.measure(x).affine(A, b)
        with pytest.raises(ValueError, match="variances alone"):
            Moments.measure(x, diagonal=True).affine(A, b)
    else:
        close(Extrema.measure(x).affine(A, b), Extrema.measure(x @ A.double().T + b))


def test_variances_of_a_full_covariance():
    x = torch.rand(300, 5)
    close(Moments.measure(x).only_diagonal(), Moments.measure(x, diagonal=True))


@pytest.mark.parametrize("means", [0, 1, 100])
@pytest.mark.parametrize("diagonal", [True, False])
def test_copies_of_the_mean_leave_the_surrogate_exact(means, diagonal):
    one = Moments.measure(torch.rand(500, 6) + 3, diagonal=diagonal)
    pixels = one.surrogate(means)
    assert len(pixels) == 12 + means
    again = Moments.measure(pixels, diagonal=diagonal)
    assert (again.covariance - one.covariance).norm() <= 1e-13 * one.covariance.norm()


@pytest.mark.parametrize(("low", "high"), [(0.005, 0.995), (0.0, 1.0), (0.48, 0.52)])
def test_frame_quantiles_are_the_outermost_and_survive_their_surrogate(low, high):
    frames = [torch.randn(77, 3) for _ in range(4)]
    parts = [FrameQuantiles.measure(f, low=low, high=high) for f in frames]
    merged = reduce(lambda a, b: a.merge(b), parts)
    assert torch.equal(
        merged.minimum.float(), torch.stack([f.quantile(low, dim=0) for f in frames]).amin(0)
    )
    again = FrameQuantiles.measure(merged.surrogate(), low=low, high=high)
    assert torch.equal(again.minimum, merged.minimum)
    assert torch.equal(again.maximum, merged.maximum)
    assert torch.equal(from_bytes(merged.to_bytes()).maximum, merged.maximum)


def test_a_nan_is_noticed():
    x = torch.rand(100, 3)
    assert all(measure(x).is_finite() for measure in STATISTICS.values())
    x[50, 1] = torch.nan
    assert not any(measure(x).is_finite() for measure in STATISTICS.values())


# ---- accuracy --------------------------------------------------------------------------


def exact_moments(x):
    """Mean and M2 in rational arithmetic, rounded once."""
    rows = [[Fraction(float(v)) for v in row] for row in x]
    n, channels = len(rows), len(rows[0])
    mean = [sum(row[i] for row in rows) / n for i in range(channels)]
    M2 = [
        [sum((r[i] - mean[i]) * (r[j] - mean[j]) for r in rows) for j in range(channels)]
        for i in range(channels)
    ]
    as_tensor = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    return as_tensor([float(m) for m in mean]), as_tensor([[float(v) for v in r] for r in M2])


@pytest.mark.parametrize("parts", [1, 7])
def test_moments_against_rational_arithmetic_where_sums_of_squares_fail(parts):
    generator = torch.Generator().manual_seed(3)
    sigma = torch.tensor([1.0, 1e-2, 1e-4], dtype=torch.float64)
    x = sigma * (torch.randn(300, 3, generator=generator, dtype=torch.float64) + 1e6)
    mean, M2 = exact_moments(x)

    ours = reduce(lambda a, b: a.merge(b), map(Moments.measure, x.chunk(parts)))
    assert ((ours.mean - mean).abs() / mean.abs()).max() <= 1e-13
    scale = M2.diagonal().sqrt()
    error = lambda m: ((m - M2).abs() / torch.outer(scale, scale)).max()  # noqa: E731
    assert error(ours.M2) <= 1e-10

    naive = x.T @ x - torch.outer(x.sum(0), x.sum(0)) / len(x)
    assert error(naive) > 1e-4, "the control should fail here, or the data are too easy"


def test_float32_pixels_are_measured_in_float64():
    x = (torch.randn(20000, 4) * 1e-3 + 50).float()
    ours = Moments.measure(x)
    torch.testing.assert_close(ours.covariance, torch.cov(x.double().T), rtol=1e-10, atol=0)
    assert ours.mean.dtype == torch.float64
