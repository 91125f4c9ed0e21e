"""Phase 2 alone, on the fitted state of a saved pipeline."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from archives import buffers_sha256
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.cli import main


def load(path: Path) -> CuvisPipeline:
    return CuvisPipeline.load_pipeline(path, path.with_suffix(".pt"))


@pytest.fixture
def own(demo_trainrun, tmp_path):
    """The demo's trainrun, with another output folder, to change."""

    def write(name="trainrun.yaml", output="out", **changes):
        run = yaml.safe_load(demo_trainrun.read_text()) | changes
        run["pipeline"] = str(demo_trainrun.parent / "pipeline.yaml")
        run["output_dir"] = str(tmp_path / output)
        path = tmp_path / name
        path.write_text(yaml.safe_dump({k: v for k, v in run.items() if v is not None}))
        return path

    return write


@pytest.fixture
def unfitted(own, tmp_path):
    """Stands where ``init`` saves, with the state of a pipeline that was just built."""
    from cuvis_dist.runs.trainrun import load_trainrun

    trainrun = load_trainrun(own())
    path = trainrun.initialization_only().saved_pipeline
    trainrun.pipeline.save_to_file(str(path))
    return path


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_init_and_then_train_end_in_the_bits_of_run(own, tmp_path, capsys):
    """Though ``init`` calibrated the decider whose decisions training monitors."""
    one, two = str(own("one.yaml", "one")), str(own("two.yaml", "two"))
    options = ["--workers", "2", "--train-workers", "2"]
    assert main(["run", one, *options]) == 0
    assert main(["init", two, *options]) == 0
    models = tmp_path / "two" / "trained_models"
    initialized = models / "Channel_Selector_initialized.yaml"
    before = buffers_sha256(load(initialized))
    capsys.readouterr()
    assert main(["train", two, *options]) == 0
    printed = capsys.readouterr()
    assert "fitted" not in printed.err
    assert "epoch 3/3" in printed.err
    assert "starting anew" not in printed.err

    saved = "trained_models/Channel_Selector_restored.yaml"
    ours, theirs = load(tmp_path / "two" / saved), load(tmp_path / "one" / saved)
    assert buffers_sha256(ours) == buffers_sha256(theirs) != before
    nodes = [yaml.safe_load((tmp_path / n / saved).read_text())["nodes"] for n in ("one", "two")]
    assert nodes[1] == nodes[0], "calibrated thresholds are settings of nodes"
    assert buffers_sha256(load(initialized)) == before
    records = [json.loads((tmp_path / name / "run.json").read_text()) for name in ("one", "two")]
    assert records[1]["metrics"] == records[0]["metrics"]
    assert records[1]["job"] == "train"
    card = json.loads(initialized.with_suffix(".json").read_text())
    assert records[1]["initialization"] == {
        "file": str(initialized.with_suffix(".pt")),
        "sha256": records[0]["initialized"],
        "name": card["name"],
        "made": card["made"],
    }
    assert records[1]["passes"] == []

    # It is done, unless it would begin with another state.
    assert main(["train", two, *options]) == 0
    assert "this run is done since" in capsys.readouterr().err
    state = torch.load(initialized.with_suffix(".pt"), weights_only=False)
    state["state_dict"]["logit_head"]["bias"] += 1
    torch.save(state, tmp_path / "other.pt")
    other = ["--initialization", str(tmp_path / "other.pt")]
    assert main(["train", two, *options, *other]) == 0
    assert "another initialization" in capsys.readouterr().err
    assert buffers_sha256(load(tmp_path / "two" / saved)) != buffers_sha256(theirs)


def test_what_cannot_be_trained_is_said_before_anything_runs(own, unfitted, tmp_path, capsys):
    def said(*arguments):
        assert main(["train", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "no training block" in said(own("plain.yaml", training=None))
    error = said(own("elsewhere.yaml", "nowhere"))
    assert str(tmp_path / "nowhere/trained_models/Channel_Selector_initialized.pt") in error
    assert "cuvis-dist init makes it; --initialization names another" in error
    error = said(own(), "--initialization", tmp_path / "mine.pt")
    assert f"initialization not found: {tmp_path / 'mine.pt'}" in error
    assert "init makes" not in error

    state = torch.load(unfitted.with_suffix(".pt"), weights_only=False)
    del state["state_dict"]["rx_detector"]
    torch.save(state, tmp_path / "mine.pt")
    error = said(own(), "--initialization", tmp_path / "mine.pt")
    assert "mine.pt does not fit the pipeline Channel_Selector: it has no state of node rx" in error


@pytest.mark.parametrize(
    ("job", "arguments", "words"),
    [
        ("initialize", "{trainrun}", ["pass 1: reads", "phase 2  none", "_initialized.yaml"]),
        ("train", "{trainrun}", ["phase 1  none", "at most 3 epochs", "_restored.yaml"]),
        ("evaluate", "{saved} --data {trainrun} --split val", ["frames   6 of val"]),
        ("score", "{saved} --data {trainrun} --split test", ["frames   6 of test", "decisions"]),
    ],
)
def test_an_entry_point_runs_its_verb(job, arguments, words, own, unfitted, capsys, monkeypatch):
    arguments = arguments.format(trainrun=own(), saved=unfitted).split()
    monkeypatch.setattr(sys, "argv", [job, *arguments, "--dry-run", "--workers", "2"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"jobs.{job}", run_name="__main__")
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for word in words:
        assert word in printed
