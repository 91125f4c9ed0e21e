"""Is a run's report whole: one file, well-formed, true, and said where there is nothing to show?"""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from archives import edit, real_scene
from browser import look, needs_browser
from markup import Page
from settings import scaling_of
from stores import s3_server

from cuvis_dist.archive import open_archive
from cuvis_dist.cli import main
from cuvis_dist.demo import DemoSettings, write_demo
from cuvis_dist.evaluation.seen import Look
from cuvis_dist.report import noting, page
from cuvis_dist.report.kept import PARTS, read_parts
from cuvis_dist.report.writing import report_on
from cuvis_dist.runs.record import RunRecord
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.runs.two_phase import run_trainrun
from cuvis_dist.storage import OutputFolder

HERE = scaling_of(workers=0, train_workers=0)
#: The dead band of :func:`initialized`.
DEAD = 4


def silent(event) -> None:
    pass


def kill_a_band(archive: Path) -> None:
    for path in archive.glob("*.npz"):
        with np.load(path) as content:
            values = dict(content)
        values["cube"][..., DEAD] = 0.25
        np.savez(path, **values)


@pytest.fixture(scope="module")
def trained(demo_trainrun, tmp_path_factory) -> Path:
    """Return the output folder of a run of both phases."""
    out = tmp_path_factory.mktemp("trained") / "results"
    record = run_trainrun(load_trainrun(demo_trainrun, output_dir=out), HERE, silent)
    assert record.report == str(out / "report.html")
    return out


@pytest.fixture(scope="module")
def initialized(demo_trainrun, tmp_path_factory) -> Path:
    """Return the folder of `init` on recordings with a dead band, names that are markup, no val."""
    folder = tmp_path_factory.mktemp("init") / "demo"
    shutil.copytree(demo_trainrun.parent, folder)
    kill_a_band(folder / "archive")
    path = folder / "trainrun.yaml"
    universe = folder / "archive" / "universe.csv"

    def change(run):
        run["name"] = "<b>bold</b> & $x_1$"
        run["data"]["params"]["universe_csv"] = str(universe)
        del run["data"]["splits"]["val"], run["data"]["splits"]["test"]
        for selector in run["data"]["splits"]["train"]:
            selector["source"] = selector["source"].replace("recording_00", "<i>&$a$")

    edit(path, change)
    universe.write_text(universe.read_text().replace("recording_00.cu3s", "<i>&$a$.cu3s"))
    run = load_trainrun(path, output_dir=folder / "results").initialization_only()
    run_trainrun(run, HERE, silent)
    return folder / "results"


@pytest.fixture(scope="module")
def init(demo_trainrun, tmp_path_factory) -> Path:
    """Return the folder of `init` alone, on frames in which all is well."""
    out = tmp_path_factory.mktemp("alone") / "results"
    run_trainrun(load_trainrun(demo_trainrun, output_dir=out).initialization_only(), HERE, silent)
    return out


@pytest.fixture(scope="module")
def dead(demo_trainrun, tmp_path_factory) -> Path:
    """Return the folder of a run of both phases on recordings with a dead band."""
    return both_phases(demo_trainrun, tmp_path_factory.mktemp("dead") / "demo", spoil=True)


@pytest.fixture(scope="module")
def lhdata(demo_trainrun, tmp_path_factory) -> Path:
    """Return the folder of a run of both phases on a real scene of 186 bands."""
    folder = tmp_path_factory.mktemp("lhdata") / "scene"
    folder.mkdir()
    real_scene("lhdata", folder / "archive")
    return both_phases(demo_trainrun, folder, bands=186)


def both_phases(demo: Path, folder: Path, spoil: bool = False, bands: int | None = None) -> Path:
    """Run the demo on a copy of its archive in which a band is dead, or on another archive."""
    shutil.copytree(
        demo.parent, folder, dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("archive") if bands else None,
    )  # fmt: skip
    if spoil:
        kill_a_band(folder / "archive")

    def on(run):
        run["data"]["params"]["universe_csv"] = str(folder / "archive" / "universe.csv")
        if bands:
            run["data"]["splits"] = {key: [{"kind": "all"}] for key in ("train", "val", "test")}

    def of(pipeline):
        for node in pipeline["nodes"]:
            for name in (
                {"input_channels", "num_channels"} & node["hparams"].keys() if bands else ()
            ):
                node["hparams"][name] = bands

    edit(folder / "trainrun.yaml", on)
    edit(folder / "pipeline.yaml", of)
    run = load_trainrun(folder / "trainrun.yaml", output_dir=folder / "results")
    run_trainrun(run, HERE, silent)
    return folder / "results"


def page_of(out: Path, name: str = "report.html") -> Page:
    text = (out / name).read_text()
    assert len(text.encode()) < 5_000_000
    page = Page(text)
    for image in page.of("img"):
        assert image["src"].startswith(("data:image/svg+xml;base64,", "data:image/png;base64,"))
        assert len(image["alt"]) > 20
    for link in page.of("a"):
        anchor = link["href"].startswith("#") and link["href"][1:] in page.ids
        assert anchor or (out / link["href"]).is_file()
    assert not page.of("script")
    assert not page.of("link")
    assert not re.search(r"url\(|@import|https?://", text)
    return page


def section(out: Path, anchor: str, name: str = "report.html") -> Page:
    (found,) = re.findall(rf'<section id="{anchor}".*?</section>', (out / name).read_text(), re.S)
    return Page(found)


def test_a_run_of_both_phases_shows_all_that_there_is(trained):
    page = page_of(trained)
    assert "The fit looks sound" in page.text
    assert "This section could not be made" not in page.text
    for words in (
        "Mean spectrum of data.cube over wavelength in nm",
        "mean spectrum of each recording over wavelength in nm, 3 curves",
        "Correlation of each band",
        "Weights that selector gives to bands over wavelength in nm",
        "squared distances on val, after phase 1, beside that of χ² with 12 degrees",
        "ROC curves on test. after phase 1: area 0.",
        "Losses per epoch: train_loss",
        "Timeline of",
    ):
        assert sum(words in alt for alt in page.alts) == 1, words
    record = RunRecord.load(trained)
    restored = f"Epoch {record.checkpoint['epoch']} (counted from 0) with metrics_anomaly/iou"
    assert restored in page.text
    value = record.metrics["test"]["metrics_anomaly/iou"]
    assert f"{value:.4f}" in page.text
    assert "The pipeline has no principal components" in page.text
    assert "Nothing was skipped" in page.text
    frames = [alt for alt in page.alts if alt.startswith("Frame ")]
    assert any("(worst)" in alt for alt in frames)
    assert sum("(median)" in alt for alt in frames) == 2
    assert any("annotated pixels" in alt for alt in frames)
    assert record.seconds["report"] < 10
    assert record.result()["report"] == str(trained / "report.html")


def test_init_of_a_dead_band_says_so_beside_the_plot(initialized):
    page = page_of(initialized)
    assert "things to look at" in page.text
    finding = "constant over the train split: band 4"
    assert page.text.index(finding) < page.text.index("What was run")
    assert finding in section(initialized, "correlation").text
    assert finding in section(initialized, "selection").text
    shown = section(initialized, "spectra")
    assert "1 band is constant, marked" in shown.alts[0]
    assert "Constant over the train split: band 4 (" in shown.text
    assert "There was no gradient training" in section(initialized, "learning").text
    for anchor in ("scores", "rates", "frames"):
        assert "there is no val or test split" in section(initialized, anchor).text.lower() or (
            "There is no split" in section(initialized, anchor).text
        )


def test_a_run_with_a_dead_band_says_so_too(dead):
    assert "2 things to look at" in page_of(dead).text
    assert "Constant over the train split: band 4 (" in section(dead, "spectra").text
    assert "training moved" in section(dead, "selection").text


def test_the_page_of_a_real_scene(lhdata):
    page = page_of(lhdata)
    assert "This section could not be made" not in page.text
    assert "186, 390 to 856 nm" in page.text
    assert "Frame lhdata.cu3s#" in "".join(page.alts)
    assert "pass 1: normalizer, selector, rx_detector" in "".join(page.alts)


def test_names_are_text_and_no_markup(initialized):
    page = page_of(initialized)
    assert "<b>bold</b> & $x_1$" in page.text
    assert "<i>&$a$.cu3s" in page.text
    assert not page.of("b")
    assert not page.of("i")


def test_data_lie_beside_the_plots_as_csv(trained, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(trained, out)
    (out / "report.html").unlink()
    assert main(["report", str(out), "--data"]) == 0
    assert capsys.readouterr().out == f"report   {out / 'report.html'}\n"
    page = page_of(out)
    assert len([a for a in page.of("a") if a["href"].endswith(".csv")]) == len(page.of("img"))
    with open(out / "report" / "spectrum.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert rows[0]["wavelength in nm"] == "430.0"
    cubes = np.concatenate(
        [np.load(path)["cube"].reshape(-1, 12) for path in train_frames(out)]
    ).astype(float)
    means = [float(row["mean"]) for row in rows]
    np.testing.assert_allclose(means, cubes.mean(0), rtol=1e-6)
    np.testing.assert_allclose([float(r["std"]) for r in rows], cubes.std(0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose([float(r["maximum"]) for r in rows], cubes.max(0), rtol=1e-6)
    with open(out / "report" / "recordings.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    one = [p for p in train_frames(out) if "recording_01" in p.name]
    mean = np.concatenate([np.load(path)["cube"].reshape(-1, 12) for path in one]).mean(0)
    found = [float(row["recording_01.cu3s"]) for row in rows]
    np.testing.assert_allclose(found, mean, rtol=1e-5)


def train_frames(out: Path) -> list[Path]:
    run = load_trainrun(RunRecord.load(out).trainrun)
    return [Path(frame.path) for frame in open_archive(run.datamodule(), "train").frames]


def test_two_runs_beside_each_other(trained, initialized, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(trained, out)
    assert main(["report", str(out), "--against", str(initialized)]) == 0
    assert capsys.readouterr().out == f"report   {out / 'report-against.html'}\n"
    page = page_of(out, "report-against.html")
    assert "beside demo/results" in page.text
    assert "What differs in settings and versions" in page.text
    assert "This section could not be made" not in page.text


def test_the_folder_may_be_at_a_uri(trained, tmp_path, monkeypatch, capsys):
    with s3_server() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        folder = OutputFolder(f"s3://bucket/{tmp_path.name}")
        for name in ("run.json", *(f"report/{part}.state" for part in PARTS)):
            folder.upload(trained / name, name)
        assert main(["report", str(folder), "--data"]) == 0
        assert capsys.readouterr().out == f"report   {folder}/report.html\n"
        assert "Mean spectrum of data.cube" in folder.read("report.html").decode()
        assert folder.read("report/spectrum.csv").startswith(b"wavelength in nm,mean,std,")


def test_a_folder_without_a_run_is_told(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "has no run.json" in capsys.readouterr().err


def test_a_record_alone_makes_a_report_that_says_so(trained, tmp_path):
    out = tmp_path / "alone"
    out.mkdir()
    shutil.copy(trained / "run.json", out)
    assert main(["report", str(out)]) == 0
    page = page_of(out)
    assert "No mean spectrum was kept" in page.text
    assert "The epochs of this training were not noted" in page.text
    assert "their wavelengths are not known" in page.text


def test_a_damaged_part_is_left_out(trained, tmp_path, capsys):
    out = tmp_path / "copy"
    shutil.copytree(trained, out)
    (out / "report" / "seen.state").write_bytes(b"nonsense")
    assert main(["report", str(out)]) == 0
    assert "No scores were seen" in page_of(out).text
    assert "seen.state is not used for the report: it is damaged" in capsys.readouterr().err


def test_a_report_that_fails_is_a_warning(tmp_path, warnings):
    assert report_on(OutputFolder(tmp_path), {"no": "record"}) is not None  # a section says so
    (tmp_path / "report.html").unlink()
    (tmp_path / "report.html").mkdir()
    assert report_on(OutputFolder(tmp_path), {"trainrun": "x"}) is None
    assert any("no report was written" in message for message in warnings)


def test_a_run_whose_report_fails_ends_as_it_would(demo_trainrun, tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise MemoryError("no room for a page")

    monkeypatch.setattr(page, "render", broken)
    options = ["--output-dir", str(tmp_path), "--workers", "0"]
    assert main(["init", str(demo_trainrun), *options]) == 0
    assert "no report was written: MemoryError: no room for a page" in capsys.readouterr().err
    record = RunRecord.load(tmp_path)
    assert (record.status, record.report) == ("done", None)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("odd", ["one band", "not a number", "in another script"])
def test_an_odd_archive_has_a_page(odd, tmp_path):
    settings = DemoSettings(
        frames=12, height=16, width=20, recordings=2, bands=1 if odd == "one band" else 12
    )
    path = write_demo(tmp_path / "aufnahme ä 中文", settings)
    if odd == "not a number":
        for frame in (path.parent / "archive").glob("recording_0?_00[45].npz"):  # of test
            with np.load(frame) as content:
                values = dict(content)
            values["cube"][3, 4, 2] = np.nan
            np.savez(frame, **values)
    run = load_trainrun(path).initialization_only()
    found = page_of(Path(run_trainrun(run, HERE, silent).output_dir))
    assert "This section could not be made" not in found.text
    assert "aufnahme ä 中文" in found.text
    assert ("4 pixels of test have no finite score" in found.text) == (odd == "not a number")
    assert "Mean spectrum of data.cube over wavelength in nm" in found.alts[0]


def test_a_result_does_not_depend_on_what_is_seen(trained, demo_trainrun, tmp_path, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("nothing can be seen")

    monkeypatch.setattr(Look, "batch", broken)
    monkeypatch.setattr(noting, "portraits", broken)
    record = run_trainrun(load_trainrun(demo_trainrun, output_dir=tmp_path), HERE, silent)
    assert record.metrics == RunRecord.load(trained).metrics
    assert record.status == "done"
    assert "No frame was kept" in page_of(tmp_path).text


def test_recordings_are_those_of_a_store_too(trained, demo_trainrun, tmp_path):
    """Measured into a store, and then taken from it without reading."""
    expected = recordings_of(trained)
    assert len(expected) == 3
    for name in ("filling", "filled"):
        run = load_trainrun(demo_trainrun, output_dir=tmp_path / name).initialization_only()
        scaling = HERE.replace(measuring={"store": str(tmp_path / "store")})
        record = run_trainrun(run, scaling, silent)
        found = recordings_of(tmp_path / name)
        assert found.keys() == expected.keys()
        for recording, spectra in expected.items():
            for what, values in spectra.items():
                np.testing.assert_allclose(found[recording][what], values, rtol=1e-12)
    assert record.passes[0].from_store == record.passes[0].frames
    assert "not read, but taken from a store" in page_of(tmp_path / "filled").text


def recordings_of(out: Path) -> dict:
    (port,) = (
        port
        for port in read_parts(OutputFolder(out))["measured"]["ports"]
        if port["source"] == "data.cube"
    )
    return port["recordings"]


@pytest.fixture(params=["trained", "init", "lhdata", "dead", "initialized"])
def folder(request) -> Path:
    return request.getfixturevalue(request.param)


@needs_browser
def test_a_browser_shows_all_of_it(folder, tmp_path):
    """Of the demo, of `init`, of 186 bands of real data, of a dead band, and without val."""
    for looked in look(folder / "report.html", tmp_path):
        assert looked.images == len(page_of(folder).of("img"))
        assert (looked.missing, looked.requests, looked.dangling) == (0, [], [])
        assert not looked.scrolls
        assert looked.over == []


@needs_browser
def test_a_browser_notices_what_is_wrong_with_a_page(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text(
        f"<!DOCTYPE html><title>x</title><p>{'W' * 300}</p><a href='#nowhere'>x</a>"
        "<img src='http://127.0.0.1:9/x.png' alt='elsewhere'>"
    )
    for looked in look(page, tmp_path):
        assert looked.scrolls
        assert looked.over[0].startswith("P: WWW")
        assert looked.missing == 1
        assert looked.requests == ["http://127.0.0.1:9/x.png"]
        assert looked.dangling == ["#nowhere"]
