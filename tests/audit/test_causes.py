"""Are faults that look like others told from them? On a small archive, in fractions of a second."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from audit import scenes

from cuvis_dist.audit.audit import Audit, audit
from cuvis_dist.audit.comparison import Comparison
from cuvis_dist.audit.facts import percent, signed

WHICH = "recording_04.cu3s"
BANDS = 16


@pytest.fixture(scope="module")
def recordings() -> list[np.ndarray]:
    return scenes.made(0, recordings=8, frames=4, side=24, bands=BANDS)


@pytest.fixture(autouse=True)
def nothing_is_asked_of_what_could_be_seen(monkeypatch) -> None:
    """That takes most of the time, and is tested elsewhere."""
    monkeypatch.setattr(Comparison, "visible", lambda self, judge: {})


def spoilt(recordings: list[np.ndarray], fault: scenes.Fault) -> Audit:
    return audit(scenes.statistics(scenes.faulty(recordings, 4, fault)))


def of_bands(change: Callable[[np.ndarray], np.ndarray]) -> scenes.Fault:
    """A fault of the bands, given their places in [0, 1]."""
    return lambda cubes, rng: cubes * change(np.linspace(0, 1, cubes.shape[-1]))


def gamma(cubes, rng):
    return cubes.max() * (cubes / cubes.max()) ** 0.6


def dead_in_half(cubes, rng):
    cubes = cubes.copy()
    cubes[:2, ..., 9] = 0
    return cubes


def copied(cubes, rng):
    cubes = cubes.copy()
    cubes[..., 12] = cubes[..., 3]
    return cubes


#: What is done, and the first cause.
FAULTS = {
    "bytes": (
        lambda x, rng: x.astype(np.uint16).byteswap().astype(float),
        "the two bytes of each value exchanged: another byte order",
    ),
    "a dip": (
        of_bands(lambda at: 1 - 0.3 * np.exp(-(((at - 0.6) / 0.1) ** 2))),
        "in bands 8, 9 and 10",
    ),
    "gamma": (gamma, "where bright: gamma, or not linear?"),
    "halves exchanged": (
        lambda x, rng: np.roll(x, 8, axis=-1),
        "the first 8 and the last 8 bands exchanged",
    ),
    "a copy": (copied, "bands 3 and 12 the same: one is a copy"),
    "dead in half of the frames": (dead_in_half, "in 2 of 4 frames: band 9 constant"),
    "empty": (lambda x, rng: 0 * x, "all bands constant"),
    "one frame, four times": (
        lambda x, rng: x[[0, 0, 0, 0]],
        f"frame {WHICH}:0 is the same as {WHICH}:1",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_it_comes_first_with_its_cause_and_no_other(recordings, name):
    fault, words = FAULTS[name]
    found = spoilt(recordings, fault)
    assert [row.name for row in found.rows if row.unusual] == [WHICH]
    (cause,) = found.rows[0].causes
    assert words in str(cause)


def test_fewer_bits_are_no_noise_and_hide_no_others(recordings):
    """Before: steps had to be wider than those of every other recording."""
    some = scenes.faulty(recordings, 1, lambda x, rng: np.round(x / 256) * 256)
    found = spoilt(some, lambda x, rng: np.round(x / 256) * 256)
    assert {row.name for row in found.rows if row.unusual} == {WHICH, "recording_01.cu3s"}
    for row in found.rows[:2]:
        kinds = {cause.kind for cause in row.causes}
        assert "coarse" in kinds
        assert not kinds & {"noise", "noisy"}


def test_a_gain_of_each_band_is_not_that_of_bands_that_are_nearly_the_same(recordings):
    """Before: one of two such bands was said to be shifted, and nothing of the others."""
    rng = np.random.default_rng(0)
    twins = [cubes.copy() for cubes in recordings]
    for cubes in twins:
        cubes[..., 6] = cubes[..., 5] + rng.integers(-1, 2, cubes.shape[:-1])
    found = spoilt(twins, lambda x, rng: x * (1 + 0.03 * rng.normal(size=BANDS)))
    assert [row.name for row in found.rows if row.unusual] == [WHICH]
    assert "each in its own way" in str(found.rows[0].causes[0])


def test_most_bands_saturated_say_nothing_of_the_few_others(recordings):
    """Before: `values 100 times the usual: other units?` of the one band that was left."""

    def full(cubes, rng):
        cubes = cubes.copy()
        cubes[:, :, 12:] = cubes.max()
        cubes[..., 0] += rng.integers(0, 50, cubes.shape[:-1])
        return cubes

    causes = spoilt(recordings, full).rows[0].causes
    assert {cause.kind for cause in causes} == {"saturated", "empty"}


def test_numbers_are_written_as_people_do():
    assert [percent(share) for share in (0.004, 0.12, 0.9949, 1.0)] == [
        "0.4 %", "12 %", "99 %", "100 %",
    ]  # fmt: skip
    assert [signed(value) for value in (0.00294, -4000.4, 33612.0, 1.5e8)] == [
        "+0.00294", "-4000", "+33600", "+1.5e+08",
    ]  # fmt: skip
    assert not math.isnan(float(signed(0.0)))
