"""Does the audit name the recording with a fault, and why, and nothing where there is none?"""

from __future__ import annotations

import json

import numpy as np
import pytest
from audit import scenes

from cuvis_dist.audit.audit import Audit, audit
from cuvis_dist.audit.groups import grouped
from cuvis_dist.audit.table import as_json, as_text
from cuvis_dist.errors import InputError

WHICH = 4
NM = np.linspace(430, 910, 40)


def audited(fault, seed=0, recordings=None, by="recording", **sizes) -> Audit:
    made = recordings or scenes.made(seed, **sizes)
    spoilt = scenes.faulty(made, WHICH, fault, seed) if fault else made
    return audit(scenes.statistics(spoilt), by, np.linspace(430, 910, made[0].shape[-1]))


FAULTS = {
    "gain": (scenes.gain(1.02), "gain 1.02 over all bands"),
    "integration time": (scenes.gain(1.3), "gain 1.3 over all bands"),
    "offset": (scenes.offset(120), "offset +12"),
    "constant": (scenes.constant(17), "band 17 (639.2 nm) constant"),
    "swapped": (scenes.swapped(20, 31), "bands 20 (676.2 nm) and 31 (811.5 nm) swapped"),
    "neighbours swapped": (scenes.swapped(10, 11), "bands 10 (553.1 nm) and 11 (565.4 nm) swapped"),
    "foreign": (scenes.foreign(0.05), "% foreign pixels"),
    "lamp": (scenes.slope(0.05), "slope over the wavelengths, from gain 0.9"),
    "noisy": (scenes.noisy(12, 1), "band 12 (577.7 nm) noisy"),
    "one band": (scenes.band_shifted(12, 100), "band 12 (577.7 nm) shifted by +"),
    "saturated": (scenes.saturated(0.93), "saturated: up to"),
    "spectral shift": (scenes.spectrally_shifted(1), "spectrum shifted by 1 band towards the last"),
    "stripes": (scenes.stripes(200), "an offset that varies from pixel to pixel"),
    "dark": (scenes.dark, "dark: "),
    "half the frames": (scenes.half(scenes.gain(1.3)), "in 2 of 4 frames: gain 1.3 over all bands"),
    "half constant": (
        scenes.half(scenes.constant(9)),
        "in 2 of 4 frames: band 9 (540.8 nm) constant",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_comes_first_with_its_cause(name):
    fault, words = FAULTS[name]
    found = audited(fault)
    assert found.rows[0].name == f"recording_{WHICH:02d}.cu3s"
    assert words in str(found.rows[0].causes[0])
    assert not any(row.unusual for row in found.rows[1:])


@pytest.mark.parametrize("seed", range(4))
def test_without_a_fault_nothing_is_said(seed):
    found = audited(None, seed)
    assert [row.name for row in found.rows if row.unusual] == []
    assert as_text(found)[-1] == "none of 12 stands out"


def test_two_faults_do_not_hide_each_other():
    made = scenes.faulty(scenes.made(1), 2, scenes.gain(1.3))
    found = audited(scenes.offset(120), 1, made)
    unusual = {row.name: str(row.causes[0]) for row in found.rows if row.unusual}
    assert unusual.keys() == {"recording_02.cu3s", f"recording_{WHICH:02d}.cu3s"}
    assert unusual["recording_02.cu3s"] == "gain 1.3 over all bands"
    assert unusual[f"recording_{WHICH:02d}.cu3s"].startswith("offset +1")


def test_few_recordings_are_not_judged_but_what_is_plain_is_named():
    made = scenes.made(0, recordings=3)
    spoilt = scenes.faulty(made, 1, scenes.constant(3))
    found = audit(scenes.statistics(spoilt))
    assert [str(c) for c in found.rows[0].causes] == ["band 3 constant"]
    assert [row.unusual for row in found.rows[1:]] == [False, False]
    assert "too few to judge" in found.remarks[0]


@pytest.mark.parametrize(
    ("recordings", "frames", "side", "bands"),
    [(1, 1, 20, 8), (2, 2, 20, 8), (6, 1, 20, 8), (6, 2, 3, 40), (6, 2, 20, 1), (7, 1, 1, 5)],
)
def test_archives_of_any_shape(recordings, frames, side, bands):
    sizes = {"recordings": recordings, "frames": frames, "side": side, "bands": bands}
    found = audit(scenes.statistics(scenes.made(3, **sizes)))
    assert len(found.rows) == recordings
    assert not any(row.unusual for row in found.rows)
    json.dumps(as_json(found), allow_nan=False)


def test_recordings_of_other_lengths_are_usual():
    made = scenes.made(2)
    made[3], made[7] = made[3][:1], made[7][:1, :10]
    assert not any(row.unusual for row in audit(scenes.statistics(made)).rows)


def test_bands_that_are_constant_everywhere_are_a_remark():
    made = scenes.made(0, recordings=6)
    for cubes in made:
        cubes[..., [2, 5]] = 7
    found = audit(scenes.statistics(made))
    assert not any(row.unusual for row in found.rows)
    assert found.remarks[1:-1] == ("bands 2 and 5 constant in most or all of them",)
    assert "6 groups (by recording) say little" in found.remarks[0]


def test_an_empty_recording_is_named():
    made = scenes.made(0, recordings=6)
    made[2] = np.zeros_like(made[2])
    found = audit(scenes.statistics(made))
    assert found.rows[0].name == "recording_02.cu3s"
    assert str(found.rows[0].causes[0]) == "all bands constant"


def test_values_that_are_no_integers_and_negative():
    made = [(cubes / 4000 - 0.2).astype(np.float32) for cubes in scenes.made(5)]
    spoilt = scenes.faulty(made, WHICH, scenes.offset(0.03))
    found = audit(scenes.statistics(spoilt))
    assert found.rows[0].name == f"recording_{WHICH:02d}.cu3s"
    assert str(found.rows[0].causes[0]).startswith("offset +0.0")
    assert not any(row.unusual for row in audit(scenes.statistics(made)).rows)


def test_by_frame_and_by_a_field():
    found = audited(scenes.half(scenes.gain(1.3)), by="frame", recordings=scenes.made(0)[:6])
    unusual = [row.name for row in found.rows if row.unusual]
    assert sorted(unusual) == [f"recording_{WHICH:02d}.cu3s:{i}" for i in (2, 3)]
    assert len(audited(None, by="sensor", recordings=scenes.made(0)[:6]).rows) == 2


def test_what_cannot_be_grouped_is_said():
    frames = scenes.statistics(scenes.made(0, recordings=2, side=4, bands=3))
    with pytest.raises(InputError, match="no field 'lens' to group by; there are recording"):
        grouped(frames, "lens")
    with pytest.raises(InputError, match="measure the archive first"):
        grouped([])
    other = scenes.statistics(scenes.made(0, recordings=1, side=4, bands=4))
    with pytest.raises(InputError, match=r"has 4 channels and frame .* has 3"):
        grouped([*frames, *other])


def test_the_table_and_json_say_the_same():
    found = audited(FAULTS["constant"][0], recordings=scenes.made(0)[:6])
    lines = as_text(found)
    assert lines[1].split()[1] == f"recording_{WHICH:02d}.cu3s"
    assert lines[1].endswith("band 17 (639.2 nm) constant")
    assert lines[-1].startswith("1 of 6 stand out")
    rows = json.loads(json.dumps(as_json(found)))["rows"]
    assert rows[0]["causes"][0] == {"kind": "constant", "words": "band 17 (639.2 nm) constant"}
    assert rows[1]["causes"] == []
