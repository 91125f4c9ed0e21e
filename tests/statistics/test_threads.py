"""A measurement has the same bits whatever the threads that its worker may use."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from cuvis_dist.statistics import Extrema, FrameQuantiles, Moments, PixelSample

pytestmark = pytest.mark.kernels
OTHERS = (Extrema, FrameQuantiles, PixelSample)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        with threadpool_limits(count, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def of_blas() -> set[int]:
    return {
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    }


def pixels(count: int, channels: int) -> torch.Tensor:
    return torch.rand(count, channels, generator=torch.Generator().manual_seed(1)) + 0.3


@pytest.mark.parametrize("channels", [1, 12, 64, 186])
@pytest.mark.parametrize(
    ("statistic", "options"),
    [(Moments, {}), (Moments, {"diagonal": True}), *((other, {}) for other in OTHERS)],
    ids=["moments", "variances", *(other.__name__ for other in OTHERS)],
)
def test_one_and_four_threads_measure_the_same_bits(statistic, options, channels):
    """Where a matrix product or a sum is long enough for several threads."""
    x = pixels(300_000 // channels, channels)
    found = []
    for count in (1, 4):
        with threads(count):
            found.append(statistic.measure(x, **options).to_bytes())
            assert torch.get_num_threads() == count, "the caller's threads stay what they were"
            assert of_blas() == {count}, "NumPy's, too"
    assert found[0] == found[1]


def test_threads_would_change_bits():
    """The control: a plain sum over as many pixels."""
    x = pixels(300_000, 1).double()
    sums = []
    for count in (1, 4):
        with threads(count):
            sums.append((x * x).sum(dim=0))
    assert not torch.equal(*sums)


def test_measurements_at_the_same_time_have_the_same_bits():
    """One that ends gives BLAS its threads back; the others must not notice."""
    x = pixels(20_000, 61)
    expected = Moments.measure(x).to_bytes()
    with threads(4), ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: Moments.measure(x).to_bytes(), range(12)))
        assert of_blas() == {4}
    assert set(found) == {expected}
