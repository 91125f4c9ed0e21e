"""A small trainrun needs no Ray, and leaves what it leaves on one; commands in own processes."""

from __future__ import annotations

import contextlib
import functools
import json
import signal
from pathlib import Path

import pytest
from archives import assert_same_state
from commands import Command, record, train_files
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.plain import NotPlainError
from cuvis_dist.training.checkpoint import reached

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_a_command_is_stopped_and_typed_again(demo_trainrun, tmp_path):
    """In the middle of a pass, and killed in that of an epoch; then it goes on from there."""
    whole = Command(
        tmp_path, "run", demo_trainrun, "--output-dir", tmp_path / "whole",
        CUVIS_DIST_READING_SECONDS="0",
    )  # fmt: skip
    assert whole.run()[0] == 0
    out = tmp_path / "out"
    options = ("--output-dir", out, "--set", "measuring.shard_frames=1")
    command = Command(
        tmp_path, "run", demo_trainrun, *options, "--set", "resources.save_seconds=0",
        CUVIS_DIST_READING_SECONDS="0.2",
    )  # fmt: skip
    files = train_files(demo_trainrun)
    kept = out / "resume" / "passes" / "1.state"
    code, said, _ = command.run(until=kept.exists, number=signal.SIGTERM)
    assert code == 130, said
    assert "interrupted; the same command goes on from here" in said
    assert (record(out)["status"], record(out)["exit_code"]) == ("interrupted", 130)

    last = out / "resume" / "last.ckpt"
    within = functools.partial(_is_within, last, epoch=1)
    code, said, _ = command.run(until=within, number=signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    assert "pass 1 goes on: " in said
    kept = reached(last)

    code, said, readings = command.run()
    assert code == 0, said
    assert "phase 1 was finished before" in said
    assert "Ray" not in said
    done = record(out)
    assert (done["status"], done["epochs"], len(done["passes"])) == ("done", 3, 2)
    assert done["passes"][0]["restored_frames"] > 0
    assert json.loads((out / "result.json").read_text())["metrics"] == done["metrics"]
    # Two frames a batch; and what the data module opens when it is set up.
    left = 3 * len(files) - kept.epochs * len(files) - kept.batches * 2
    assert left <= sum(readings[name] for name in files) <= left + 10
    assert_same_state(saved(out), saved(tmp_path / "whole"), 1e-5)


def _is_within(path: Path, epoch: int) -> bool:
    """Whether what is kept is of the middle of an epoch."""
    with contextlib.suppress(NotPlainError):
        return reached(path).epochs == epoch and reached(path).batches > 1
    return False


def saved(output: Path) -> CuvisPipeline:
    """Return the pipeline that a run has saved."""
    path = Path(record(output)["pipeline"])
    return CuvisPipeline.load_pipeline(path, path.with_suffix(".pt"))
