"""What does a cache save where frames are slow to decode? Passes and epochs, with and without.

    python tests/benchmarks/decoding.py [--frames N] [--seconds S]

A data module that takes S seconds (0.5) to decode a frame of 128 x 128 x 61 serves N train frames
(24) and 4 val frames; two workers measure the guide's pipeline in two passes, then two ranks
train 3 epochs. Prints the seconds of each pass and epoch for ``reading.cache``: none, memory, disk,
device.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from initialization import fill
from loguru import logger
from torch.utils.data import DataLoader, Dataset, Subset
from training import Clock

from cuvis_dist import GradientTrainer, Scaling, StatisticalTrainer
from cuvis_dist.execution.session import connect
from cuvis_dist.runs.trainrun import load_trainrun

EPOCHS = 3


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
    """Return a loader of slow frames, of the first so many if that is said."""
    loader = served()
    data = Subset(loader.dataset, range(frames)) if frames else loader.dataset
    return DataLoader(SlowFrames(data, seconds), 4, collate_fn=loader.collate_fn)


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


def main() -> None:
    """Run the benchmark, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/decoding.json"))
    options = parser.parse_args()
    logger.remove()
    connect(Scaling(resources={"workers": 2}))
    found = {}
    with tempfile.TemporaryDirectory(prefix="cuvis-dist-bench-") as folder:
        path = fill(Path(folder), options.frames, (128, 128, 61))
        for cache in ("none", "memory", "disk", "device"):
            found[cache] = measured(path, cache, options.seconds)
            lines = (
                f"{what} {', '.join(f'{s:.2f}' for s in times)} s"
                for what, times in found[cache].items()
            )
            print(f"cache: {cache:7} {'; '.join(lines)}", flush=True)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
