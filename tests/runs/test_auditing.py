"""Does ``audit`` say what a store knows, and ``init --robust`` leave out what it should?"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from archives import edit

from cuvis_dist.cli import main
from cuvis_dist.demo import DemoSettings, write_demo

SIZES = DemoSettings(frames=32, height=24, width=24, bands=16, recordings=8)
WHICH = "recording_02"


def archive(folder: Path) -> Path:
    """Write a demo, all frames of which train, with a column ``lamp``; return its trainrun."""
    trainrun = write_demo(folder, SIZES)

    def phase_1(content):
        every = [{"kind": "all"}]
        content["data"]["splits"] = {"train": every, "val": every, "test": every}
        for name in ("training", "unfreeze_nodes", "loss_nodes", "metric_nodes"):
            content.pop(name)

    edit(trainrun, phase_1)
    universe = folder / "archive" / "universe.csv"
    with universe.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row["lamp"] = "new" if int(row["index"]) % 2 else "old"
    with universe.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return trainrun


def spoil(trainrun: Path, names: str, change) -> None:
    """Change the cubes of some frames."""
    found = sorted((trainrun.parent / "archive").glob(f"{names}.npz"))
    assert found
    for path in found:
        with np.load(path) as known:
            content = dict(known)
        content["cube"] = change(content["cube"]).astype(np.float32)
        np.savez(path, **content)


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> tuple[Path, str]:
    """A trainrun with one recording that is 30 % too bright, its store, and its initialization."""
    trainrun = archive(tmp_path_factory.mktemp("audited"))
    spoil(trainrun, f"{WHICH}_*", lambda cube: 1.3 * cube)
    spoil(trainrun, "recording_05_*", lambda cube: cube * (np.arange(cube.shape[-1]) != 3))
    store = str(trainrun.parent / "store")
    assert main(["init", str(trainrun), "--store", store]) == 0
    return trainrun, store


def audit(stored, *options: str) -> int:
    trainrun, store = stored
    return main(["audit", str(trainrun), "--store", store, *options])


def test_the_table_names_the_recording_and_the_cause(stored, capsys):
    assert audit(stored) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("32 frames, 18,432 pixels at data.cube from ")
    assert lines[1].split()[:3] == ["stands", "out", "recording"]
    causes = {line.split()[1]: line for line in lines[2:10]}
    assert causes["recording_05.cu3s"].endswith("band 3 (526 nm) constant")
    assert re.search(r"  gain 1\.(3|29|31) over all bands$", causes[f"{WHICH}.cu3s"])
    (outside,) = (i for i, line in enumerate(lines) if line.startswith("outside  "))
    assert lines[outside - 1].startswith("2 of 8 stand out")
    assert "sampled pixels are outside of their bulk" in lines[outside]
    assert lines[outside + 1].endswith("recording_05.cu3s")


def test_json_by_a_column_of_the_universe(stored, capsys):
    assert audit(stored, "--by", "lamp", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert sorted(row["name"] for row in found["rows"]) == ["new", "old"]
    assert [row["frames"] for row in found["rows"]] == [16, 16]
    assert "too few to judge" in found["remarks"][0]


def test_drift_above_the_limit_has_an_exit_code_of_its_own(stored, capsys):
    trainrun, _ = stored
    trained = trainrun.parent / "results" / "trained_models"
    against = str(trained / "Channel_Selector_initialized.yaml")
    assert audit(stored, "--against", against, "--max-drift", "0.001", "--json") == 0
    same = {each["node"]: each for each in json.loads(capsys.readouterr().out)["drift"]}
    assert same.keys() == {"normalizer", "selector", "rx_detector", "logit_head"}
    head = same.pop("logit_head")  # on a sample of the pixels: see audit/test_drift.py
    assert head["ratio"] < 4 * head["figures"]["standard_error"] < 0.05
    assert max(each["ratio"] for each in same.values()) < 1e-6
    assert same["rx_detector"]["groups"].keys() == {f"recording_{i:02d}.cu3s" for i in range(8)}

    other = archive(trainrun.parent / "other")
    spoil(other, "*", lambda cube: 1.1 * cube)
    later = other, str(other.parent / "store")
    assert main(["measure", str(other), "--store", later[1]]) == 0
    capsys.readouterr()
    assert audit(later, "--against", against, "--max-drift", "0.5") == 0
    said = capsys.readouterr().out
    assert "drift    rx_detector: 0." in said
    page = trainrun.parent / "pages" / "audit.html"
    options = ["--report", str(page), "--data"]
    assert audit(later, "--against", against, "--max-drift", "0.01", *options) == 5
    printed = capsys.readouterr()
    assert "has drifted by" in printed.err
    assert printed.out.splitlines()[-1] == f"report   {page}"
    text = page.read_text()
    assert "This section could not be made" not in text
    for words in ("of itself, and 0.01 is allowed", 'id="drift"', later[1], "18,432", against):
        assert words in text
    written = {path.name for path in page.with_suffix("").iterdir()}
    assert {"means.csv", "noise.csv", "drift-bands-rx_detector.csv"} <= written
    lines = (page.with_suffix("") / "drift-rx_detector.csv").read_text().splitlines()
    assert lines[0] == "wavelength in nm,mean then,mean now"
    assert len(lines) == 1 + SIZES.bands


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--by", "lens"], "no field 'lens' to group by; there are recording, frame, source"),
        (["--max-drift", "0.1"], "needs a pipeline to compare with"),
        (["--against", "nowhere.yaml"], "nowhere"),
        (["--report", "audit.pdf"], "has no name that ends in .html"),
        (["--data"], "name it, as in --report FILE"),
        (["--set", "measuring.pixels=finite"], "cuvis-dist measure TRAINRUN --store"),
    ],
)
def test_what_cannot_be_answered_is_said(stored, options, words, capsys):
    assert audit(stored, *options) == 2
    assert words in capsys.readouterr().err


def test_a_pipeline_without_a_covariance_is_refused(stored, tmp_path, capsys):
    trainrun, store = stored
    content = yaml.safe_load(trainrun.read_text())
    pipeline = yaml.safe_load(trainrun.with_name("pipeline.yaml").read_text())
    pipeline["nodes"] = [n for n in pipeline["nodes"] if n["name"] in ("data", "normalizer")]
    pipeline["connections"] = pipeline["connections"][:1]
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    (tmp_path / "trainrun.yaml").write_text(yaml.safe_dump(content))
    assert main(["audit", str(tmp_path / "trainrun.yaml"), "--store", store]) == 2
    assert "measures no covariance" in capsys.readouterr().err


def test_robust_leaves_out_contaminated_frames_and_says_so(tmp_path, capsys):
    trainrun = archive(tmp_path)
    store = str(tmp_path / "store")

    def flipped(cube):
        cube = cube.copy()
        cube[:12] = cube[:12, :, ::-1]
        return cube

    bad = {f"{name}.cu3s#{i}" for name, i in (("recording_01", 1), ("recording_04", 2))}
    assert main(["init", str(trainrun), "--store", store, "--robust", "0.8"]) == 0
    assert "left out" not in capsys.readouterr().out
    for name in ("recording_01_001", "recording_04_002"):
        spoil(trainrun, name, flipped)
    assert main(["init", str(trainrun), "--store", store, "--robust", "0.8"]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "results" / "run.json").read_text())
    assert record["left_out"].keys() == bad
    assert [p["frames"] for p in record["passes"]] == [30] * len(record["passes"])
    assert all(f"left out {words}" in said for words in record["left_out"].values())


def test_robust_needs_a_store(tmp_path, capsys):
    assert main(["init", str(archive(tmp_path)), "--robust", "0.9"]) == 2
    assert "name one (--store FOLDER)" in capsys.readouterr().err


def test_robust_pixels_leaves_out_pixels_inside_frames_and_says_so(tmp_path, capsys):
    trainrun = archive(tmp_path)
    store = str(tmp_path / "store")

    def planted(cube):
        cube = cube.copy()
        cube[3:8, 2:8] = 1.5 * cube[3:8, 2:8, ::-1]
        return cube

    spoil(trainrun, "recording_03_*", planted)
    assert main(["audit", str(trainrun), "--store", store]) == 2
    assert main(["init", str(trainrun), "--store", store, "--robust-pixels", "0.99"]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "results" / "run.json").read_text())
    inside, nodes = record["passes"][0]["inside"], record["passes"][0]["nodes"]
    out = inside["of"] - nodes["rx_detector"]["pixels"]
    assert inside["of"] == 32 * 24 * 24
    assert 100 < out < 0.03 * inside["of"]
    assert next(iter(inside["outside"])) == "recording_03.cu3s"
    assert f"left out {out:,} of 18,432 pixels at data.cube, outside of the bulk of " in said
    assert "; most in recording_03.cu3s (" in said
    # Every pass, and every node of it, is fitted on the same pixels; nothing came from the store.
    counts = {fit["pixels"] for done in record["passes"] for fit in done["nodes"].values()}
    assert counts == {inside["of"] - out}
    assert [done["from_store"] for done in record["passes"]] == [None] * len(record["passes"])
    trained = tmp_path / "results" / "trained_models"
    card = json.loads((trained / "Channel_Selector_initialized.json").read_text())
    assert card["inside"] == inside
    assert card["settings"]["robust_pixels"] == 0.99
    # And the audit names the recording, without --robust-pixels.
    assert main(["audit", str(trainrun), "--store", store, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["outside_of_bulk"]
    assert next(iter(found["shares"])) == "recording_03.cu3s"
    assert found["shares"]["recording_03.cu3s"] > 1.5 * found["outside"]
    assert found["affine_invariant"] > 0.5
    assert found["above"] < found["above_by_bulk"]
