"""What does a cache save where frames are slow to decode? Passes and epochs, with and without.

    python tests/benchmarks/decoding.py [--frames N] [--seconds S] [--nodes 1|2]

A data module that takes S seconds (0.5) to decode a frame of 128 x 128 x 61 serves N train frames
(24) and 4 val frames; two workers measure the guide's pipeline in two passes, then two ranks
train 3 epochs. Prints the seconds of each pass and epoch for ``reading.cache``: none, memory, disk,
device, memory+device. With two nodes, which are raylets of this machine with one worker and one
rank each, for device, and for disk with a folder of each node's own, without and with device.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from initialization import fill
from loguru import logger
from torch.utils.data import DataLoader, Dataset, Subset
from training import Clock

from cuvis_dist import GradientTrainer, Scaling, StatisticalTrainer
from cuvis_dist.execution.session import connect
from cuvis_dist.runs.trainrun import load_trainrun

EPOCHS = 3
CACHES = {
    1: ("none", "memory", "disk", "device", "memory+device"),
    2: ("disk", "device", "disk+device"),
}


class SlowFrames(Dataset):
    """Another data set, of which each frame takes a while to decode."""

    def __init__(self, dataset: Dataset, seconds: float) -> None:
        self.dataset, self.seconds = dataset, seconds

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        """Return a frame, after the time that it takes."""
        time.sleep(self.seconds)
        return self.dataset[index]


def slowly(served, seconds: float, frames: int | None) -> DataLoader:
    """Return a loader of slow frames: of the first so many if that is said, else shuffled."""
    loader = served()
    data = Subset(loader.dataset, range(frames)) if frames else loader.dataset
    slow = SlowFrames(data, seconds)
    return DataLoader(slow, 4, shuffle=frames is None, collate_fn=loader.collate_fn)


def measured(path: Path, cache: str, seconds: float) -> dict[str, list[float]]:
    """Return the seconds of each pass and epoch of one run."""
    every = "[{kind: all}]"
    run = load_trainrun(path, [f"data.splits.{s}={every}" for s in ("train", "val", "test")])
    module = run.datamodule()
    for split, frames in (("train", None), ("val", 4), ("test", 4)):
        name = f"{split}_dataloader"
        setattr(module, name, partial(slowly, getattr(module, name), seconds, frames))
    scaling = Scaling(resources={"workers": 2, "train_workers": 2}, reading={"cache": cache})
    trainer = StatisticalTrainer(run.pipeline, module, scaling=scaling)
    trainer.fit()
    run.pipeline.unfreeze_nodes_by_name(run.config.unfreeze_nodes)
    clock = Clock()
    config = run.config.training.model_copy(deep=True)
    config.max_epochs, config.callbacks = EPOCHS, None
    GradientTrainer(
        run.pipeline, module, run.loss_nodes, run.metric_nodes, config,
        callbacks=[clock], scaling=scaling, output_dir=path.parent / f"out_{cache}",
    ).fit()  # fmt: skip
    return {
        "passes": [record.seconds for record in trainer.records],
        "epochs": [took for _, took, _ in clock.epochs],
    }


@contextmanager
def two_nodes(folder: Path) -> Iterator[str]:
    """Start two nodes of one CPU each; yields their address, which this process may join."""
    sys.path.append(str(Path(__file__).parents[1]))
    from heads import cluster

    with cluster(folder, 9850) as started:
        for node in ("one", "two"):
            disk = folder / node
            disk.mkdir()
            started.join(TMPDIR=str(disk))
        started.wait()
        os.environ.update(started.environment)
        yield f"127.0.0.1:{started.port + 1}"


@contextmanager
def cluster_of(nodes: int, folder: Path) -> Iterator[None]:
    """Join one node, or two."""
    if nodes == 1:
        yield connect(Scaling(resources={"workers": 2}))
        return
    with two_nodes(folder) as address:
        yield connect(Scaling(resources={"workers": 2, "address": address}))
        ray.shutdown()


def main() -> None:
    """Run the benchmark, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/decoding.json"))
    options = parser.parse_args()
    logger.remove()
    found = {}
    with (
        tempfile.TemporaryDirectory(prefix="cuvis-dist-bench-") as folder,
        cluster_of(options.nodes, Path(folder)),
    ):
        path = fill(Path(folder) / "archive", options.frames, (128, 128, 61))
        for cache in CACHES[options.nodes]:
            found[cache] = measured(path, cache, options.seconds)
            lines = (
                f"{what} {', '.join(f'{s:.2f}' for s in times)} s"
                for what, times in found[cache].items()
            )
            print(f"cache: {cache:13} {'; '.join(lines)}", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
