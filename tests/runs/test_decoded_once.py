"""With a cache, a node decodes each frame once for both phases, calibration and evaluation."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from archives import buffers_sha256
from commands import train_files
from gradients import train
from heads import cluster
from lent import results
from readings import count_readings, counted, counting
from settings import scaling_of

from cuvis_dist import StatisticalTrainer
from cuvis_dist.archive import caches_in_use
from cuvis_dist.runs.trainrun import load_trainrun

SPLITS = ("train", "val", "test")


def two_phases(path, folder, cache, **resources):
    """Run both phases on one data module; return the run, and the readings of each split."""
    run = load_trainrun(path, [f"output_dir={folder}", "training.seed=3"])
    run.config.training.callbacks.checkpoint.dirpath = str(folder / "checkpoints")
    module = run.datamodule()
    for split in SPLITS:
        count_readings(module, split, folder / f"{split}.log")
    reading = {"cache": cache, **resources}
    train_workers = reading.pop("train_workers")
    StatisticalTrainer(run.pipeline, module, scaling=scaling_of(**reading)).fit()
    run.pipeline.unfreeze_nodes_by_name(run.config.unfreeze_nodes)
    trainer = train(run, train_workers, module, scaling=reading)
    held = [c for c in caches_in_use() if c.folder.exists()]
    assert (cache != "none") == bool(held)
    del module, trainer.datamodule
    return run, {split: counted(folder / f"{split}.log") for split in SPLITS}


@pytest.mark.parametrize(
    ("cache", "workers", "train_workers"),
    [
        ("memory", 0, 0),
        pytest.param("disk", 2, 2, marks=pytest.mark.long),
    ],
)
def test_every_frame_is_decoded_once(
    demo_trainrun, tmp_path, request, cache, workers, train_workers
):
    if workers:
        request.getfixturevalue("ray_session")
    resources = {"workers": workers, "train_workers": train_workers}
    (tmp_path / "plain").mkdir()
    (tmp_path / "kept").mkdir()
    plain, often = two_phases(demo_trainrun, tmp_path / "plain", "none", **resources)
    kept, once = two_phases(demo_trainrun, tmp_path / "kept", cache, **resources)
    assert buffers_sha256(kept.pipeline) == buffers_sha256(plain.pipeline)
    first = 2  # frames that are looked at to find out how large one is, or what nodes do
    for split in SPLITS:
        frames = len(often[split])
        more = once[split] - Counter(range(frames))
        assert set(once[split]) == set(range(frames))
        assert set(more) <= set(range(first)), split
    assert min(often["train"].values()) >= 2 + 3
    assert min(often["val"].values()) >= 3 + 2


@pytest.mark.cluster
@pytest.mark.long
def test_each_node_decodes_what_it_computes_once(demo_trainrun, tmp_path):
    """On two raylets, whose nodes keep nothing when the run has ended."""
    files = set(train_files(demo_trainrun))
    logs = [tmp_path / "node_1.log", tmp_path / "node_2.log"]
    with cluster(tmp_path, 9600) as started:
        for log in logs:
            log.touch()
            disk = tmp_path / log.stem
            disk.mkdir()
            started.join(TMPDIR=str(disk), **counting(log, seconds=0.05))
        started.wait()
        done = subprocess.run(
            [
                Path(sys.executable).parent / "cuvis-dist", "run", demo_trainrun,
                "--address", f"127.0.0.1:{started.port + 1}", "--output-dir", tmp_path / "out",
                "--workers", "2", "--train-workers", "2", "--set", "reading.cache=disk",
                "--set", "measuring.shard_frames=1",
            ],
            env=started.environment, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    each = [Counter({f: n for f, n in counted(log).items() if f in files}) for log in logs]
    often = sum(each, Counter())
    setups = 8  # what a data module opens when it is set up, in every process
    # Without a cache there are five of each file. Which node a shard, or a frame, goes to is tested
    # with the engine and with the places.
    assert len(files) <= sum(often.values()) <= 1.5 * len(files) + setups
    for log in logs:
        assert not [*(tmp_path / log.stem).glob("cuvis-dist-*-frames/*")], "it is left"


@pytest.mark.cluster
@pytest.mark.long
def test_nodes_lend_each_other_what_they_have_decoded(demo_trainrun, tmp_path):
    """With shuffled batches each frame is decoded once on two raylets; a lender may be killed."""
    with cluster(tmp_path, 9650) as started:
        for name in ("one", "two"):
            (tmp_path / name).mkdir()
            started.join(TMPDIR=str(tmp_path / name))
        started.wait()
        done = subprocess.run(
            [
                sys.executable, Path(__file__).parents[1] / "lent.py", demo_trainrun, tmp_path,
                f"127.0.0.1:{started.port + 1}",
            ],
            env=started.environment, capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (said,) = (line for line in done.stdout.splitlines() if line.startswith("{"))  # Ray says more
    there = json.loads(said)
    here = results(demo_trainrun, tmp_path / "here", [], workers=0, train_workers=0)
    assert min(here["train"].values()) >= 2 + 3
    assert min(here["val"].values()) >= 3 + 2
    for split in ("train", "val"):
        frames = {str(index) for index in here[split]}
        assert there["lent"][split] == dict.fromkeys(frames, 1)
        assert there["alone"][split].keys() == frames
        assert max(there["alone"][split].values()) <= 2, "a node decodes a frame once"
    for got in there.values():
        assert (got["fitted"], got["epochs"]) == (here["fitted"], here["epochs"])
        for name, value in here["trained"].items():
            np.testing.assert_allclose(got["trained"][name], value, rtol=1e-4, atol=1e-6)
