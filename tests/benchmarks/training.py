"""How fast is phase 2, against one process of upstream and against plain Lightning DDP?

    python tests/benchmarks/training.py [--frames N] [--size S] [--epochs E] [--json FILE]

Training steps per second on one generated archive (S x S x 61 float32 in uncompressed .npz, global
batches of 4 frames), start-up, validation and the first epoch left out, each run in a process of
its own: upstream's ``GradientTrainer``; the same module under Lightning's own ``ddp`` strategy with
a ``DistributedSampler`` and 2 processes; ours with 1 and 2 workers, frames read by the data
module's own loader, by Ray tasks that read ahead, or kept in memory after the first epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytorch_lightning as pl
from cuvis_ai_core.training import GradientTrainer as UpstreamGradientTrainer
from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer
from cuvis_ai_core.training.config import TrainingConfig
from initialization import fill
from loguru import logger
from torch.utils.data import DataLoader, Subset

from cuvis_dist import GradientTrainer, Scaling
from cuvis_dist.trainrun import TrainRun, load_trainrun

BATCH = 4
RUNS: dict[str, dict] = {
    "upstream, 1 process": {},
    "plain Lightning DDP, 2 processes": {},
    "1 worker": {"train_workers": 1},
    "2 workers": {"train_workers": 2},
    "2 workers, reading ahead": {"train_workers": 2, "read_ahead": 4},
    "2 workers, memory cache": {"train_workers": 2, "cache": "memory"},
    "2 workers, disk cache": {"train_workers": 2, "cache": "disk"},
}


class Clock(pl.Callback):
    """Seconds from the start of an epoch to its last step, on rank 0."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, float]] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._started, self._steps = time.perf_counter(), 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._steps += 1
        self._last = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.epochs.append((self._steps, self._last - self._started))

    def state_dict(self) -> dict:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict) -> None:
        self.epochs = state_dict["epochs"]

    @property
    def steps_per_second(self) -> float:
        """Median over the epochs but the first, which starts workers and warms caches."""
        return statistics.median(steps / seconds for steps, seconds in self.epochs[1:])


class PlainDDP(TrainingConfig):
    """Upstream's configuration with Lightning's own strategy added."""

    def to_lightning_kwargs(self) -> dict:
        return super().to_lightning_kwargs() | {
            "strategy": "ddp_find_unused_parameters_true",
            "devices": 2,
            "accelerator": "cpu",
        }


def trainrun_of(path: Path, epochs: int, batch_size: int) -> TrainRun:
    """Load and initialize on a few frames; all frames are trained on, one batch validated."""
    splits = [f"data.splits.{split}=[{{kind: all}}]" for split in ("train", "val", "test")]
    run = load_trainrun(
        path, [*splits, f"data.batch_size={batch_size}", f"training.max_epochs={epochs}"]
    )
    run.config.training.callbacks = None
    run.config.training.limit_val_batches = 1
    UpstreamStatisticalTrainer(run.pipeline, _First(run.datamodule(), 4)).fit()
    run.pipeline.unfreeze_nodes_by_name(run.config.unfreeze_nodes)
    return run


class _First(pl.LightningDataModule):
    """The first few frames of another module."""

    def __init__(self, module: pl.LightningDataModule, frames: int) -> None:
        super().__init__()
        self.module, self.frames = module, frames

    def train_dataloader(self) -> DataLoader:
        loader = self.module.val_dataloader()
        return DataLoader(Subset(loader.dataset, range(self.frames)), collate_fn=loader.collate_fn)


def one(name: str, path: Path, epochs: int) -> None:
    """Train once and print the steps per second."""
    logger.remove()
    # DistributedSampler leaves the data module's batch size to each process.
    run, clock = trainrun_of(path, epochs, BATCH // 2 if "DDP" in name else BATCH), Clock()
    config = run.config.training
    common = (run.pipeline, run.datamodule(), run.loss_nodes, run.metric_nodes)
    options = RUNS[name]
    if options:
        scaling = Scaling(output_dir=path.parent / "results", **options)
        trainer = GradientTrainer(*common, config, callbacks=[clock], scaling=scaling)
    else:
        config.enable_checkpointing = False
        if "DDP" in name:
            config = PlainDDP.model_validate(config.model_dump())
        trainer = UpstreamGradientTrainer(*common, config, callbacks=[clock])
    trainer.fit()
    print(f"steps_per_second {clock.steps_per_second}")


def main() -> None:
    """Run each in a process of its own, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/training.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--trainrun", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.trainrun, options.epochs)
        return
    shape = (options.size, options.size, 61)
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="cuvis-dist-bench-") as folder:
        path = fill(Path(folder), options.frames, shape)
        for name in RUNS:
            command = [sys.executable, __file__, "--one", name, "--trainrun", path]
            command += ["--epochs", options.epochs]
            done = subprocess.run(
                [str(part) for part in command], capture_output=True, text=True, cwd=folder
            )
            found = [x for x in done.stdout.splitlines() if x.startswith("steps_per_second")]
            if not found:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            rates[name] = float(found[0].split()[1])
            print(f"{name:34} {rates[name]:6.2f} steps/s", flush=True)
    plain = rates["plain Lightning DDP, 2 processes"]
    print(f"2 workers against plain Lightning DDP: {rates['2 workers'] / plain:.2f}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"frames": options.frames, "shape": shape, "steps_per_second": rates}
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
