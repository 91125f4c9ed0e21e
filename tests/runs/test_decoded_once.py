"""With a cache, a node decodes each frame once for both phases, calibration and evaluation."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
from archives import buffers_sha256
from gradients import train
from readings import CountedCubes, counted
from settings import scaling_of
from torch.utils.data import DataLoader

from cuvis_dist import StatisticalTrainer
from cuvis_dist.archive import caches_in_use
from cuvis_dist.runs.trainrun import load_trainrun

SPLITS = ("train", "val", "test")


def count_readings(module, folder):
    """Let a data module note which frames of each split are read."""
    for split in SPLITS:
        served = getattr(module, f"{split}_dataloader")
        setattr(module, f"{split}_dataloader", partial(_noted, served, folder / f"{split}.log"))


def _noted(served, log) -> DataLoader:
    loader = served()
    return DataLoader(
        CountedCubes(loader.dataset, log), loader.batch_size, collate_fn=loader.collate_fn
    )


def two_phases(path, folder, cache, **resources):
    """Run both phases on one data module; return the run, and the readings of each split."""
    run = load_trainrun(path, [f"output_dir={folder}", "training.seed=3"])
    run.config.training.callbacks.checkpoint.dirpath = str(folder / "checkpoints")
    module = run.datamodule()
    count_readings(module, folder)
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
        pytest.param("disk", 2, 2, marks=pytest.mark.slow),
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
