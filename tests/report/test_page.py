"""What does the page show of runs that are large, odd or old? From made-up notes, without a run."""

from __future__ import annotations

import numpy as np
from browser import look, needs_browser

from cuvis_dist.report import page, spectra
from cuvis_dist.report.kept import Kept

LONG = "recording_of_a_very_long_name_without_any_place_to_break_it_" * 3
RECORD = {
    "job": "run",
    "name": "made up",
    "trainrun": f"/data/{LONG}/trainrun.yaml",
    "status": "done",
    "started": "2026-01-01T00:00:00+00:00",
    "finished": "2026-01-01T00:05:00+00:00",
}


def kept(recordings: int = 1000, bands: int = 186, known: bool = True, **record) -> Kept:
    """Return notes of a run with many recordings, and all kinds of nodes."""
    random = np.random.default_rng(1)
    mean = np.linspace(0.2, 0.5, bands)
    cov = np.diag(np.linspace(0.01, 0.02, bands))
    spread = np.sqrt(cov.diagonal())
    found = {
        f"{LONG}{i}": {"n": 100, "mean": mean + random.normal(0, 0.01), "std": spread}
        for i in range(recordings)
    }
    values = {"n": 100 * recordings, "mean": mean, "std": spread, "covariance": cov}
    port = {"source": "data.cube", "bands": True, "values": values, "recordings": found}
    loadings = np.linalg.qr(random.normal(size=(bands, 6)))[0].T
    nodes = [
        {"node": "pca", "kind": "loadings", "bands": True,
         "values": {"loadings": loadings, "variances": np.geomspace(1, 1e-3, 6)}},
        {"node": "rx", "kind": "gaussian", "bands": False,
         "values": {"mean": mean[:6], "covariance": cov[:6, :6], "eps": np.array(1e-6)}},
    ]  # fmt: skip
    wavelengths = np.linspace(400, 900, bands) if known else None
    measured = {"ports": [port]}
    learnt = {"initialized": nodes, "wavelengths": wavelengths}
    diary = [{"hook": "epoch_start", "at": 0.0, "epoch": 1}]
    for epoch in range(1, 1001):
        values = {"train_loss": 1 / epoch, "val_loss": 2 / epoch, f"{LONG}/iou": 0.5}
        diary.append({"hook": "epoch_end", "at": float(epoch), "epoch": epoch, "metrics": values})
        diary.append({"hook": "epoch_start", "at": float(epoch), "epoch": epoch + 1})
    return Kept("/out/a", RECORD | record, measured, learnt, {}, diary)


def text_of(run: Kept) -> str:
    content, _ = page.render([run])
    assert "This section could not be made" not in content
    return content


def test_loadings_and_variances_of_components():
    content = text_of(kept(recordings=2))
    assert "Loadings of the first 4 components of pca over wavelength in nm" in content
    assert "Variance of each of the 6 components of pca" in content


def test_bands_have_numbers_where_wavelengths_are_not_known():
    content = text_of(kept(recordings=2, known=False))
    assert "Mean spectrum of data.cube over band," in content
    assert "their wavelengths are not known" in content


def test_many_recordings_and_epochs_stay_a_small_page():
    run = kept()
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
    assert "30 frames were left out of phase 1, the first 20" in content
    assert "Pass 1: 4 frames were measured by an earlier try" in content
    assert "Pass 1: 1 of 3 shards were run again" in content
    assert "Pass 1: 2 frames were not read, but taken from a store" in content
    assert "9 frames, 5 pixels" in content
    assert "2 GB in 1 passes" in content


def test_a_failed_run_says_so():
    content = text_of(kept(2, status="failed", error="no room <left>"))
    assert "failed: no room &lt;left&gt;" in content


def test_one_broken_section_takes_no_other_with_it(monkeypatch):
    def spectra(runs):
        raise ValueError("a hole")

    monkeypatch.setattr(page, "_SECTIONS", (page._SECTIONS[0], spectra, *page._SECTIONS[2:]))
    content, _ = page.render([kept(2)])
    assert "This section could not be made: ValueError: a hole." in content
    assert "Loadings of the first 4" in content


def test_a_band_without_variation_is_named():
    run = kept(2)
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
