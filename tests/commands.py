"""How do tests run the command in a process of its own, and look at what it left?"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml
from gradients import train_upstream
from readings import counted, counting

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.nodes.state import hash_state
from cuvis_dist.plain import from_bytes
from cuvis_dist.runs.trainrun import load_trainrun


class Command:
    """``cuvis-dist`` in a process of its own, whose frames are counted.

    Attributes
    ----------
    process : Popen
        The process of the last :meth:`run`.
    """

    process: subprocess.Popen[bytes]

    def __init__(self, folder: Path, *arguments: object, **environment: str) -> None:
        self.arguments = [sys.executable, "-m", "cuvis_dist.cli", *map(str, arguments)]
        self.folder = folder
        self.log = folder / "readings.log"
        self.log.touch()
        self.environment = os.environ | {
            **counting(self.log),
            **environment,
        }

    def run(
        self, until: str | Callable[[], bool] = "", number: int = 0
    ) -> tuple[int, str, Counter]:
        """Run to the end, or send a signal once a line is printed, or something else happened.

        Returns exit code, what it printed, and what it read.
        """
        before = counted(self.log)
        said = self.folder / f"stderr_{time.monotonic_ns()}"

        def happened() -> bool:
            return until() if callable(until) else until in said.read_text()

        with open(said, "wb") as stderr:
            process = self.process = subprocess.Popen(
                self.arguments,
                env=self.environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # a process group of its own, to end as one
            )
        try:
            while until and not happened() and process.poll() is None:
                time.sleep(0.02)
            if until:
                process.send_signal(number)
            code = process.wait(400)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what a killed driver leaves
        return code, said.read_text(), counted(self.log) - before


def kept_files(path: Path, files: Sequence) -> set:
    """Return the names of the files in a stored pass, each of which is a shard."""
    shards = from_bytes(path.read_bytes())["state"]["shards"].tolist()
    return {name for ordinal, name in enumerate(files) if ordinal in shards}


def record(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


def train_files(trainrun: Path) -> list[str]:
    """Return the names of the files of the train split, in order."""
    splits = yaml.safe_load(trainrun.read_text())["data"]["splits"]
    return [
        f"{Path(selector['source']).stem}_{index:03d}.npz"
        for selector in splits["train"]
        for index in selector["ids"]
    ]


def one_process(trainrun: Path, folder: Path):
    """Run the same trainrun with phase 1 on one worker here, and phase 2 by upstream."""
    run = load_trainrun(trainrun, [f"output_dir={folder}"])
    scaling = Scaling(resources={"workers": 1})
    StatisticalTrainer(run.pipeline, run.datamodule(), scaling=scaling).fit()
    initialized = hash_state(run.pipeline.nodes())
    run.pipeline.unfreeze_nodes_by_name(run.config.unfreeze_nodes)
    run.config.training.callbacks.checkpoint.dirpath = str(folder / "checkpoints")
    train_upstream(run)
    return initialized, run.pipeline
