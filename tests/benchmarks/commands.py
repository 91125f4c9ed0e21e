"""How long does a small trainrun take, from Enter to the saved pipeline?

    python tests/benchmarks/commands.py [--rounds R] [--large] [--json FILE]

Whole commands in processes of their own, one after another in each round, on 10 train frames of
90 x 130 x 61: upstream's ``restore-trainrun`` and ``cuvis-dist run``, for phase 1 alone and for
both phases, without options and with two workers. ``--large`` takes phase 1 of 96 train frames of
512 x 512 x 61 instead. Medians over the rounds, and their range.
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

import yaml
from initialization import fill

from cuvis_dist.demo import DemoSettings, write_demo
from cuvis_dist.runs.trainrun import installed_plugins_dirs

SMALL = DemoSettings(height=90, width=130, bands=61, max_epochs=3)
WORKERS = ["--workers", "2", "--train-workers", "2"]


def commands(trainrun: Path) -> dict[str, list[str]]:
    """Return what is typed for a trainrun, by who does it."""
    here = Path(sys.executable).parent
    plugins = [
        str(part) for folder in installed_plugins_dirs() for part in ("--plugins-dir", folder)
    ]
    theirs = [str(here / "restore-trainrun"), "--trainrun-path", str(trainrun), "--mode", "train"]
    ours = [str(here / "cuvis-dist"), "run", str(trainrun), "--restart"]
    return {"upstream": [*theirs, *plugins], "ours": ours, "ours, 2 workers": [*ours, *WORKERS]}


def seconds(command: list[str], folder: Path) -> float:
    """Return how long a command takes; it must end well."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - started


def main() -> None:
    """Time all commands in turns, print a table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--json", type=Path, default=Path("outputs/bench/commands.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cuvis-dist-bench-") as folder:
        if options.large:
            both = fill(Path(folder), 96, (512, 512, 61))
        else:
            both = write_demo(Path(folder), SMALL)
        content = yaml.safe_load(both.read_text())
        del content["training"]
        if options.large:
            content["data"]["splits"]["train"] = [{"kind": "all"}]
        alone = both.with_name("phase_1.yaml")
        alone.write_text(yaml.safe_dump(content))
        work = {"phase 1 alone": commands(alone)}
        if not options.large:
            work["both phases"] = commands(both)
        times: dict[str, list[float]] = {}
        for _ in range(options.rounds):
            for what, by_whom in work.items():
                for who, command in by_whom.items():
                    took = seconds(command, Path(folder))
                    times.setdefault(f"{what}, {who}", []).append(took)
    for what, by_whom in work.items():
        base = statistics.median(times[f"{what}, upstream"])
        for who in by_whom:
            took = times[f"{what}, {who}"]
            middle = statistics.median(took)
            print(
                f"{what + ', ' + who:32} {middle:6.1f} s ({min(took):.1f} to {max(took):.1f}), "
                f"{middle / base:.2f} times upstream"
            )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(times, indent=2) + "\n")


if __name__ == "__main__":
    main()
