"""Is a disk that is too small told before any data is read?"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from archives import edit
from small_disks import on_small_disk

from cuvis_dist import Scaling
from cuvis_dist.archive.contents import Contents, Stamp
from cuvis_dist.cli import main
from cuvis_dist.demo import DemoSettings, write_demo
from cuvis_dist.errors import ClusterError
from cuvis_dist.runs.room import (
    bytes_of_run,
    bytes_of_scores,
    bytes_replaced,
    require_room_for_copies,
)
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.storage import OutputFolder


def keeping(save_top_k, **training):
    """Return overrides by which so many checkpoints are kept."""
    key = "training.callbacks.checkpoint"
    return [f"{key}.save_top_k={save_top_k}", *(f"training.{k}={v}" for k, v in training.items())]


def ended_on(small, *command):
    """Run the command with a disk of 200 kB on a folder; return its message, and its result."""
    small.mkdir()
    program = [sys.executable, "-m", "cuvis_dist.cli", *command]
    keeping_it = on_small_disk(small, "200k", program, f"cat {small}/result.json")
    done = subprocess.run(keeping_it, capture_output=True, text=True, timeout=200)
    return done.stderr.splitlines()[-1], json.loads(done.stdout)


def test_more_checkpoints_than_the_disk_has_room_for(demo, tmp_path):
    options = [part for o in keeping(-1, max_epochs=10**4) for part in ("--override", o)]
    small = tmp_path / "small"
    said, result = ended_on(small, "run", demo, *options, "--workers", "0", "--output-dir", small)
    assert f"too little space is left in {small} on " in said
    assert "checkpoints and the saved pipeline need about " in said
    assert " are free. Make room there" in said
    assert (result["status"], result["exit_code"]) == ("failed", 4)


def test_what_a_run_is_sure_to_write_counts(demo):
    def size(*overrides):
        return bytes_of_run(load_trainrun(demo, overrides))

    alone, one, three = size("training=null"), size(*keeping(1)), size(*keeping(3))
    assert 0 < alone < one < three
    assert size(*keeping(-1, max_epochs=3)) == three == size(*keeping(9, max_epochs=3))
    assert size(*keeping(3), "training.optimizer.name=sgd") < three
    stops = "training.callbacks.early_stopping=[{monitor: val_loss}]"
    assert size(*keeping(-1, max_epochs=10**4), stops) == one


def test_what_an_earlier_try_left_is_replaced(tmp_path):
    for name, size in {"resume/last.ckpt": 10, "checkpoints/a.ckpt": 5, "scores/a.npz": 3}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert bytes_replaced(OutputFolder(tmp_path)) == 15


def test_copies_of_recordings(tmp_path):
    scaling = Scaling(reading={"stage_dir": tmp_path / "cache", "stage_bytes": 10**20})
    contents = Contents({"s3://b/small": Stamp(1, 0), "s3://b/huge.cu3s": Stamp(10**19, 0)})
    with pytest.raises(ClusterError, match=f"{tmp_path}/cache on .* a copy of s3://b/huge.cu3s"):
        require_room_for_copies(contents, scaling)
    require_room_for_copies(contents, scaling.replace(resources={"address": "auto"}))
    require_room_for_copies(Contents({"/a": Stamp(10**19, 0)}), scaling)


def test_scores(tmp_path):
    settings = DemoSettings(frames=100, height=16, width=20, bands=4, recordings=1)
    demo = write_demo(tmp_path / "demo", settings)
    edit(demo, lambda run: run.update(training=None))
    results = demo.parent / "results"
    assert main(["run", str(demo), "--workers", "0"]) == 0
    saved = results / "trained_models" / "Channel_Selector_restored.yaml"
    command = ["score", str(saved), "--data", str(demo), "--workers", "0", "--output-dir"]
    assert main([*command, str(results)]) == 0
    written = [path.stat().st_size for path in (results / "scores").rglob("*.npz")]
    outputs = [("rx_detector", "scores"), ("decider", "decisions")]
    each = bytes_of_scores(load_trainrun(demo, saved=saved), outputs, 16 * 20)
    assert len(written) == 100
    assert 0.7 * min(written) < each <= max(written)

    small = tmp_path / "small"
    said, result = ended_on(small, *command, small)
    assert f"too little space is left in {small / 'scores'} on " in said
    assert "the scores of 100 frames need about " in said
    assert result["exit_code"] == 4
