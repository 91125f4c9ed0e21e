"""A FIFO in place of a frame: reading it hangs, as storage does, and no longer than is allowed."""

from __future__ import annotations

import json
import os
import threading

import pytest

from cuvis_dist.cli import main

#: In this process: what a worker warns of takes a moment to come, and the run is over by then.
SOON = [
    *("--workers", "0"),
    *("--set", "resources.stall_seconds=0.5", "--set", "resources.read_seconds=1.5"),
]
#: Frames of recording_00, of train and of val: not the first, which data modules open at once.
TRAIN, VAL = 2, 5


def hang(demo, number):
    """Let reading a frame hang; return its file."""
    path = demo.parent / "archive" / f"recording_00_{number:03d}.npz"
    path.unlink()
    os.mkfifo(path)
    return path


def result(demo):
    return json.loads((demo.parent / "results" / "result.json").read_text())


@pytest.fixture(autouse=True)
def no_longer(demo):
    """Let threads that still read go on after the test."""
    yield
    for path in (demo.parent / "archive").iterdir():
        if path.is_fifo():
            for thread in threading.enumerate():
                if thread.name == "cuvis-dist-reader":
                    try:
                        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
                    except OSError:
                        break


def assert_warned(said, path):
    assert f"({path}) has been read for 0.5 s and is not there yet" in said
    assert "(on " in said


def test_phase_1_names_it_and_ends(demo, capsys):
    path = hang(demo, TRAIN)
    assert main(["init", str(demo), *SOON]) == 3
    said = capsys.readouterr().err
    assert_warned(said, path)
    assert f"({path}): TimeoutError: it was not there after 1.5 s" in said
    assert result(demo)["status"] == "failed"


def test_phase_1_leaves_it_out(demo, capsys):
    path = hang(demo, TRAIN)
    assert main(["init", str(demo), *SOON, "--set", "measuring.on_error=skip"]) == 0
    run = json.loads((demo.parent / "results" / "run.json").read_text())
    assert list(run["skipped_frames"]) == [f"recording_00.cu3s#{TRAIN}"]
    assert [done["frames"] for done in run["passes"]] == [9, 9]
    assert_warned(capsys.readouterr().err, path)


def test_evaluation_and_scoring_name_it(demo, capsys):
    assert main(["init", str(demo)]) == 0
    saved = str(demo.parent / "results/trained_models/Channel_Selector_initialized.yaml")
    path = hang(demo, VAL)
    for command in (["evaluate", saved, "--split", "val"], ["score", saved, "--split", "val"]):
        assert main([*command, "--data", str(demo), *SOON]) == 3
        said = capsys.readouterr().err
        assert_warned(said, path)
        assert f"({path}): TimeoutError" in result(demo)["error"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_a_worker_warns_on_the_drivers_terminal(demo, capsys):
    path = hang(demo, TRAIN)
    late = ["--set", "resources.read_seconds=6", "--workers", "2"]
    assert main(["init", str(demo), *SOON, *late]) == 3
    said = capsys.readouterr().err
    assert_warned(said, path)
    assert "on node " in said
    assert f"({path}): TimeoutError: it was not there after 6 s" in said
