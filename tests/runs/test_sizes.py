"""Many frames in many recordings, one large frame, a thousand bands: small versions of each.

What the large ones take is in ``docs/benchmarks.md``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from archives import assert_same_state, edit, statistical_trainrun
from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.demo import DemoSettings, write_demo
from cuvis_dist.runs.trainrun import load_trainrun

pytestmark = [pytest.mark.slow, pytest.mark.long]

#: Runs commands in one process; prints its largest memory before them, and after each.
COMMANDS = """
import json, resource, sys
import cuvis_dist.cli, cuvis_dist.runs.score, cuvis_dist.runs.two_phase
peak = lambda: 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
peaks = [peak()]
for arguments in json.loads(sys.argv[1]):
    assert cuvis_dist.cli.main(arguments) == 0
    peaks.append(peak())
print(json.dumps(peaks))
"""


def peaks(*commands: list[str]) -> list[int]:
    """Run commands without Ray; return the largest memory before and after each, in bytes."""
    here = ["--workers", "0"]
    given = json.dumps([[*map(str, command), *here] for command in commands])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, given], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_many_frames_in_many_recordings(tmp_path):
    settings = DemoSettings(2000, 4, 5, 6, recordings=100, max_epochs=1)
    demo = write_demo(tmp_path, settings)
    edit(demo, lambda run: run["data"].update(batch_size=8))
    results = tmp_path / "results"
    saved = results / "trained_models" / "Channel_Selector_restored.yaml"
    imports, both, scored = peaks(
        ["run", demo], ["score", saved, "--data", demo, "--output-dir", results]
    )
    record = json.loads((results / "run.json").read_text())
    assert [done["frames"] for done in record["passes"]] == [1000, 1000]
    assert record["calibration"]["frames"] == 500
    assert len(list((results / "scores").rglob("*.npz"))) == 2000
    assert max(both, scored) - imports < 400e6


def test_a_large_frame(tmp_path):
    demo = write_demo(tmp_path, DemoSettings(1, 8, 8, 64, recordings=1))
    path = tmp_path / "archive" / "recording_00_000.npz"
    content = dict(np.load(path))
    wide = {n: np.tile(content[n], (100, 100) + (1,) * (content[n].ndim - 2)) for n in
            ("cube", "mask", "class_mask")}  # fmt: skip
    np.savez(path, **content | wide)
    every = {split: [{"kind": "all"}] for split in ("train", "val", "test")}
    edit(demo, lambda run: run.update(training=None) or run["data"].update(splits=every))
    imports, _ = peaks(["init", demo])
    passes = json.loads((tmp_path / "results" / "run.json").read_text())["passes"]
    frame = wide["cube"].nbytes
    assert frame > 160e6
    assert passes[-1]["peak_worker_bytes"] - imports < 2.5 * frame


def archive(folder: Path, frames: int, bands: int) -> Path:
    """Write frames of few pixels, and return their universe."""
    write_demo(folder, DemoSettings(frames, 20, 25, bands, recordings=2))
    return folder / "archive" / "universe.csv"


def test_a_thousand_bands(tmp_path):
    universe = archive(tmp_path, frames=6, bands=1000)
    nodes = [
        ("data", "data.CU3SDataNode", {}),
        ("pca", "dimensionality_reduction.TrainablePCA", {"num_channels": 1000, "n_components": 5}),
        ("rx", "anomaly.rx_detector.RXGlobal", {"num_channels": 1000, "eps": 1e-4}),
    ]
    edges = [("data.outputs.cube", f"{name}.inputs.data") for name in ("pca", "rx")]
    ours, theirs = (statistical_trainrun(tmp_path, universe, nodes, edges) for _ in range(2))
    StatisticalTrainer(
        ours.pipeline, ours.datamodule(), scaling=Scaling(resources={"workers": 0})
    ).fit()
    UpstreamStatisticalTrainer(theirs.pipeline, theirs.datamodule()).fit()
    assert_same_state(ours.pipeline, theirs.pipeline, 1e-3)


def test_both_phases_of_a_thousand_bands(tmp_path):
    demo = write_demo(tmp_path, DemoSettings(8, 20, 25, 1000, recordings=1, max_epochs=1))
    peaks(["run", demo])
    record = json.loads((tmp_path / "results" / "run.json").read_text())
    assert (record["status"], record["epochs"]) == ("done", 1)
    saved = load_trainrun(demo, saved=record["pipeline"]).pipeline
    assert all(
        value.isfinite().all() for node in saved.nodes() for value in node.state_dict().values()
    )
