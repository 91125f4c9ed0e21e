"""What does the page show of runs that are large, odd or old? From made-up notes, without a run."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
from browser import look, needs_browser
from markup import Page
from matplotlib.figure import Figure
from notes import LONG, judged, kept

from cuvis_dist.report import course, overview, page, pictures, rates, spectra
from cuvis_dist.report.kept import Kept
from cuvis_dist.report.plot import duration, logarithmic, number, several


def text_of(run: Kept) -> str:
    content, _ = page.render([run])
    assert "This section could not be made" not in content
    return content


def test_loadings_and_variances_of_components():
    content = text_of(kept())
    assert "Loadings of the first 4 components of pca over wavelength in nm" in content
    assert "Variance of each of the 6 components of pca" in content


def test_bands_have_numbers_where_wavelengths_are_not_known():
    content = text_of(kept(known=False))
    assert "Mean spectrum of data.cube over band," in content
    assert "their wavelengths are not known" in content


def test_many_recordings_and_epochs_stay_a_small_page():
    run = kept(recordings=1000, epochs=1000)
    content, plots = page.render([run])
    assert len(content) < 2_500_000
    (curves,) = (plot for plot in plots if plot.name == "recordings")
    assert curves.image.startswith("data:image/png")
    assert len(curves.columns) == 1001
    assert "the first 12 of 1000" in content


def test_a_page_that_grows_too_large_loses_plots(monkeypatch):
    monkeypatch.setattr(page, "LARGEST", 300_000)
    content = text_of(kept(recordings=3))
    assert len(content) < 300_000
    assert "Some plots are left out, to keep the page small." in content


def test_what_was_skipped_and_done_again():
    passes = [
        {"nodes": {"rx": {"pixels": 5}}, "frames": 9, "bytes": 2e9, "shards": 3, "seconds": 1.5,
         "restored_frames": 4, "repeated": [1], "from_store": 2},
    ]  # fmt: skip
    skipped = {f"{LONG}#{i}": "it is damaged" for i in range(30)}
    content = text_of(kept(3, passes=passes, skipped_frames=skipped))
    assert "30 frames left out of phase 1, since they could not be used, the first 20" in content
    assert "Pass 1: 4 frames were measured by an earlier try" in content
    assert "Pass 1: 1 of 3 shards were run again" in content
    assert "Pass 1: 2 frames were not read, but taken from a store" in content
    assert "9 frames, 5 pixels" in content
    assert "2 GB in 1 pass<" in content


def test_thresholds_that_were_not_calibrated():
    content = text_of(kept(calibration={"reason": "val split is single-class", "reports": {}}))
    assert "not calibrated: val split is single-class" in content


def test_an_eps_that_is_larger_than_the_variances_is_named():
    run = kept()
    (rx,) = (node for node in run.nodes["initialized"] if node["node"] == "rx")
    assert "hardly more than its eps" not in text_of(run)
    rx["values"]["covariance"] = np.diag([1e-3, *[1.1e-6] * 5])
    assert "5 of its 6 eigenvalues are hardly more than its eps of 10⁻⁶" in text_of(run)


def test_a_failed_run_says_so():
    content = text_of(kept(status="failed", error="no room <left>"))
    assert "failed: no room &lt;left&gt;" in content


def test_one_broken_section_takes_no_other_with_it(monkeypatch):
    def spectra(runs):
        raise ValueError("a hole")

    monkeypatch.setattr(page, "_SECTIONS", (page._SECTIONS[0], spectra, *page._SECTIONS[2:]))
    content, _ = page.render([kept()])
    assert "This section could not be made: ValueError: a hole." in content
    assert "Loadings of the first 4" in content


def test_a_band_without_variation_is_named():
    run = kept()
    port = run.measured["ports"][0]
    port["values"]["std"] = np.where(np.arange(186) == 7, 0.0, port["values"]["std"])
    assert spectra.constant_bands(run, port) == ["band 7 (418.919 nm)"]


@needs_browser
def test_long_names_do_not_overflow(tmp_path):
    skipped = {f"{LONG}#{i}": f"cannot read {LONG}" for i in range(30)}
    findings = [{"node": LONG, "message": f"constant: {LONG}"}]
    content = text_of(kept(60, skipped_frames=skipped, findings=findings))
    (tmp_path / "page.html").write_text(content)
    for looked in look(tmp_path / "page.html", tmp_path):
        assert (looked.missing, looked.requests, looked.dangling) == (0, [], [])
        assert looked.over == []
        assert not looked.scrolls


# ---- odd archives ------------------------------------------------------------------------


@pytest.mark.parametrize("bands", [1, 2, 1000])
def test_any_number_of_bands(bands):
    content = text_of(kept(recordings=3, bands=bands))
    assert "Mean spectrum of data.cube over" in content
    assert len(content) < 5_000_000


def test_wavelengths_that_are_in_no_order_are_no_axis():
    """Lines would go to and fro; it is said that there are such wavelengths."""
    run = kept(bands=12)
    run.nodes["wavelengths"] = np.roll(run.nodes["wavelengths"], 5)
    assert "over band," in spectra.spectra([run]).plots[0].alt
    assert "not in ascending order" in str(overview.overview([run]).tables[0].rows)
    for known in (np.linspace(900, 400, 12), np.round(np.linspace(400, 403, 12))):
        run.nodes["wavelengths"] = known
        assert "over wavelength in nm," in spectra.spectra([run]).plots[0].alt


def test_where_every_band_is_constant_the_spectrum_is_still_seen():
    run = kept()
    values = run.measured["ports"][0]["values"]
    values["std"], values["covariance"] = np.zeros(186), np.zeros((186, 186))
    section = spectra.spectra([run])
    assert "186 bands are constant, marked" in section.plots[0].alt
    assert "181 more" in section.said[0]
    assert len(section.plots[0].image) < 95_000, "lines in all bands hide everything else"


def test_scores_that_are_no_numbers_are_a_finding_and_white():
    scores = np.linspace(0.1, 2, 48).reshape(6, 8)
    scores[0, 0], scores[1, 1] = np.nan, np.inf
    annotated = np.zeros((6, 8), bool)
    annotated[5] = True
    run = kept()
    run.seen.update(judged(scores, annotated))
    content, said = Page(text_of(run)), "2 pixels of val have no finite score"
    assert content.text.count(said) == 2, "above, and beside the plot"
    assert overview.findings([run]) == [("scores", said, "scores")]
    assert "Scores of val are dark at 0.177" in content.text


@pytest.mark.parametrize("scores", [np.full((4, 5), np.nan), np.zeros((4, 5)), np.ones((1, 1))])
def test_scores_of_which_nothing_is_seen(scores):
    run = kept()
    run.seen.update(judged(scores, np.zeros(scores.shape, bool)))
    text_of(run)


def test_where_nothing_is_annotated_nothing_is_called_wrong():
    """Upstream's data node gives an empty mask to frames that have none."""
    run = kept()
    run.seen.update(judged(np.linspace(0, 2, 48).reshape(6, 8), np.zeros((6, 8), bool)))
    content = Page(text_of(run))
    assert "no pixel is annotated as an anomaly" in content.text
    assert "wrong" not in content.text
    assert "anomalies seen in 25 % of its pixels" in content.text
    assert "blue where an anomaly was seen" in content.text


def test_a_pipeline_may_judge_smaller_frames_than_it_reads():
    run, scores = kept(), np.linspace(0, 2, 48).reshape(6, 8)
    run.seen.update(judged(scores, scores > 1, colours=np.zeros((12, 16, 3))))
    run.seen["val"]["pictures"][0]["annotated"] = np.ones((12, 16), bool)
    assert "Frame recording.cu3s#0 of val" in pictures.frames([run]).plots[0].alt


def test_a_metric_that_says_something_else_than_the_curve_is_explained():
    scores = np.linspace(0, 2, 48).reshape(6, 8)
    run = kept(metrics={"val": {"m/average_precision": 0.3}})
    run.seen.update(judged(scores, scores > 1.5))
    said = "All scores of val have an average precision of 1.0000; m/average_precision is 0.3000"
    assert rates.rates([run]).said[0].startswith(said)
    run.record["metrics"]["val"]["m/average_precision"] = 0.999
    assert rates.rates([run]).said == []


def test_a_training_is_one_whatever_its_nodes_show():
    """Of a network there are no weights of bands to show; its curves are those after training."""
    scores = np.linspace(0, 2, 48).reshape(6, 8)
    run = kept()
    run.seen.update(judged(scores, scores > 1.5))
    assert "after phase 1: area" in rates.rates([run]).plots[0].alt
    run.nodes["trained"] = []
    assert "after training: area" in rates.rates([run]).plots[0].alt


def test_curves_that_say_the_same_are_drawn_once():
    run = kept()
    for note in run.diary:
        if "metrics" in note:
            loss = note["metrics"]["train_loss"]
            note["metrics"] |= {"train/head_loss": loss, "lr-AdamW": 1e-3, "m/f1_score": 0.0}
    losses, metrics = course.learning([run]).plots
    assert list(losses.columns) == ["epoch", "train_loss", "val_loss"]
    assert set(metrics.columns) == {"epoch", "m/f1_score", f"{LONG}/iou"}


def test_runs_of_unlike_bands_share_no_plot():
    """Numbers of bands are no wavelengths, and reflectances no counts."""
    one, other = kept(bands=12), kept(bands=20, known=False)
    content, plots = page.render([one, other])
    assert "This section could not be made" not in content
    names = [plot.name for plot in plots]
    assert {"spectrum", "spectrum-other"} <= set(names)


@pytest.mark.filterwarnings("error")
def test_names_in_any_script_are_no_warning_on_the_terminal():
    run = kept()
    recordings = run.measured["ports"][0]["recordings"]
    run.measured["ports"][0]["recordings"] = {
        f"aufnahme_ä_中文_{i}": each for i, each in enumerate(recordings.values())
    }
    assert "aufnahme_ä_中文_0" in text_of(run)


def test_headings_begin_with_the_title_and_skip_no_level():
    run = kept(findings=[{"node": "rx", "message": "it is bad"}])
    levels = [int(tag[1]) for tag, _ in Page(text_of(run)).tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.123456, "0.1235"), (1e-05, "10⁻⁵"), (3.7e9, "3.7\u00a0\u00d7\u00a010⁹"),
        (12345.6, "12\u202f350"), (0.9999986, "1"), (0.0, "0"), (float("nan"), "NaN"),
        (float("-inf"), "-∞"), (3, "3"), (65536, "65\u202f536"), (True, "True"), ("x", "x"),
        (-0.00002, "-2\u00a0\u00d7\u00a010⁻⁵"),
    ],
)  # fmt: skip
def test_numbers_are_written_as_people_do(value, said):
    assert number(value) == said


@pytest.mark.parametrize(("high", "most"), [(200, 8), (1e7, 9)])
def test_a_logarithmic_axis_has_as_many_names_as_it_has_room(high, most):
    axes = Figure().subplots()
    axes.plot([1, high], [1, 1])
    logarithmic(axes.xaxis, finely=True)
    low, end = axes.get_xlim()
    shown = [tick for tick in axes.get_xticks() if low <= tick <= end]
    assert 4 <= len(shown) <= most


def test_threshold_needs_more_digits():
    assert number(0.9999986290931702, 7) == "0.9999986"


def test_times_and_counts_are_written_as_people_do():
    assert [duration(s) for s in (0.042, 12.3, 99.6, 3700)] == [
        "0.04 s", "12 s", "100 s", "1 h 1 min"
    ]  # fmt: skip
    assert [several(1, "pass"), several(2, "pass"), several(1, "frame"), several(0, "frame")] == [
        "1 pass", "2 passes", "1 frame", "0 frames"
    ]  # fmt: skip
