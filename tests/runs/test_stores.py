"""The commands around a store, typed as a person types them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from archives import buffers_sha256, edit
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from settings import scaling_of

from cuvis_dist import StatisticalTrainer
from cuvis_dist.archive import open_archive
from cuvis_dist.cli import main
from cuvis_dist.runs.trainrun import load_trainrun


@pytest.fixture
def typed(demo, tmp_path, capsys):
    """Type a command on the demo with a store; returns its exit code and output."""

    def type_(*words, store="store"):
        words = [str(demo) if word == "TRAINRUN" else str(word) for word in words]
        options = ["--store", str(tmp_path / store)] if store and words[0] != "store" else []
        code = main([*words, *options])
        captured = capsys.readouterr()
        return code, captured.err + captured.out

    return type_


def initialized(demo):
    return json.loads((demo.parent / "results" / "run.json").read_text())["initialized"]


def test_measure_says_what_it_read(typed):
    assert typed("measure", "TRAINRUN")[1].splitlines()[-1] == (
        "0 of 10 frames from the store, 10 read"
    )
    code, said = typed("measure", "TRAINRUN", "--split", "predict")
    assert (code, said.splitlines()[-1]) == (0, "10 of 22 frames from the store, 12 read")
    assert typed("measure", "TRAINRUN")[1].splitlines()[-1] == (
        "10 of 10 frames from the store, 0 read"
    )


def test_init_from_a_store_has_the_state_of_one_that_reads(typed, demo):
    typed("init", "TRAINRUN", store=None)
    read = initialized(demo)
    typed("measure", "TRAINRUN")
    code, said = typed("init", "TRAINRUN", "--restart")
    assert (code, initialized(demo)) == (0, read)
    assert "store    10 of 10 frames, 0 read" in said


def test_plan_counts_what_is_left_to_read(typed):
    typed("measure", "TRAINRUN", "--set", "measuring.sample_frames=4")
    code, said = typed("plan", "TRAINRUN")
    assert code == 0
    assert "4 of 10 frames from the store, 6 to read" in said


def test_a_recording_is_left_out_of_both_phases(typed, demo):
    assert typed("run", "TRAINRUN", "--without", "recording_01", store=None)[0] == 0
    record = json.loads((demo.parent / "results" / "run.json").read_text())
    assert record["without"] == ["recording_01"]
    assert record["passes"][0]["frames"] < 10
    left = load_trainrun(demo, without=["recording_01"]).datamodule()
    train = {frame.recording for frame in open_archive(left, "train").frames}
    assert train == {"recording_00.cu3s", "recording_02.cu3s"}
    assert len(left.val_ds) == len(load_trainrun(demo).datamodule().val_ds)
    trained = CuvisPipeline.load_pipeline(record["pipeline"])
    before = buffers_sha256(trained)
    typed("init", "TRAINRUN", "--without", "*_01*", "--restart")
    typed("run", "TRAINRUN", "--without", "*_01*", "--restart")
    assert buffers_sha256(CuvisPipeline.load_pipeline(record["pipeline"])) == before


@pytest.mark.parametrize("splits", ["here", "in a file"])
def test_a_recording_is_left_out_wherever_the_splits_are(typed, demo, splits):
    if splits == "in a file":

        def move(run):
            (demo.parent / "splits.json").write_text(json.dumps(run["data"]["splits"]))
            run["data"]["splits"] = {"splits_path": "splits.json"}

        edit(demo, move)
    code, said = typed("plan", "TRAINRUN", "--without", "recording_01.cu3s", store=None)
    assert code == 0
    assert "7 frames in" in said


@pytest.mark.parametrize(
    ("without", "message"),
    [
        ("recording_09", "no recording of the train split is called recording_09"),
        ("*", "no frame of the train split is left"),
    ],
)
def test_a_recording_that_cannot_be_left_out_is_an_error(typed, without, message):
    code, said = typed("init", "TRAINRUN", "--without", without, store=None)
    assert code == 2
    assert message in said
    assert "Traceback" not in said


def test_measure_wants_a_store(typed):
    code, said = typed("measure", "TRAINRUN", store=None)
    assert code == 2
    assert "--store" in said


def test_measure_ends_where_nothing_can_be_kept(typed, tmp_path):
    (tmp_path / "file").write_text("x")
    code, said = typed("measure", "TRAINRUN", store="file/store")
    assert code == 2
    assert str(tmp_path / "file") in said
    assert "Traceback" not in said


@pytest.mark.parametrize("what", ["list", "show", "verify", "prune"])
def test_there_has_to_be_a_store(typed, tmp_path, what):
    code, said = typed("store", what, tmp_path / "nowhere")
    assert code == 2
    assert "nowhere" in said


def test_a_store_is_listed_shown_verified_and_pruned(typed, demo, tmp_path):
    store = tmp_path / "store"
    typed("measure", "TRAINRUN")
    code, said = typed("store", "list", store)
    assert code == 0
    assert "Moments(data.cube): 10 frames" in said
    code, said = typed("store", "show", store)
    assert (
        "recording_01.cu3s: 3 frames (Extrema(data.cube) 3, Moments(data.cube) 3, pixels 3)" in said
    )
    assert "recording_02.cu3s#" in typed("store", "show", store, "*_02*")[1]
    assert "recording_02.cu3s#" in typed("store", "show", store, "recording_02")[1]
    assert typed("store", "show", store, "other")[0] == 2
    code, said = typed("store", "verify", store, "--data", "TRAINRUN")
    assert (code, said.count("3 of 3")) == (0, 2)
    code, said = typed("store", "prune", store)
    assert (code, "30 rows stay" in said) == (0, True)


def test_verify_names_damage_and_ends_with_three(typed, tmp_path):
    typed("measure", "TRAINRUN")
    damaged = sorted((tmp_path / "store").rglob("*.parquet"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    code, said = typed("store", "verify", tmp_path / "store")
    assert code == 3
    assert str(damaged) in said
    assert damaged.exists()


def test_verify_notices_frames_that_measure_otherwise(typed, demo, tmp_path):
    """A file with another content, the same size and time of change."""
    typed("measure", "TRAINRUN")
    path = sorted((demo.parent / "archive").rglob("*.npz"))[0]
    content, before = dict(np.load(path)), path.stat()
    np.savez(path, **content | {"cube": content["cube"][::-1] * np.float32(1.5)})
    if path.stat().st_size != before.st_size:
        pytest.skip("the frame has another size")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    code, said = typed("store", "verify", tmp_path / "store", "--data", "TRAINRUN", "--frames", "9")
    assert code == 3
    store = f"store verify {tmp_path / 'store'} --data {demo}"
    assert said.splitlines()[0].endswith(f": {store}"), "the first line says what is verified"
    assert "8 of 9 frames measure as they did" in said
    assert "differs  Moments(data.cube)" in said or "differs  Extrema(data.cube)" in said


def test_a_plan_shows_what_is_read_to_find_the_bulk(typed):
    """And so does the number of frames by which it is chosen where the work runs."""

    def planned(setting):
        said = typed("plan", "TRAINRUN", "--set", setting)[1].splitlines()
        begins = next(i for i, line in enumerate(said) if line.startswith("first: reads "))
        assert said[begins + 2].startswith("pass 1: reads ")
        return [said[begins + 1], *(line for line in said if " frames from the store" in line)]

    for_pass = "  10 of 10 frames from the store, 0 to read"
    fresh = "  0 of 10 frames from it, 10 to read"
    assert planned("measuring.robust=0.9") == [fresh, for_pass]
    assert planned("measuring.robust_pixels=0.9") == [fresh]
    typed("measure", "TRAINRUN")
    there = "  10 of 10 frames from it, 0 to read"
    assert planned("measuring.robust=0.9") == [there, for_pass]
    assert planned("measuring.robust_pixels=0.9") == [there]
    assert "first: reads" not in typed("plan", "TRAINRUN")[1]


def test_workers_fill_a_store(demo, tmp_path, ray_session):
    """Two workers on Ray; the bits are those of this process, and frames are read once."""
    hashes = []
    for settings in ({}, {"store": str(tmp_path / "store")}, {"store": str(tmp_path / "store")}):
        run = load_trainrun(demo)
        scaling = scaling_of(workers=2, shard_frames=2, **settings)
        trainer = StatisticalTrainer(run.pipeline, run.datamodule(), scaling=scaling)
        trainer.fit()
        hashes.append((buffers_sha256(run.pipeline), trainer.records[0].from_store))
    (read, none), (filled, before), (stored, after) = hashes
    assert read == filled == stored
    assert (none, before, after) == (None, 0, 10)


def test_a_store_in_a_bucket_serves_fits(demo, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    found = []
    for settings in ({}, {"store": "s3://bucket/fits"}, {"store": "s3://bucket/fits"}):
        run = load_trainrun(demo)
        trainer = StatisticalTrainer(
            run.pipeline, run.datamodule(), scaling=scaling_of(workers=0, **settings)
        )
        trainer.fit()
        found.append((buffers_sha256(run.pipeline), trainer.records[0].from_store))
    assert {state for state, _ in found} == {found[0][0]}
    assert [count for _, count in found] == [None, 0, 10]
