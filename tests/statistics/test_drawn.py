"""Pixels that a pass keeps: one sample whatever the shards, and standard errors that are right."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cuvis_dist.statistics import DrawnSample
from cuvis_dist.statistics.drawn import (
    Drawn,
    draw,
    error_by_groups,
    error_of_mean,
    expected_per_frame,
    joined,
)
from cuvis_dist.statistics.sample import ranks_of


def frame(position, count, expected, **constants):
    """What is kept of a frame whose pixels say where they are."""
    index, drawn = draw(np.arange(count), 7, f"rec#{position}", expected)
    values = {"data.cube": np.stack([np.full(len(index), position), index], 1).astype(np.float32)}
    where = np.full(len(index), position)
    if not len(index):
        return drawn
    return Drawn(drawn.n, drawn.bound, drawn.rank, where, values, constants)


def everything(sample, groups):
    """All pixels of a sample, group after group."""
    kept = [sample.group(i, groups) for i in range(groups)]
    values = torch.cat([values["data.cube"] for values, _ in kept])
    assert np.array_equal(np.concatenate([frames for _, frames in kept]), values[:, 0].numpy())
    return [tuple(row) for row in values.int().tolist()]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    size=st.integers(1, 80),
    groups=st.integers(1, 7),
    cut=st.integers(1, 5),
)
def test_any_shards_give_the_sample_of_the_definition(counts, size, groups, cut):
    expected = expected_per_frame(size, len(counts))
    frames = [frame(i, count, expected) for i, count in enumerate(counts)]
    shards = [joined(frames[i : i + cut]) for i in range(0, len(frames), cut)]
    sample = DrawnSample(shards, size)

    ranked = sorted(
        (float(rank), position, index)
        for position, count in enumerate(counts)
        for index, rank in enumerate(ranks_of(np.arange(count), 7, f"rec#{position}"))
    )
    bound = min(min(1.0, expected / max(1, count)) for count in counts)
    chosen = [(position, index) for rank, position, index in ranked if rank <= bound][:size]
    assert (everything(sample, groups) if chosen else []) == chosen
    assert (sample.n, sample.k) == (sum(counts), len(chosen))


def test_pixels_of_one_rank_keep_the_order_of_their_frames():
    """Enough of them that a sort which is not stable would not."""
    rank = np.random.default_rng(0).integers(0, 50, 4000) / 50
    parts = [
        Drawn(1000, 1.0, rank[i : i + 1000], np.full(1000, i), {"at": np.arange(i, i + 1000)})
        for i in range(0, 4000, 1000)
    ]
    assert np.array_equal(joined(parts).values["at"], np.argsort(rank, kind="stable"))


def test_frames_of_one_size_give_the_wanted_number():
    """Six standard deviations more are drawn than wanted; 50 samples of 400 pixels."""
    for seed in range(50):
        expected = expected_per_frame(400, 10)
        parts = [draw(np.arange(900), seed, f"rec#{i}", expected)[1] for i in range(10)]
        assert sum(len(part.rank) for part in parts) < 650
        assert DrawnSample(parts, 400).k == 400


def test_what_belongs_to_frames_must_be_the_same_for_all():
    nm = np.array([400, 500])
    same = joined([frame(0, 9, 5, wavelengths=nm), frame(1, 9, 5, wavelengths=nm)])
    assert same.constants["wavelengths"] is nm
    for other in ({"wavelengths": nm + 1}, {}):
        with pytest.raises(ValueError, match="wavelengths is not the same for all frames"):
            joined([frame(0, 9, 5, wavelengths=nm), frame(1, 9, 5, **other)])


def test_the_error_of_a_mean_is_that_of_all_samples_there_are():
    """Its square is the variance of the mean over all 35 samples of 3 of 7 (Cochran, 2.2)."""
    population = torch.tensor([1.0, 4.0, 4.5, 8.0, -3.0, 0.5, 20.0], dtype=torch.float64)
    samples = torch.stack([population[[*few]] for few in combinations(range(7), 3)])
    errors = error_of_mean(samples.var(dim=1), 3, 3 / 7)
    assert float(errors.square().mean()) == pytest.approx(
        float(samples.mean(dim=1).var(correction=0)), rel=1e-12
    )


def test_groups_of_one_pixel_give_the_error_of_a_mean():
    x = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    without = torch.stack([torch.cat([x[:i], x[i + 1 :]]).mean() for i in range(40)])
    assert float(error_by_groups(without, 0.2)) == pytest.approx(
        float(error_of_mean(x.var(), 40, 0.2)), rel=1e-12
    )
    assert float(error_by_groups(without, 1.0)) == 0, "a sample of all pixels has no error"
