"""What do two phases of the demo come to, and how often is each frame decoded? Here, or on nodes.

    python tests/lent.py TRAINRUN FOLDER ADDRESS

prints the same as JSON, of a run with a cache on the nodes' disks, and of one whose nodes stop
lending each other frames when training begins.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray
from gradients import train
from readings import CountedCubes, count_readings, counted
from settings import scaling_of
from torch.utils.data import DataLoader

from cuvis_dist import StatisticalTrainer
from cuvis_dist.nodes.state import hash_state
from cuvis_dist.runs.trainrun import load_trainrun

#: Frames of a batch.
BATCH = 4


class NobodyLends(pl.Callback):
    """Kills what lends frames, on every node, when training begins."""

    def on_train_start(self, trainer, pl_module):
        if trainer.global_rank:
            return
        for name in ray.util.list_named_actors():
            if name.startswith("cuvis-dist-lender"):
                pid = ray.get_actor(name).__ray_call__.remote(lambda self: os.getpid())
                os.kill(ray.get(pid), signal.SIGKILL)


def shuffled(served, log: Path) -> DataLoader:
    """Return a loader of frames in a random order, whose readings are counted."""
    loader = served()
    counted_cubes = CountedCubes(loader.dataset, log)
    return DataLoader(counted_cubes, BATCH, shuffle=True, collate_fn=loader.collate_fn)


def results(trainrun: Path, folder: Path, more: list[pl.Callback], **settings: Any) -> dict:
    """Fit, train 3 epochs and evaluate; return the state after each phase, and the readings."""
    folder.mkdir()
    run = load_trainrun(trainrun, [f"output_dir={folder}", "training.seed=3"])
    run.config.training.callbacks.checkpoint.dirpath = str(folder / "checkpoints")
    module, train_workers = run.datamodule(), settings.pop("train_workers")
    module.train_dataloader = partial(shuffled, module.train_dataloader, folder / "train.log")
    count_readings(module, "val", folder / "val.log")
    StatisticalTrainer(run.pipeline, module, scaling=scaling_of(**settings)).fit()
    got: dict[str, Any] = {"fitted": hash_state(run.pipeline.nodes())}
    run.pipeline.unfreeze_nodes_by_name(run.config.unfreeze_nodes)
    trainer = train(run, train_workers, module, settings, more=more)
    got["trained"] = {
        f"{node.name}.{name}": value.tolist()
        for node in run.pipeline.nodes()
        for name, value in node.state_dict().items()
    }
    got["epochs"] = trainer.epochs
    got |= {split: counted(folder / f"{split}.log") for split in ("train", "val")}
    return got


def main(trainrun: str, folder: str, address: str) -> None:
    """Print the results."""
    settings = {
        "workers": 2, "train_workers": 2, "address": address, "shard_frames": 1, "cache": "disk",
    }  # fmt: skip
    lent = results(Path(trainrun), Path(folder) / "lent", [], **settings)
    alone = results(Path(trainrun), Path(folder) / "alone", [NobodyLends()], **settings)
    print(json.dumps({"lent": lent, "alone": alone}))


if __name__ == "__main__":
    main(*sys.argv[1:])
