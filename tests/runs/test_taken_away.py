"""What a run reads, or writes to, is taken away while it goes on; given back, it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Command, record

from cuvis_dist.demo import DemoSettings, write_demo

pytestmark = pytest.mark.slow

SLOWLY = {"CUVIS_DIST_READING_SECONDS": "0.2"}
PASS = ("--set", "measuring.shard_frames=1", "--set", "resources.save_seconds=0")


@pytest.fixture
def demo(tmp_path) -> Path:
    """A trainrun of a few frames, four of which are for training."""
    settings = DemoSettings(frames=8, height=16, width=20, bands=6, recordings=2, max_epochs=2)
    return write_demo(tmp_path / "demo", settings)


def told(said: str) -> str:
    """Return the one message that a command ended with."""
    assert "Traceback" not in said
    (last,) = [line for line in said.splitlines() if line.startswith("cuvis-dist: ")]
    return last


def ended(output: Path) -> set[tuple[str, int]]:
    """Return how the records of the run and of the job say that it ended."""
    records = [json.loads((output / name).read_text()) for name in ("run.json", "result.json")]
    return {(each["status"], each["exit_code"]) for each in records}


def test_a_recording_is_deleted(demo, tmp_path):
    out, taken = tmp_path / "out", demo.parent / "archive" / "recording_01_001.npz"
    command = Command(tmp_path, "init", demo, "--output-dir", out, *PASS, **SLOWLY)
    elsewhere = tmp_path / taken.name

    def take() -> bool:
        begun = (out / "resume" / "passes" / "1.state").exists()
        if begun and taken.exists():
            taken.rename(elsewhere)
        return False

    code, said, _ = command.run(until=take)
    assert code == 3, said
    assert "cannot read frame recording_01.cu3s#1" in told(said)
    assert str(taken) in told(said)
    assert "Put the file back, or leave the frame out of the splits" in told(said)
    assert ended(out) == {("failed", 3)}

    elsewhere.rename(taken)
    code, said, _ = command.run()
    assert code == 0, said
    assert "pass 1 goes on: " in said
    assert ended(out) == {("done", 0)}


@contextlib.contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """Let nobody make, rename or remove a file in a folder or below it, root neither."""
    folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    if os.getuid():
        change = [lambda path: path.chmod(0o555), lambda path: path.chmod(0o755)]
    else:
        change = [
            lambda path, flag=flag: subprocess.run(["chattr", flag, path], check=True)
            for flag in ("+i", "-i")
        ]
    try:
        for path in folders:
            change[0](path)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no folder can be made read-only here: {error}")
    try:
        yield
    finally:
        for path in folders:
            change[1](path)


@pytest.mark.long
@pytest.mark.parametrize("phase", ["phase 1", "training"])
def test_the_output_folder_cannot_be_written_any_more(demo, tmp_path, phase):
    out = tmp_path / "out"
    command = Command(tmp_path, "run", demo, "--output-dir", out, *PASS, **SLOWLY)
    begun = out / "resume" / ("passes/1.state" if phase == "phase 1" else "last.ckpt")
    with contextlib.ExitStack() as taken:

        def take() -> bool:
            if begun.exists() and not taken._exit_callbacks:
                taken.enter_context(unwritable(out))
            return False

        code, said, _ = command.run(until=take)
        assert code == 2, said
        assert str(out) in told(said)
        assert "cannot be written on " in told(said)
        assert "Let this user write there, or choose another folder" in told(said)
    assert record(out)["status"] == "running", "nothing could be written"

    code, said, _ = command.run()
    assert code == 0, said
    assert "goes on: " in said if phase == "phase 1" else "phase 1 was finished before" in said
    assert ended(out) == {("done", 0)}
