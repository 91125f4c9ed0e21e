"""How fast is phase 2, against one process of upstream and against plain Lightning DDP?

    python tests/benchmarks/training.py [--frames N] [--size S] [--epochs E] [--gpu] [--json FILE]

Training steps per second on one generated archive (S x S x 61 float32 in uncompressed .npz, global
batches of 4 frames), start-up, validation and the first epoch left out, each run in a process of
its own: upstream's ``GradientTrainer``; the same module under Lightning's own ``ddp`` strategy with
a ``DistributedSampler`` and 2 processes; ours without Ray and with 1 and 2 workers, frames read by
the data module's own loader, by Ray tasks that read ahead, or kept after the first epoch: by the
node, or by each worker on its device.
``--gpu`` trains on one GPU instead, by upstream and by one worker of ours, and says how busy it is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytorch_lightning as pl
from cuvis_ai_core.training import GradientTrainer as UpstreamGradientTrainer
from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer
from cuvis_ai_core.training.config import TrainingConfig
from initialization import fill
from loguru import logger
from torch.utils.data import DataLoader, Subset

from cuvis_dist import GradientTrainer, Scaling
from cuvis_dist.runs.trainrun import TrainRun, load_trainrun

BATCH = 4
RUNS: dict[str, dict] = {
    "upstream, 1 process": {},
    "plain Lightning DDP, 2 processes": {},
    "own process": {"train_workers": 0},
    "1 worker": {"train_workers": 1},
    "2 workers": {"train_workers": 2},
    "2 workers, reading ahead": {"train_workers": 2, "read_ahead": 4},
    "2 workers, memory cache": {"train_workers": 2, "cache": "memory"},
    "2 workers, disk cache": {"train_workers": 2, "cache": "disk"},
    "2 workers, device cache": {"train_workers": 2, "cache": "device"},
}
ON_GPU: dict[str, dict] = {
    "upstream": {},
    "upstream, loader with 8 processes": {"num_workers": 8},
    "1 worker": {},
    "1 worker, loader with 8 processes": {"num_workers": 8},
    "1 worker, 8 frames read ahead": {"read_ahead": 8},
    "1 worker, 16 frames read ahead": {"read_ahead": 16},
    "1 worker, memory cache": {"cache": "memory", "cache_bytes": 10**11},
    "1 worker, disk cache": {"cache": "disk", "cache_bytes": 10**11},
    "1 worker, device cache": {"cache": "device", "cache_bytes": 2 * 10**10},
    "1 worker, device cache for a third": {"cache": "device", "cache_bytes": 1_400_000_000},
    "1 worker, read while steps compute": {"cache": "device", "cache_bytes": 0},
}


class Clock(pl.Callback):
    """Seconds from the start of an epoch to its last step, on rank 0."""

    def __init__(self) -> None:
        self.epochs: list[tuple[int, float, float]] = []

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._time = time.time()
        self._started, self._steps = time.perf_counter(), 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._steps += 1
        self._last = time.perf_counter()

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.epochs.append((self._steps, self._last - self._started, self._time))

    def state_dict(self) -> dict:
        return {"epochs": self.epochs}

    def load_state_dict(self, state_dict: dict) -> None:
        self.epochs = state_dict["epochs"]


def steps_per_second(epochs: list[tuple[int, float, float]]) -> float:
    """Return the median over the epochs but the first, which starts workers and warms caches."""
    return statistics.median(steps / seconds for steps, seconds, _ in epochs[1:])


class PlainDDP(TrainingConfig):
    """Upstream's configuration with Lightning's own strategy added."""

    def to_lightning_kwargs(self) -> dict:
        return super().to_lightning_kwargs() | {
            "strategy": "ddp_find_unused_parameters_true",
            "devices": 2,
            "accelerator": "cpu",
        }


def trainrun_of(path: Path, epochs: int, *overrides: str) -> TrainRun:
    """Load and initialize on a few frames; all frames are trained on, one batch validated."""
    splits = [f"data.splits.{split}=[{{kind: all}}]" for split in ("train", "val", "test")]
    run = load_trainrun(path, [*splits, f"training.max_epochs={epochs}", *overrides])
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


class Utilization:
    """Samples how busy the GPU is, in percent, five times a second while it is entered."""

    def __enter__(self) -> Utilization:
        query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "200"]
        self._process = subprocess.Popen(
            ["nvidia-smi", "-i", "0", *query], stdout=subprocess.PIPE, text=True
        )
        self._samples: list[tuple[float, float]] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def _read(self) -> None:
        for line in self._process.stdout:
            self._samples.append((time.time(), float(line)))

    def __exit__(self, *exc_info: object) -> None:
        self._process.terminate()
        self._thread.join()

    def mean(self, epochs: list[tuple[int, float, float]]) -> float:
        """Return the mean over the epochs but the first."""
        spans = [(start, start + seconds) for _, seconds, start in epochs[1:]]
        return statistics.mean(
            percent for at, percent in self._samples if any(a <= at <= b for a, b in spans)
        )


def one(name: str, path: Path, epochs: int, gpu: bool) -> None:
    """Train once and print the epochs' steps, seconds and starts."""
    logger.remove()
    # DistributedSampler leaves the data module's batch size to each process.
    batch_size = BATCH // 2 if "DDP" in name else BATCH
    options = dict((ON_GPU if gpu else RUNS)[name])
    loader = f"data.num_workers={options.pop('num_workers', 0)}"
    run, clock = trainrun_of(path, epochs, f"data.batch_size={batch_size}", loader), Clock()
    config = run.config.training
    common = (run.pipeline, run.datamodule(), run.loss_nodes, run.metric_nodes)
    if name.startswith(("own process", "1 worker", "2 workers")):
        workers = options.pop("train_workers", 1)
        scaling = Scaling(resources={"train_gpus": gpu, "train_workers": workers}, reading=options)
        trainer = GradientTrainer(
            *common,
            config,
            callbacks=[clock],
            scaling=scaling,
            output_dir=path.parent / "results",
        )
    else:
        config.enable_checkpointing = False
        if "DDP" in name:
            config = PlainDDP.model_validate(config.model_dump())
        trainer = UpstreamGradientTrainer(*common, config, callbacks=[clock])
    trainer.fit()
    print(f"epochs {json.dumps(clock.epochs)}")


def main() -> None:
    """Run each in a process of its own, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/training.json"))
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--trainrun", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one, options.trainrun, options.epochs, options.gpu)
        return
    shape = (options.size, options.size, 61)
    rates: dict[str, float] = {}
    busy: dict[str, float] = {}
    with tempfile.TemporaryDirectory(prefix="cuvis-dist-bench-") as folder:
        path = fill(Path(folder), options.frames, shape)
        for name in ON_GPU if options.gpu else RUNS:
            command = [sys.executable, __file__, "--one", name, "--trainrun", path]
            command += ["--epochs", options.epochs, *(["--gpu"] if options.gpu else [])]
            with Utilization() if options.gpu else nullcontext() as utilization:
                done = subprocess.run(
                    [str(part) for part in command], capture_output=True, text=True, cwd=folder
                )
            found = [x for x in done.stdout.splitlines() if x.startswith("epochs ")]
            if not found:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            epochs = json.loads(found[0].removeprefix("epochs "))
            rates[name] = steps_per_second(epochs)
            line = f"{name:34} {rates[name]:6.2f} steps/s"
            if options.gpu:
                busy[name] = utilization.mean(epochs)
                line += f", GPU busy {busy[name]:.0f} % of the time"
            print(line, flush=True)
    if not options.gpu:
        plain = rates["plain Lightning DDP, 2 processes"]
        print(f"2 workers against plain Lightning DDP: {rates['2 workers'] / plain:.2f}")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"frames": options.frames, "shape": shape, "steps_per_second": rates, "gpu": busy}
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
