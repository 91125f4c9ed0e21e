"""What does the page about an audit show? Of spoilt, sound, small, large and odd archives."""

from __future__ import annotations

import base64
import re
from dataclasses import replace

import numpy as np
import pytest
from audit import scenes
from browser import look, needs_browser
from markup import Page

from cuvis_dist.audit.audit import audit
from cuvis_dist.audit.drift import NodeDrift
from cuvis_dist.audit.groups import grouped
from cuvis_dist.errors import InputError
from cuvis_dist.report import differences
from cuvis_dist.report.audit_page import render, write_audit
from cuvis_dist.report.audited import Audited
from cuvis_dist.report.beside import along, curves
from cuvis_dist.report.plot import BLUE, VERMILLION, Plot

LONG = "recording_of_a_very_long_name_without_any_place_to_break_it_" * 3


def audited(recordings, wavelengths=None, name="made up", drifts=(), most=None) -> Audited:
    frames = scenes.statistics(recordings)
    facts = {"name": name, "trainrun": f"/data/{LONG}/trainrun.yaml", "against": "before.yaml"}
    groups = {group.name: group for group in grouped(frames)}
    found = audit(frames, "recording", wavelengths)
    return Audited(found, groups, wavelengths, facts, ["Two are missing."], drifts, most)


def drifts_of(mean: np.ndarray) -> list[NodeDrift]:
    ends = {"minimum": (mean * 0.5, mean * 0.6), "maximum": (mean * 2, mean * 2.2)}
    one = {name: (then[:1], now[:1]) for name, (then, now) in ends.items()}
    by_group = {f"recording_{i:02d}.cu3s": 0.01 * i for i in range(8)}
    figures = {"minimum": 0.0, "maximum": 1.0}
    return [
        NodeDrift(
            "rx", 0.03, "mean", {"gain": 1.03}, by_group, {"mean": (mean, mean * 1.03)}, True
        ),
        NodeDrift("normalizer", 0.001, "range", figures, {}, ends, True),
        NodeDrift("of all bands", 0.001, "range", figures, {}, one),
    ]


@pytest.fixture(scope="module")
def spoilt() -> Audited:
    """Return the audit of eight recordings, of which two are faulty, and of the drift since."""
    made = scenes.made(0, recordings=8, side=30, bands=20)
    made = scenes.faulty(made, 2, scenes.gain(1.3))
    made = scenes.faulty(made, 5, scenes.constant(7))
    mean = made[0].reshape(-1, 20).mean(axis=0)
    return audited(made, np.linspace(430, 910, 20), "<b>bold</b> $x_1$", drifts_of(mean), 0.01)


@pytest.fixture(scope="module")
def content(spoilt) -> str:
    """Return the page about it."""
    return render(spoilt)[0]


def page_of(text: str) -> Page:
    assert "This section could not be made" not in text
    assert len(text.encode()) < 5_000_000
    page = Page(text)
    assert page.of("img")
    for image in page.of("img"):
        assert image["src"].startswith("data:image/svg+xml;base64,")
        assert len(image["alt"]) > 20
    assert {a["href"] for a in page.of("a")} <= {f"#{anchor}" for anchor in page.ids}
    return page


def section(text: str, anchor: str) -> Page:
    (part,) = re.findall(rf'<section id="{anchor}".*?</section>', text, re.S)
    return Page(part)


def test_what_stands_out_comes_first_and_beside_its_plot(content):
    page = page_of(content)
    head = page.text[: page.text.index("What was audited")]
    assert "3 things to look at" in head
    assert re.search(r"recording_02.cu3s: gain 1\.(3|29|31) over all bands, \d", head)
    assert "recording_05.cu3s: band 7 (606.8 nm) constant" in head
    assert "rx: its mean has drifted by 0.03 of itself, and 0.01 is allowed" in head
    assert "Could see here: a gain of 1." in section(content, "overview").text
    assert "recording_02.cu3s: gain 1." in section(content, "spectra").text
    assert "recording_05.cu3s: band 7 (606.8 nm) constant" in section(content, "ranges").text
    assert "rx: its mean has drifted" in section(content, "drift").text
    assert "<b>bold</b> $x_1$: audit by recording" in page.text
    assert "Two are missing." in section(content, "overview").text


def test_every_plot_says_who_stands_out_and_over_what(content):
    alts = {anchor: section(content, anchor).alts for anchor in ("spectra", "ranges", "noise")}
    assert [len(each) for each in alts.values()] == [4, 2, 1]
    for alt in (alt for each in alts.values() for alt in each):
        assert "Standing out: recording_0" in alt
        assert "wavelength in nm" in alt or "directions" in alt
    assert len(section(content, "drift").alts) == 5
    assert len(section(content, "distances").alts) == 3


def test_the_table_has_all_groups_and_their_causes(spoilt, content):
    table = section(content, "table")
    guessed = sum(bool(row.causes) for row in spoilt.rows)
    assert len(table.of("tr")) == 1 + 8 + 1 + guessed
    assert "8 groups, sorted by how far they stand out" in table.text
    assert "Bhattach." in table.text


def test_limits_are_those_of_the_audit(spoilt):
    limits = spoilt.found.limits
    assert limits.keys() == {"mean_shift", "affine_invariant", "outside"}
    for row in spoilt.rows:
        beyond = row.figures["outside"] > limits["outside"]
        assert beyond == (row.away["foreign"] > 1)
    few = audited(scenes.made(0, recordings=2, side=12, bands=4))
    assert all(np.isnan(limit) for limit in few.found.limits.values())


def test_a_sound_archive_says_so():
    page = page_of(render(audited(scenes.made(1, recordings=6, side=20, bands=12)))[0])
    assert "None of 6 stands out" in page.text[: page.text.index("What was audited")]
    assert "their wavelengths are not known" in page.text
    assert any("over band." in alt for alt in page.alts)
    assert "Drift" not in page.text


@pytest.mark.parametrize(("recordings", "bands"), [(1, 8), (2, 8), (1, 1), (7, 1), (60, 5)])
def test_archives_of_any_shape(recordings, bands):
    made = scenes.made(3, recordings=recordings, frames=1, side=12, bands=bands)
    about = audited(made, np.linspace(430, 910, bands))
    text = render(about)[0]
    page = page_of(text)
    if recordings < 5:
        head = page.text[: page.text.index("What was audited")]
        assert "stands out" not in head
        assert "cannot say what is usual" in section(text, "standing").text
        assert "too few to judge" in section(text, "overview").text
    if recordings == 60:
        assert "The first 40 of 60 are drawn." in page.text


def test_one_broken_section_takes_no_other_with_it(spoilt, monkeypatch):
    def broken(*_):
        raise ValueError("a hole")

    monkeypatch.setattr(differences, "curves", broken)
    text = render(spoilt)[0]
    assert text.count("This section could not be made: ValueError: a hole.") == 3
    assert "recording_02.cu3s: gain 1." in section(text, "spectra").text
    assert "Bhattacharyya distance, by group" in text


def test_bands_that_are_not_in_order_are_drawn_by_wavelength():
    made = scenes.made(3, recordings=5, frames=1, side=12, bands=4)
    about = audited(made, np.array([500.0, 600.0, 550.0, 700.0]))
    _, plots = render(about)
    (means,) = (plot for plot in plots if plot.name == "means")
    name = about.rows[0].name
    assert means.columns["wavelength in nm"].tolist() == [500, 550, 600, 700]
    assert means.columns[name].tolist() == about.groups[name].mean[[0, 2, 1, 3]].tolist()


def test_a_group_has_one_colour_in_all_plots():
    """Before: the first that was there had the first colour, whose was another's beside it."""
    plot, axis = Plot("one", "of two"), along(2, None)
    curves(plot, axis, {"b": np.ones(2)}, ["a", "b"], "title\nvalue")
    drawn = base64.b64decode(plot.image.partition(",")[2]).decode().lower()
    assert VERMILLION.lower() in drawn
    assert BLUE.lower() not in drawn


def test_data_lie_in_a_folder_beside_the_page(spoilt, tmp_path):
    place = write_audit(spoilt, str(tmp_path / "deep" / "audit.html"), data=True)
    page = Page((tmp_path / "deep" / "audit.html").read_text())
    assert str(place) == str(tmp_path / "deep" / "audit.html")
    files = [a["href"] for a in page.of("a") if not a["href"].startswith("#")]
    assert len(files) == len(page.of("img"))
    assert all((tmp_path / "deep" / file).stat().st_size > 20 for file in files)
    lines = (tmp_path / "deep" / "audit" / "shifts.csv").read_text().splitlines()
    assert lines[0].split(",")[0] == "wavelength in nm"
    assert len(lines) == 21


@pytest.mark.parametrize("name", ["audit", "", "folder/", ".html", "audit.htm"])
def test_a_page_needs_a_name(spoilt, tmp_path, name):
    with pytest.raises(InputError, match=r"has no name that ends in \.html"):
        write_audit(spoilt, f"{tmp_path}/{name}")


@needs_browser
def test_a_browser_shows_all_of_it(spoilt, tmp_path):
    rows = tuple(spoilt.rows)
    renamed = {row.name: f"{LONG}{i}" for i, row in enumerate(rows)}
    found = replace(spoilt.found, rows=tuple(replace(row, name=renamed[row.name]) for row in rows))
    groups = {renamed[name]: group for name, group in spoilt.groups.items()}
    for about in (spoilt, replace(spoilt, found=found, groups=groups)):
        place = tmp_path / "audit.html"
        write_audit(about, str(place))
        images = len(Page(place.read_text()).of("img"))
        for looked in look(place, tmp_path):
            assert looked.images == images
            assert (looked.missing, looked.requests, looked.dangling) == (0, [], [])
            assert looked.over == []
            assert not looked.scrolls
