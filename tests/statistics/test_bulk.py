"""Do concentration steps find the bulk, as the control does, and leave clean frames alone?"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.covariance import MinCovDet

from cuvis_dist.statistics import Moments
from cuvis_dist.statistics.bulk import bulk_of_frames, bulk_of_pixels, ellipsoid_of

BAD = (3, 17, 18, 30)


def frames(seed: int, bad=(), sizes=(200,)) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Return frames whose mean varies by content; the bad ones have pixels of another kind."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(8, 8))
    measured = []
    for i in range(40):
        pixels = rng.normal(size=(sizes[i % len(sizes)], 8)) @ mix + 50 + rng.normal(0, 0.3, 8)
        if i in bad:
            pixels[: len(pixels) // 2] += 6 * mix[0] * np.array([1, -1] * 4)
        measured.append(Moments.measure_rounded(torch.from_numpy(pixels)))
    return (
        [m.n for m in measured],
        np.stack([m.mean.numpy() for m in measured]),
        np.stack([m.M2.numpy() for m in measured]),
    )


@pytest.mark.parametrize("sizes", [(200,), (50, 400, 90)])
def test_contaminated_frames_are_left_out(sizes):
    found = bulk_of_frames(*frames(0, BAD, sizes), keep=0.8)
    assert set(np.flatnonzero(~found.kept)) == {*BAD}
    assert found.core.sum() == 24
    assert not found.core[list(BAD)].any()


@pytest.mark.parametrize("seed", range(10))
def test_clean_frames_are_all_kept(seed):
    assert bulk_of_frames(*frames(seed), keep=0.8).kept.all()


def test_determinants_fall_and_the_seed_fixes_the_result():
    once, again = (bulk_of_frames(*frames(1, BAD), keep=0.7, seed=5) for _ in range(2))
    assert np.all(np.diff(once.log_determinants) < 0)
    assert np.array_equal(once.core, again.core)
    assert np.array_equal(once.distance, again.distance)


def test_frames_are_found_as_their_pixels_would_be():
    """A frame of one pixel is a pixel."""
    rng = np.random.default_rng(2)
    pixels = rng.normal(size=(120, 3)) @ rng.normal(size=(3, 3))
    pixels[:20] += 9
    alone = bulk_of_frames(np.ones(120), pixels, np.zeros((120, 3, 3)), keep=0.85)
    assert np.array_equal(alone.core, bulk_of_pixels(pixels, keep=0.7).core)


@pytest.mark.parametrize("seed", range(3))
def test_pixels_against_the_control(seed):
    rng = np.random.default_rng(seed)
    pixels = rng.normal(size=(400, 4)) @ rng.normal(size=(4, 4)) + 10
    pixels[:60] += 40 * rng.normal(size=4)
    found = bulk_of_pixels(pixels, keep=0.75)
    control = MinCovDet(support_fraction=0.75, random_state=0).fit(pixels)
    assert not found.kept[:60].any()
    assert not control.support_[:60].any()

    def log_determinant(core):
        return np.linalg.slogdet(np.cov(pixels[core].T, bias=True))[1]

    in_control = np.argsort(control.mahalanobis(pixels))[: found.core.sum()]
    assert log_determinant(found.core) <= log_determinant(in_control) + 1e-6
    both = found.kept & (control.dist_ <= np.quantile(control.dist_, found.kept.mean()))
    assert both.sum() >= 0.97 * found.kept.sum()


def shore(seed, land, bad=(), change=None):
    """Return frames of the sea, some of which show more and more land, and some are spoilt."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(8, 8))
    other = rng.normal(size=(8, 8)) * 12
    measured = []
    for i in range(40):
        pixels = rng.normal(size=(200, 8)) @ mix + 50
        if i < len(land):
            part = int(200 * land[i])
            pixels[:part] = rng.normal(size=(part, 8)) @ other + 80
        if i in bad:
            pixels = change(pixels, rng)
        measured.append(Moments.measure_rounded(torch.from_numpy(pixels)))
    return (
        [m.n for m in measured],
        np.stack([m.mean.numpy() for m in measured]),
        np.stack([m.M2.numpy() for m in measured]),
    )


#: The part of a frame that is land: few frames have any, and each has another part of it.
LAND = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03)


@pytest.mark.parametrize("seed", range(5))
def test_frames_with_content_of_their_own_are_kept(seed):
    """The old fence left four of these out, since they are hundreds of times as far as the sea."""
    found = bulk_of_frames(*shore(seed, LAND), keep=0.9)
    assert found.distance[:3].min() > 10
    assert found.kept.all()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda pixels, rng: 100 * pixels, id="gain"),
        pytest.param(lambda pixels, rng: 50 + 0.3 * (pixels - 50), id="flat"),
    ],
)
def test_frames_apart_are_left_out_though_others_have_content_of_their_own(change):
    found = bulk_of_frames(*shore(0, LAND, BAD[1:], change), keep=0.9)
    assert set(np.flatnonzero(~found.kept)) == {*BAD[1:]}


@pytest.mark.parametrize("many", [800, 6000])
def test_an_ellipsoid_is_the_bulk_of_its_pixels_and_that_of_the_control(many):
    rng = np.random.default_rng(3)
    scale = np.array([1e3, 1, 1e-2, 10])
    pixels = (rng.normal(size=(many, 4)) @ rng.normal(size=(4, 4)) + 10) * scale
    bad = rng.random(many) < 0.15
    pixels[bad] += 30 * rng.normal(size=4) * scale
    found = ellipsoid_of(pixels, 0.75)
    inside = found.distance(pixels) <= found.bound
    assert np.array_equal(inside, bulk_of_pixels(pixels, 0.75).kept)
    assert found.kept == inside.mean()
    assert not inside[bad].any()
    control = MinCovDet(support_fraction=0.75, random_state=0).fit(pixels)
    # The control keeps those within the quantile of its own scale: see its correct_covariance.
    assert np.mean(inside == control.support_) > 0.98
    robust = np.linalg.inv(found.whiten @ found.whiten.T) / 4
    control_scale = np.sqrt(np.diag(control.covariance_))
    apart = (pixels[inside].mean(axis=0) - control.location_) / control_scale
    assert np.abs(apart).max() < 0.05
    ratio = np.cov(pixels[inside].T) / np.outer(control_scale, control_scale)
    correlation = control.covariance_ / np.outer(control_scale, control_scale)
    assert np.abs(ratio / ratio[0, 0] * correlation[0, 0] - correlation).max() < 0.1
    # The same but for a factor, by which each makes half of the pixels lie within the median.
    assert np.ptp(np.log(np.diag(robust) / np.diag(control.raw_covariance_))) < 0.02


def test_an_ellipsoid_keeps_as_many_as_are_surely_good():
    rng = np.random.default_rng(4)
    pixels = rng.standard_t(2, size=(1000, 3))
    assert ellipsoid_of(pixels, 0.75).kept < 0.95
    assert ellipsoid_of(pixels, 0.95).kept == 0.95
    assert ellipsoid_of(pixels, 1).kept == 1
    with pytest.raises(ValueError, match="14 pixels are too few"):
        ellipsoid_of(pixels[:14], 0.9)
    with pytest.raises(ValueError, match=r"above 0\.5"):
        ellipsoid_of(pixels, 0.5)


def test_edges():
    n, means, M2 = frames(0)
    assert bulk_of_frames(n, means, M2, keep=1).kept.all()
    assert bulk_of_frames(n[:1], means[:1], M2[:1], keep=0.9).kept.all()
    constant = np.zeros_like(M2)
    assert bulk_of_frames(n, np.zeros_like(means), constant, keep=0.9).kept.all()
    n[4] = 0
    means[4], M2[4] = 0, 0
    assert bulk_of_frames(n, means, M2, keep=0.9).kept[4]
    for keep in (0.5, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"above 0\.5"):
            bulk_of_frames(n, means, M2, keep)
