"""What does a shard cost the driver? Passes over frames that are nearly free, one frame a shard.

    python tests/benchmarks/scheduling.py [--shards N ...] [--json FILE]

For each number of shards one pass on 2 workers that fits ``RXGlobal`` on 61 bands (a partial is
30 KB), as ``cuvis-dist run`` does it, with what is measured kept every few seconds. Reported per
shard: wall-clock time; the same less what 2 workers need to read and measure, from a plain loop;
the driver's CPU time; and how far the driver's memory grew.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import ray
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger
from torch.utils.data import DataLoader, Dataset

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.archive import open_archive
from cuvis_dist.execution.session import connect
from cuvis_dist.execution.worker import prepare_worker
from cuvis_dist.initialization.measuring import Measurer
from cuvis_dist.initialization.plan import make_plan

BANDS, WORKERS = 61, 2


class SmallCubes(Dataset):
    """Frames of 8 x 8 pixels, made when they are asked for."""

    def __init__(self, frames: int) -> None:
        self.frames = frames

    def __len__(self) -> int:
        return self.frames

    def __getitem__(self, index: int) -> dict:
        cube = np.random.default_rng(index).random((8, 8, BANDS), dtype=np.float32)
        return {"cube": cube, "wavelengths": np.arange(BANDS, dtype=np.int32)}


class SmallModule(pl.LightningDataModule):
    """Serves them as its train split."""

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames

    def train_dataloader(self) -> DataLoader:
        return DataLoader(SmallCubes(self.frames))


def pipeline() -> CuvisPipeline:
    """Return a pipeline that needs one pass."""
    data, rx, built = CU3SDataNode(), RXGlobal(BANDS), CuvisPipeline("scheduling")
    built.connect((data.outputs.cube, rx.inputs.data))
    return built


def worker_seconds(frames: int = 2000) -> float:
    """Return what reading and measuring a frame takes in a plain loop, one thread."""
    prepare_worker(1)
    archive, built = open_archive(SmallModule(frames), "train"), pipeline()
    measurer = Measurer(built, make_plan(built)[0].by_key())
    started = time.perf_counter()
    for index in range(frames):
        partial, _ = measurer.frame(archive.read(index), archive.frames[index], index)
        for statistic in partial.statistics.values():
            statistic.to_bytes()
    return (time.perf_counter() - started) / frames


def memory(peak: bool) -> int:
    """Return this process's resident memory in bytes, or its peak since :func:`forget_peak`."""
    field = "VmHWM:" if peak else "VmRSS:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this needs Linux")


def forget_peak() -> None:
    """Let the peak of this process's memory start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def measure(shards: int) -> dict[str, float]:
    """Carry out one pass over so many shards."""
    with tempfile.TemporaryDirectory(prefix="cuvis-dist-bench-") as folder:
        scaling = Scaling(resources={"workers": WORKERS}, measuring={"shard_frames": 1})
        trainer = StatisticalTrainer(
            pipeline(), SmallModule(shards), scaling=scaling, output_dir=folder
        )
        forget_peak()
        before, cpu, started = memory(peak=False), time.process_time(), time.perf_counter()
        trainer.fit(resume=True)
        wall = time.perf_counter() - started
        return {
            "shards": shards,
            "wall_ms": 1e3 * wall / shards,
            "driver_cpu_ms": 1e3 * (time.process_time() - cpu) / shards,
            "driver_growth_bytes": memory(peak=True) - before,
            "stored_bytes": sum(p.stat().st_size for p in Path(folder).rglob("*.state")),
        }


def main() -> None:
    """Run the benchmark, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 5000, 20000])
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/scheduling.json"))
    options = parser.parse_args()
    logger.remove()
    alone = 1e3 * worker_seconds()
    connect(Scaling(resources={"workers": WORKERS}))
    measure(50)  # workers up, imports done
    print(f"a worker needs {alone:.2f} ms a shard; {WORKERS} workers, {BANDS} bands")
    print(" shards  wall ms  less work  driver CPU ms  grew MB")
    rows = []
    for shards in options.shards:
        row = measure(shards)
        row["overhead_ms"] = row["wall_ms"] - alone / WORKERS
        print(
            f"{shards:7} {row['wall_ms']:8.2f} {row['overhead_ms']:10.2f} "
            f"{row['driver_cpu_ms']:14.2f} {row['driver_growth_bytes'] / 1e6:8.0f}",
            flush=True,
        )
        rows.append(row)
    ray.shutdown()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {"worker_ms": alone, "workers": WORKERS, "machine": platform.processor(), "rows": rows}
    options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
