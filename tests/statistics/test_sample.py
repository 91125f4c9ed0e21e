"""The sample of pixels: exact under any partition, uniform, and independent of the order."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuvis_dist.statistics import PixelSample


def frame(position, count, channels=3):
    """Pixels that say where they are: frame, index, and something else."""
    index = torch.arange(count, dtype=torch.float32)
    columns = [torch.full((count,), float(position)), index, index**2]
    return torch.stack(columns[:channels], dim=1)


def measured(position, count, size, rows=slice(None), **options):
    index = torch.arange(count)[rows]
    pixels = frame(position, count)[rows]
    where = {"uid": f"rec#{position}", "position": position, "index": index}
    return PixelSample.measure(pixels, size, **where, **options)


def same(a, b):
    assert (a.n, a.size) == (b.n, b.size)
    assert torch.equal(a.surrogate(), b.surrogate())
    assert torch.equal(a.rank, b.rank)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    size=st.integers(1, 60),
    cut=st.integers(0, 30),
    random=st.randoms(),
)
def test_any_partition_in_any_order_gives_the_sample_of_all(counts, size, cut, random):
    """Against the definition: all ranks at once, sorted."""
    parts = [
        measured(i, n, size, rows)
        for i, n in enumerate(counts)
        for rows in (slice(0, cut), slice(cut, None))
    ]
    random.shuffle(parts)
    sample = reduce(PixelSample.merge, parts)
    assert sample.n == sum(counts)

    every = [measured(i, n, 10**6) for i, n in enumerate(counts)]
    ranks, pixels = (torch.cat([getattr(one, key) for one in every]) for key in ("rank", "values"))
    chosen = pixels[torch.argsort(ranks)[:size]]
    got = {tuple(pixel) for pixel in sample.surrogate().tolist()}
    assert got == {tuple(pixel) for pixel in chosen.tolist()}
    assert len(got) == min(size, sum(counts))
    order = sample.surrogate()[:, :2].tolist()
    assert order == sorted(order), "not in the order of the archive"


def test_a_bound_of_pixels_met_before_leaves_the_sample_as_it_is():
    size = 40
    first = measured(0, 500, size)
    bounded = measured(1, 500, size, bound=float(first.rank[-1]))
    assert len(bounded.rank) < size
    same(first.merge(bounded), first.merge(measured(1, 500, size)))


def test_the_sample_depends_on_seed_and_uid_and_on_nothing_else():
    one = measured(0, 300, 20)
    same(one, measured(0, 300, 20))
    assert not torch.equal(one.surrogate(), measured(0, 300, 20, seed=1).surrogate())
    other = PixelSample.measure(frame(0, 300), 20, uid="rec#7")
    assert not torch.equal(one.surrogate(), other.surrogate())


def test_every_pixel_is_as_likely_as_any_other():
    """Chi-squared over 40 parts of the frame, 500 frames: 39 degrees of freedom, p = 1e-4."""
    size, count = 100, 4000
    hits = sum(
        np.histogram(measured(i, count, size).place[:, 1], bins=40, range=(0, count))[0]
        for i in range(500)
    )
    expected = 500 * size / 40
    assert ((hits - expected) ** 2 / expected).sum() < 82.3


def test_the_mean_of_samples_is_that_of_the_pixels():
    """Of 2000 of 100,000 pixels: within five standard errors."""
    x = torch.randn(100_000, 4, generator=torch.Generator().manual_seed(3))
    sample = PixelSample.measure(x, 2000, uid="a")
    assert (sample.values.mean(0) - x.double().mean(0)).abs().max() < 5 / 2000**0.5


def test_unlike_samples_are_refused():
    with pytest.raises(ValueError, match="cannot merge samples"):
        measured(0, 9, 5).merge(measured(0, 9, 6))
    with pytest.raises(ValueError, match="cannot merge samples"):
        measured(0, 9, 5).merge(PixelSample.measure(torch.rand(4, 2), 5))
