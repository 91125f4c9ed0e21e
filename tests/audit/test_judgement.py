"""Is content told from faults, are unforeseen faults named, and is it said what is hidden?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from archives import real_scene
from audit import scenes

from cuvis_dist.audit.audit import Audit, audit
from cuvis_dist.audit.noise import lines
from cuvis_dist.audit.table import as_json, as_text

WHICH = "recording_04.cu3s"
BANDS = 40


@pytest.fixture(scope="module")
def clean():
    recordings = scenes.made(0)
    return recordings, scenes.statistics(recordings)


def spoilt(clean, fault) -> Audit:
    """Audit the made archive with a fault in one recording, the only one that is measured again."""
    recordings, frames = clean
    bad = scenes.faulty(recordings, 4, fault)[4]
    mine = [
        replace(f, uid=f.uid.replace("_00", "_04"), recording=WHICH)
        for f in scenes.statistics([bad], seed=1)
    ]
    return audit([f for f in frames if f.recording != WHICH] + mine)


def bands(change):
    """A fault of the bands: ``change`` maps ``[..., C]`` and their places in [0, 1]."""
    return lambda cubes, rng: change(cubes, np.linspace(0, 1, cubes.shape[-1]))


def one_frame(value):
    def spoil(cubes, rng):
        cubes = cubes.copy()
        cubes[1] = cubes[0] if value is None else value
        return cubes

    return spoil


def dead_row(cubes, rng):
    cubes = cubes.copy()
    cubes[:, 20] = 0
    return cubes


def hot_pixel(cubes, rng):
    cubes = cubes.copy()
    cubes[2, 7, 9] = 3 * cubes.max()
    return cubes


def copied_band(cubes, rng):
    cubes = cubes.copy()
    cubes[..., 20] = cubes[..., 19]
    return cubes


#: Faults that are not in the documentation's table, and what is to be said of them.
HELD_OUT = {
    "half of the bands darker": (
        bands(lambda x, at: x * np.where(at < 0.5, 0.95, 1)),
        " in bands 0 to 19",
    ),
    "some bands brighter": (
        bands(lambda x, at: x + 90.0 * (at > 0.6)),
        " in bands 24 to 39",
    ),
    "bands in reverse": (bands(lambda x, at: x[..., ::-1]), "bands in reversed order"),
    "smoothed": (
        bands(lambda x, at: (x + np.roll(x, 1, -1) + np.roll(x, -1, -1)) / 3),
        "smoothed, or another bandwidth?",
    ),
    "stray light": (bands(lambda x, at: x + 100 * at), "offset from "),
    "other units": (bands(lambda x, at: x * 1e-4), "times the usual: other units?"),
    "noise of the blue": (
        lambda x, rng: x + rng.normal(size=x.shape) * 60 * (np.arange(BANDS) < 10),
        "noisy: ",
    ),
    "white reference": (
        lambda x, rng: x * (1 + 0.01 * rng.normal(size=BANDS)),
        "each in its own way: another calibration?",
    ),
    "one frame empty": (one_frame(0), "in 1 of 4 frames: all bands constant"),
    "one frame twice": (one_frame(None), f"frame {WHICH}:0 is the same as {WHICH}:1"),
    "a dead row": (dead_row, "of the pixels are empty: one value in all bands"),
    "8 bits": (
        lambda x, rng: np.round(x / 24) * 24,
        "values in steps of 24, usually 1: fewer bits",
    ),
    "negative": (lambda x, rng: x - 4000.0, "offset -4"),
    "a band copied": (copied_band, "bands 19 and 20 the same: one is a copy"),
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_faults_that_nobody_foresaw_come_first(clean, name):
    fault, words = HELD_OUT[name]
    recordings, frames = clean
    if name in ("negative", "other units"):  # counts cannot be
        recordings = [cubes.astype(np.float32) for cubes in recordings]
    found = spoilt((recordings, frames), fault)
    assert found.rows[0].name == WHICH
    assert [row.name for row in found.rows if row.unusual] == [WHICH]
    assert any(words in str(cause) for cause in found.rows[0].causes), found.rows[0].causes


def test_a_single_extreme_pixel_is_named_and_no_reason_to_stand_out(clean):
    found = spoilt(clean, hot_pixel)
    assert found.rows[0].name == WHICH
    assert str(found.rows[0].causes[-1]) == "1 pixel is extreme, of 6,400; judged without"
    assert not any(row.unusual for row in found.rows)


def test_a_single_extreme_pixel_hides_no_fault(clean):
    found = spoilt(clean, lambda x, rng: hot_pixel(1.02 * x, rng))
    assert [row.name for row in found.rows if row.unusual] == [WHICH]
    assert str(found.rows[0].causes[0]) == "gain 1.02 over all bands"


def blocks(name: str, seed: int, folder) -> list[np.ndarray]:
    """Deal the blocks of a real scene to recordings."""
    universe = real_scene(name, folder, frames=1)
    with np.load(next(universe.parent.glob("*.npz"))) as frame:
        return scenes.dealt(frame["cube"], seed)


@pytest.mark.parametrize(
    ("scene", "seed"), [("lhdata", 16), ("abu-beach-2", 17), ("salinas-a", 1), ("salinas-a", 11)]
)
def test_blocks_of_a_real_scene_are_usual(scene, seed, tmp_path):
    """Before: a few blocks of rare content, two single pixels, and a pile of equal values."""
    found = audit(scenes.statistics(blocks(scene, seed, tmp_path)))
    assert [(row.name, row.causes) for row in found.rows if row.unusual] == []


@pytest.mark.long
@pytest.mark.parametrize("scene", ["lhdata", "abu-beach-2", "salinas-a"])
def test_hardly_any_dealing_of_blocks_stands_out(scene, tmp_path):
    found = [audit(scenes.statistics(blocks(scene, seed, tmp_path))) for seed in range(20)]
    assert sum(any(row.unusual for row in each.rows) for each in found) <= 1


# ---- what could be seen ------------------------------------------------------------------

FAULTS = {
    "gain": lambda size: scenes.gain(1 + size),
    "offset": scenes.offset,
    "slope": scenes.slope,
    "foreign": scenes.foreign,
}


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.long)])
def test_what_could_be_seen_is_seen(clean, tmp_path, real):
    if real:
        recordings = blocks("lhdata", 0, tmp_path)
        clean = recordings, scenes.statistics(recordings)
    for fault, (in_one, in_all) in audit(clean[1]).could_see.items():
        found = spoilt(clean, FAULTS[fault](1.4 * in_all))
        assert found.rows[0].name == WHICH
        assert found.rows[0].unusual
        assert not any(row.unusual for row in spoilt(clean, FAULTS[fault](0.4 * in_one)).rows)


def test_what_could_be_seen_is_printed(clean):
    found = audit(clean[1])
    (said,) = found.remarks
    assert said.startswith("could see here: a gain of 1.0")
    assert said in as_text(found)
    assert as_json(found)["could_see"]["gain"]["in_all"] == found.could_see["gain"][1]
    assert audit(clean[1][:8]).could_see == {}  # two recordings


def two_kinds(fault=None) -> Audit:
    """Audit an archive every other recording of which was taken under another lamp."""
    made = [
        np.rint(cubes * (np.linspace(0.42, 0.78, BANDS) if r % 2 else 1)).astype(np.uint16)
        for r, cubes in enumerate(scenes.made(1))
    ]
    return audit(scenes.statistics(scenes.faulty(made, 3, fault) if fault else made))


def test_two_kinds_of_recordings_are_judged_apart():
    """Before: one half stood out from the other."""
    found = two_kinds()
    assert not any(row.unusual for row in found.rows)
    assert "6 groups are unlike the others and alike" in found.remarks[0]


@pytest.mark.parametrize(
    ("fault", "words"),
    [(scenes.offset(60), "offset +"), (scenes.constant(7), "band 7 constant")],
    ids=["offset", "constant"],
)
def test_a_fault_is_found_among_its_kind(fault, words):
    found = two_kinds(fault)
    assert [row.name for row in found.rows if row.unusual] == ["recording_03.cu3s"]
    assert words in str(found.rows[0].causes[0])


# ---- many groups ---------------------------------------------------------------------------


def test_one_of_many_recordings_is_found():
    """Beyond 50 groups they share what is usual."""
    made = scenes.made(0, recordings=60, frames=1, side=24, bands=12)
    made = scenes.faulty(made, 4, scenes.gain(1.3))
    found = audit(scenes.statistics(made))
    assert [row.name for row in found.rows if row.unusual] == [WHICH]
    assert str(found.rows[0].causes[0]) == "gain 1.3 over all bands"


def test_content_with_long_tails_is_usual():
    """Before: three frames with fewer pixels than bands, whose brightness alone tells of a gain."""
    made = scenes.made(0, recordings=60, frames=1, side=12, bands=150)
    assert not any(row.unusual for row in audit(scenes.statistics(made)).rows)


def test_lines_that_few_bands_do_not_bend():
    axis = np.linspace(-1, 1, 31)
    values = np.stack([0.3 - 0.2 * axis, np.full(31, 0.1), np.full(31, np.nan), 0.5 * axis])
    values[0, 4] = 40
    values[3, 7:] = np.nan
    values[3, 3:7] = np.nan  # three bands are no line
    found = lines(values, axis)
    np.testing.assert_allclose(found[:2], [[0.3, -0.2], [0.1, 0]], atol=1e-3)
    assert np.isnan(found[2]).all()
    np.testing.assert_allclose(found[3], [0.5 * axis[1], 0])
