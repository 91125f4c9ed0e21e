"""A small trainrun needs no Ray, and leaves what it leaves on one; commands in own processes."""

from __future__ import annotations

import json
import signal

import pytest
from commands import Command, record, train_files

pytestmark = pytest.mark.slow


@pytest.mark.long
def test_a_command_is_stopped_and_typed_again(demo_trainrun, tmp_path):
    """In the middle of a pass, and of an epoch; then it goes on from there."""
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

    code, said, readings = command.run(until="epoch 1/3: 10/10", number=signal.SIGINT)
    assert code == 130, said
    assert "pass 1 goes on: " in said
    assert record(out)["passes"][0]["restored_frames"] > 0
    assert record(out)["status"] == "interrupted"

    code, said, readings = command.run()
    assert code == 0, said
    assert "phase 1 was finished before" in said
    assert "Ray" not in said
    done = record(out)
    assert (done["status"], done["epochs"], len(done["passes"])) == ("done", 3, 2)
    assert json.loads((out / "result.json").read_text())["metrics"] == done["metrics"]
    # Two epochs at least and three at most, and what the data module opens when it is set up.
    assert 2 * len(files) <= sum(readings[name] for name in files) <= 3 * len(files) + 10
