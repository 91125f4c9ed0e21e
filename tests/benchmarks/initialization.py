"""How fast is phase 1, against upstream and against the hardware? Ratios in one run.

    python tests/benchmarks/initialization.py [--frames N] [--size S] [--repeats R] [--gpu]

Measures on one generated archive (uncompressed .npz, S x S x 61 float32): upstream's
``StatisticalTrainer`` on the guide's pipeline; ours with 1 and 2 workers, workers already up; the
floor, that is a plain loop which reads every frame once per pass and measures its moments with the
product's own kernel. Medians over the rounds; a first fit, workers not up, is reported beside them.
Before that, the kernel of moments alone: whole numbers, which are summed exactly, against the same
cubes measured with rounding. ``--large`` measures the peak memory of a worker on 1000 x 1080 x 61
frames instead. ``--gpu`` adds 8 workers, on CPUs and on a GPU that they share.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer
from loguru import logger

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.demo import DemoSettings, write_demo
from cuvis_dist.execution.session import connect
from cuvis_dist.runs.trainrun import load_trainrun
from cuvis_dist.statistics import Moments


def timed(function) -> float:
    """Return the seconds that one call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def fill(folder: Path, frames: int, shape: tuple[int, int, int]) -> Path:
    """Write a trainrun over ``frames`` train frames of random reflectance; return its path."""
    small = DemoSettings(frames=4, height=8, width=8, bands=shape[2], recordings=1)
    trainrun = write_demo(folder, small)
    rng = np.random.default_rng(0)
    base = rng.random(shape, dtype=np.float32)
    rows = ["source,index,materialized_path"]
    for i in range(frames):
        cube = base * np.float32(1 + i / frames)
        mask = np.zeros(shape[:2], dtype=np.int32)
        np.savez(
            folder / "archive" / f"frame_{i:04d}.npz",
            cube=cube,
            mask=mask,
            wavelengths=np.linspace(430, 910, shape[2]).astype(np.int32),
        )
        rows.append(f"recording_{i // 12:02d}.cu3s,{i % 12},frame_{i:04d}.npz")
    (folder / "archive" / "universe.csv").write_text("\n".join(rows) + "\n")
    return trainrun


def load(path: Path):
    """Load the trainrun afresh, all frames in its train split."""
    every = "[{kind: all}]"
    return load_trainrun(path, [f"data.splits.{s}={every}" for s in ("train", "val", "test")])


def ours(path: Path, workers: int, **measuring) -> StatisticalTrainer:
    """Return a trainer that will fit with ``workers``."""
    run = load(path)
    scaling = Scaling(resources={"workers": workers}, measuring=measuring)
    return StatisticalTrainer(run.pipeline, run.datamodule(), scaling=scaling)


def floor(path: Path, passes: int) -> None:
    """Read every frame once per pass, and measure the moments of its pixels."""
    dataset = load(path).datamodule().train_dataloader().dataset
    for _ in range(passes):
        for i in range(len(dataset)):
            Moments.measure(torch.as_tensor(dataset[i]["cube"]).reshape(-1, 61))


def lanes(size: int, repeats: int = 9) -> dict[str, float]:
    """Return milliseconds of the moments of one frame: whole numbers exactly, and with rounding.

    Medians, taken in turns, on one thread as on a worker.
    """
    rng = np.random.default_rng(0)
    times = {}
    for bands, count in ((61, size * size), (1000, size * size // 16)):
        counts = torch.from_numpy(rng.integers(0, 65536, (count, bands)).astype(np.uint16))
        singles = counts.float()
        runs = {
            "with rounding, float32": lambda singles=singles: Moments.measure_rounded(singles),
            "exactly, float32": lambda singles=singles: Moments.measure(singles),
            "exactly, uint16": lambda counts=counts: Moments.measure(counts),
        }
        rounds = [{name: timed(run) for name, run in runs.items()} for _ in range(repeats)]
        for name in runs:
            median = statistics.median(each[name] for each in rounds)
            times[f"{count} x {bands} {name}"] = 1000 * median
    return times


def main() -> None:
    """Run the benchmark, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=96)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/initialization.json"))
    options = parser.parse_args()
    logger.remove()
    kernel = _with_threads(1, lambda: lanes(options.size))
    for name, milliseconds in kernel.items():
        print(f"moments of {name:42} {milliseconds:8.1f} ms")
    connect(Scaling(resources={"workers": 2}))
    shape = (1000, 1080, 61) if options.large else (options.size, options.size, 61)
    with tempfile.TemporaryDirectory(prefix="cuvis-dist-bench-") as folder:
        path = fill(Path(folder), options.frames, shape)
        first = ours(path, 2)
        start = timed(first.fit)
        passes = len(first.records)
        runs = {
            "2 workers": lambda: ours(path, 2).fit(),
            "1 worker": lambda: ours(path, 1).fit(),
            "2 workers, sampled": lambda: ours(path, 2, later_levels="sampled").fit(),
            "2 workers, not folded": lambda: ours(path, 2, fold=False).fit(),
            "floor, 1 process": lambda: _with_threads(1, lambda: floor(path, passes)),
            "upstream": lambda: _with_threads(2, lambda: upstream(path)),
        }
        if options.gpu:
            runs |= {
                "8 workers": lambda: ours(path, 8).fit(),
                "8 workers, 1 GPU": lambda: ours(path, 8, gpus=1 / 8).fit(),
            }
        if options.large:
            runs = {"2 workers": runs["2 workers"]}
        # Round after round, so that a slow minute of the machine hits all of them.
        rounds = [{name: timed(run) for name, run in runs.items()} for _ in range(options.repeats)]
    times = {name: statistics.median(r[name] for r in rounds) for name in runs}
    reference = times["2 workers"]
    print(f"{options.frames} frames of {' x '.join(map(str, shape))}, {passes} passes")
    for name, seconds in times.items():
        spread = f"{min(r[name] for r in rounds):.2f} to {max(r[name] for r in rounds):.2f}"
        print(f"{name:22} {seconds:8.2f} s   {seconds / reference:6.2f} x 2 workers   ({spread})")
    for number, record in enumerate(first.records, 1):
        print(f"pass {number}: at most {record.peak_worker_bytes / 1e6:.0f} MB in a worker")
    print(f"first fit, workers not up: {start:.2f} s")
    print(f"a cube: {np.prod(shape) * 4 / 1e6:.0f} MB")
    options.json.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "frames": options.frames,
        "shape": shape,
        "passes": passes,
        "median_seconds": times,
        "rounds": rounds,
        "first_fit_seconds": start,
        "peak_worker_bytes": [record.peak_worker_bytes for record in first.records],
        "moments_milliseconds": kernel,
        "cube_bytes": int(np.prod(shape) * 4),
    }
    options.json.write_text(json.dumps(result, indent=2) + "\n")


def upstream(path: Path) -> None:
    """Fit with upstream's trainer, in this process."""
    run = load(path)
    UpstreamStatisticalTrainer(run.pipeline, run.datamodule()).fit()


def _with_threads(threads: int, function):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()
