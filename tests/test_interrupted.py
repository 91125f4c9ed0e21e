"""The command is killed, interrupted and typed again; it starts a Ray of its own each time."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import yaml
from archives import assert_same_state, buffers_sha256
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from gradients import initialized, train_upstream
from ray import cloudpickle

from cuvis_dist.initialization.stored import passes_folder

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.long]
READINGS = Path(__file__).parent / "readings"


class Command:
    """``cuvis-dist`` in a process of its own, whose frames are counted."""

    def __init__(self, folder: Path, *arguments: object) -> None:
        self.arguments = [sys.executable, "-m", "cuvis_dist.cli", *map(str, arguments)]
        self.folder = folder
        self.log = folder / "readings.log"
        self.log.touch()
        self.environment = os.environ | {
            "CUVIS_DIST_READINGS": str(self.log),
            "PYTHONPATH": f"{READINGS}{os.pathsep}{os.environ['PYTHONPATH']}",
        }

    def run(
        self, until: str | Callable[[], bool] = "", number: int = 0
    ) -> tuple[int, str, Counter]:
        """Run to the end, or send a signal once a line is printed, or something else happened.

        Returns exit code, what it printed, and what it read.
        """
        before = Counter(self.log.read_text().split())
        said = self.folder / f"stderr_{time.monotonic_ns()}"

        def happened() -> bool:
            return until() if callable(until) else until in said.read_text()

        with open(said, "wb") as stderr:
            process = subprocess.Popen(
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
        return code, said.read_text(), Counter(self.log.read_text().split()) - before


def test_a_command_typed_again_goes_on(demo_trainrun, tmp_path):
    overrides = ("data.batch_size=3", "training.max_epochs=5", "training.scheduler.patience=0")
    expected = initialized(demo_trainrun, tmp_path / "one", *overrides)
    train_upstream(expected)
    frames = train_files(demo_trainrun)

    results = tmp_path / "results"
    options = [part for override in overrides for part in ("--override", override)]
    command = Command(
        tmp_path, "run", demo_trainrun, *options, "--output-dir", results,
        "--workers", 2, "--train-workers", 2, "--no-fold",
    )  # fmt: skip

    def read(readings):
        return sum(readings[name] for name in frames)

    code, said, readings = command.run(until="epoch 2/5: 10/10", number=signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    assert read(readings) >= (4 + 2) * len(frames)

    code, said, readings = command.run()
    assert code == 0, said
    assert "phase 1 was finished before" in said
    assert "fitted" not in said
    assert "epoch 1/5" not in said
    # The epochs that were left, and what the data module opens when it is set up.
    assert read(readings) <= 4 * len(frames) + 10, said
    record = json.loads((results / "run.json").read_text())
    assert record["status"] == "done"
    assert len(record["passes"]) == 4
    assert record["epochs"] == 5
    pipeline = Path(record["pipeline"])
    saved = CuvisPipeline.load_pipeline(pipeline, pipeline.with_suffix(".pt"))
    assert_same_state(saved, expected.pipeline, 1e-5)
    assert [path.name for path in (results / "resume").iterdir()] == ["fingerprint.json"]


def test_a_driver_killed_in_the_middle_of_a_pass(demo_trainrun, tmp_path):
    scaling = tmp_path / "scaling.yaml"
    scaling.write_text("workers: 2\nshard_frames: 1\nsave_seconds: 0\n")

    def command(name):
        output = tmp_path / name
        arguments = ("init", demo_trainrun, "--scaling", scaling, "--output-dir", output)
        return Command(tmp_path, *arguments), output

    undisturbed, output = command("undisturbed")
    code, said, _ = undisturbed.run()
    assert code == 0, said
    expected = saved_sha256(output)

    files = train_files(demo_trainrun)
    for number in (1, 2):
        disturbed, output = command(f"disturbed_{number}")
        path = passes_folder(output) / f"{number}.pkl"
        enough = functools.partial(_has_shards, path, 4)
        code, said, _ = disturbed.run(until=enough, number=signal.SIGKILL)
        assert code == -signal.SIGKILL, said
        kept = kept_files(path, files)
        assert 4 <= len(kept) < len(files), "killed too early or too late"

        code, said, readings = disturbed.run()
        assert code == 0, said
        assert f"pass {number} goes on: {len(kept)} of {len(files)} frames were read before" in said
        passes = 3 - number
        for name in files[1:]:  # the data module opens the first one when it is set up
            assert readings[name] == passes - (name in kept), name
        assert saved_sha256(output) == expected
        restored = [p["restored_frames"] for p in record(output)["passes"]]
        assert restored == ([len(kept), 0] if number == 1 else [len(files), len(kept)])
        assert [path.name for path in (output / "resume").iterdir()] == ["fingerprint.json"]


def record(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


def _has_shards(path: Path, count: int) -> bool:
    return path.exists() and len(kept_files(path, range(99))) >= count


def kept_files(path: Path, files: Sequence) -> set:
    """Names of the files in a stored pass, each of which is a shard."""
    _, measured = cloudpickle.loads(path.read_bytes()[32:])
    return {name for ordinal, name in enumerate(files) if ordinal in measured.tree}


def saved_sha256(output: Path) -> str:
    """Hash of the buffers of the pipeline that a run saved."""
    pipeline = Path(record(output)["pipeline"])
    return buffers_sha256(CuvisPipeline.load_pipeline(pipeline, pipeline.with_suffix(".pt")))


def train_files(trainrun: Path) -> list[str]:
    """Names of the files of the train split, in order."""
    splits = yaml.safe_load(trainrun.read_text())["data"]["splits"]
    return [
        f"{Path(selector['source']).stem}_{index:03d}.npz"
        for selector in splits["train"]
        for index in selector["ids"]
    ]
