"""What stands on the terminal, and when: the first line, waits, and the rest as it was."""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from cuvis_ai_core.training.post_fit import CheckpointRestored, EpochProgress, TrainEvent, TrainHook
from loguru import logger

from cuvis_dist.archive import Contents
from cuvis_dist.cli import main
from cuvis_dist.errors import one_line
from cuvis_dist.runs.lines import Lines
from cuvis_dist.runs.progress import ProgressLines
from cuvis_dist.store import Entry, Key, Store
from cuvis_dist.store.pixels import to_table
from cuvis_dist.waiting import announce

#: Runs a command, and names which of the packages that take long to load it has loaded.
HEAVY = """
import sys
from cuvis_dist.cli import main
try:
    code = main(sys.argv[1:])
finally:
    print("loaded", sorted({"ray", "torch", "cuvis_ai_core"} & set(sys.modules)))
"""


def test_the_version_loads_nothing():
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, "--version"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"cuvis-dist \d+\.\d+\.\d+\nloaded \[\]\n", done.stdout)


def test_looking_into_a_store_loads_little(tmp_path):
    """All that can be asked of one, by one process."""
    (tmp_path / "frame.npz").touch()
    files = Contents.of_files([str(tmp_path / "frame.npz")])
    entry = Entry("recording#0", "recording", files.as_json(), {"n": 0, "bound": None})
    folder = tmp_path / "store"
    Store(folder).add(Key("pixels", {}), "pixels", to_table([None]), [entry])
    asked = "for what in ('list', 'show', 'verify', 'prune'): main(['store', what, sys.argv[1]])"
    done = subprocess.run(
        [sys.executable, "-c", HEAVY.replace("code = main(sys.argv[1:])", asked), folder],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    list_, _, show, verify, prune, loaded = done.stdout.splitlines()
    assert list_.startswith("pixels: 1 frames, "), done.stderr
    assert show == "recording: 1 frames (pixels 1)"
    assert verify == "1 of 1 files are as their manifests say"
    assert prune.endswith("; 1 rows stay")
    assert loaded == "loaded []"


@pytest.mark.parametrize("words", [["run"], ["audit"], ["store", "verify"]])
def test_the_help_of_a_command_says_what_it_does(words, capsys):
    with pytest.raises(SystemExit):
        main([*words, "--help"])
    first = capsys.readouterr().out.split("\n\n")[1]
    with pytest.raises(SystemExit):
        main([*words[:-1], "--help"])
    listed = " ".join(capsys.readouterr().out.split())
    said = " ".join(first.split()).removesuffix(".")
    assert f"{words[-1]} {said[0].lower()}{said[1:]} " in listed


def test_bad_settings_are_found_before_anything_is_loaded():
    done = subprocess.run(
        [sys.executable, "-c", HEAVY, "run", "a trainrun.yaml", "--set", "workers=2"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "loaded []\n"
    first, last = done.stderr.splitlines()
    assert re.fullmatch(r"cuvis-dist [0-9.]+: run 'a trainrun.yaml'", first), (
        "the command is there, and none of its options, which may carry a secret"
    )
    assert "resources.workers" in last


def test_the_first_line_comes_before_what_takes_long(demo):
    """And what is loaded then is named, since it takes seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "cuvis_dist.cli", "info", demo],
        env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    started = time.monotonic()
    first = process.stderr.readline()
    seconds = time.monotonic() - started
    out, rest = process.communicate(timeout=120)
    total = time.monotonic() - started
    assert process.returncode == 0, rest
    assert first.endswith(f"info {demo}\n")
    assert "  loading cuvis.ai ..." in rest.splitlines()
    assert out.startswith("trainrun ")
    assert seconds < total / 3, "a slow machine is slow for both"


class Screen(io.StringIO):
    """Keeps what a terminal would show of lines that are rewritten."""

    def isatty(self):
        return True

    def shown(self) -> list[str]:
        rows = self.getvalue().split("\n")
        return [row.rpartition("\r\x1b[2K")[2] for row in rows]


def until(holds, seconds=10.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_a_terminal_counts_the_seconds_of_a_wait_and_keeps_them():
    screen = Screen()
    with Lines(screen) as lines:
        lines.wait("starting Ray")
        assert screen.shown() == ["  starting Ray ..."]
        until(lambda: screen.shown() == ["  starting Ray ... 1 s"])
        lines.change("fitting: 1/9 frames")
        started, current = screen.shown()
        assert re.fullmatch(r"  starting Ray: 1\.\d s", started)
        assert current == "  fitting: 1/9 frames"
        until(lambda: screen.shown()[-1] == "  fitting: 1/9 frames ... 1 s")
        lines.say("fitted")
        lines.wait("a moment")
        lines.say("done")
        lines.wait("what an error ends")
    assert screen.shown() == [started, "  fitted", "  done", ""]


def test_a_log_has_a_line_for_each_wait_that_lasts():
    log = io.StringIO()
    with Lines(log) as lines:
        lines.wait("reading the trainrun")
        lines.wait("starting Ray")
        until(lambda: log.getvalue())
        lines.change("fitting: 1/9 frames")
        lines.change("fitting: 2/9 frames")
        lines.say("fitted: 9/9 frames")
    assert log.getvalue() == "  starting Ray ...\n  fitted: 9/9 frames\n"


def test_the_restored_epoch_has_the_number_that_its_line_has():
    """Lightning counts from 0, the lines of epochs from 1."""
    log = io.StringIO()
    with Lines(log) as lines:
        show = ProgressLines(lines)
        show(TrainEvent(TrainHook.EPOCH_END, epochs=EpochProgress(1, 2)))
        best = CheckpointRestored(True, "epoch=0-step=8.ckpt", 0, "metrics/iou", 0.5)
        show(TrainEvent(TrainHook.CHECKPOINT_RESTORED, checkpoint=best))
    assert "  epoch 1/2: " in log.getvalue()
    assert "(epoch 1 metrics/iou 0.5): epoch=0-step=8.ckpt" in log.getvalue()


def test_a_log_hears_at_times_what_changes_or_is_waited_for(monkeypatch):
    monkeypatch.setattr("cuvis_dist.runs.lines.LOG_SECONDS", 1.5)
    log = io.StringIO()
    with Lines(log) as lines:
        lines.wait("starting Ray")
        until(lambda: log.getvalue().count("\n") == 2)
        assert re.fullmatch(
            r"  starting Ray \.\.\.\n  still starting Ray \(\d s\)\n", log.getvalue()
        )
        lines.change("fitting: 1/9 frames")
        until(lambda: "still fitting: 1/9 frames" in log.getvalue())


@pytest.mark.parametrize("terminal", [True, False])
def test_a_message_of_the_log_ends_no_wait(terminal):
    """It stands on a line of its own, and what goes on is shown again."""
    screen = Screen() if terminal else io.StringIO()
    with Lines(screen) as lines:
        handler = logger.add(lines.log, level="INFO", format="{message}")
        try:
            announce("starting workers")
            logger.warning("the cluster is small")
            until(lambda: "starting workers ..." in screen.getvalue().split("small")[1])
            lines.change("fitting: 1/9 frames")
            logger.warning("a worker was lost")
            lines.say("fitted")
        finally:
            logger.remove(handler)
    said = screen.shown() if terminal else screen.getvalue().split("\n")
    waits = [line for line in said if "starting workers" in line]
    assert [line for line in said if line not in waits] == [
        "the cluster is small", "a worker was lost", "  fitted", "",
    ]  # fmt: skip


def test_a_line_that_is_rewritten_does_not_wrap(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    screen = Screen()
    with Lines(screen) as lines:
        lines.change("fitting a, b, c, d, e, f: 1/9 frames")
        assert screen.shown() == ["  fitting a, b, c, d"[:19]]
        lines.say("fitted a, b, c, d, e, f: 9/9 frames")
    assert screen.shown() == ["  fitted a, b, c, d, e, f: 9/9 frames", ""]


@pytest.mark.parametrize("command", ["run", "init", "train", "info", "plan"])
def test_an_error_ends_the_wait_before_it(command, capsys, tmp_path):
    assert main([command, str(tmp_path / "none.yaml")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(f": {command} {tmp_path / 'none.yaml'}")
    assert lines[-1] == f"cuvis-dist: trainrun not found: {tmp_path / 'none.yaml'}"


@pytest.mark.parametrize("option", ["--seed=-1", "--height=0", "--recordings=0", "--frames=-3"])
def test_a_demo_of_no_size_is_refused(option, capsys, tmp_path):
    assert main(["demo", "--folder", str(tmp_path), option]) == 2
    name, _, value = option.partition("=")
    assert f"cuvis-dist: {name} is {value}; the least is" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "{file}"], "has no run.json"),
        (["demo", "--folder", "{file}"], "a folder lies where a file belongs"),
        (["demo", "--folder", "/proc/none"], "/proc/none cannot be written"),
    ],
)
def test_a_place_where_nothing_can_be_is_told(arguments, words, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([part.format(file=tmp_path / "file") for part in arguments]) == 2
    assert words in capsys.readouterr().err


def test_nobody_is_advised_to_load_a_file_unsafely(tmp_path):
    (tmp_path / "cube.npz").write_text("no array")
    with pytest.raises(ValueError, match="load it unsafely") as caught:
        np.load(tmp_path / "cube.npz")
    said = "ValueError: This file contains pickled (object) data."
    assert one_line(caught.value) == said


@pytest.fixture
def nobody():
    """Return a pipe's writing end that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    with contextlib.suppress(OSError):
        os.close(writing)


def test_a_command_whose_output_nobody_reads_ends_quietly(nobody):
    command = [sys.executable, "-m", "cuvis_dist.cli"]
    done = subprocess.run([*command, "--help"], stdout=nobody, stderr=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    words = ["info", "none.yaml"]
    assert subprocess.run([*command, *words], stderr=nobody, timeout=60).returncode == 2


def test_it_does_all_of_its_work_and_its_exit_code_is_its_own(
    nobody, tmp_path, monkeypatch, capsys
):
    (tmp_path / "frame.npz").touch()
    files = Contents.of_files([str(tmp_path / "frame.npz")])
    names = [f"recording_{number:05}" for number in range(2000)]
    entries = [Entry(f"{n}#0", n, files.as_json(), {"n": 0, "bound": None}) for n in names]
    store = Store(tmp_path / "store")
    store.add(Key("pixels", {}), "pixels", to_table([None] * len(names)), entries)
    monkeypatch.setattr(sys, "stdout", os.fdopen(nobody, "w"))
    assert main(["store", "show", str(store)]) == 0
    sys.stdout.close()
    next((tmp_path / "store").rglob("*.parquet")).write_bytes(b"damaged")
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    assert main(["store", "verify", str(store)]) == 3
    sys.stdout.close()
    assert "Traceback" not in capsys.readouterr().err


def test_the_first_line_names_a_store_and_no_secret_of_its_address(capsys):
    assert main(["store", "list", "s3://mine:secret@bucket/store?token=secret"]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[0].endswith(": store list s3://bucket/store")
    assert "secret" not in said


def test_sigterm_while_a_cluster_is_joined(demo):
    """At an address where somebody listens who is no cluster."""
    names = "RAY_gcs_rpc_server_connect_timeout_s", "RAY_py_gcs_connect_timeout_s"
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        process = subprocess.Popen(
            [sys.executable, "-m", "cuvis_dist.cli", "run", demo, "--address", address],
            env=os.environ | dict.fromkeys(names, "1"), stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert any("joining" in line for line in process.stderr)
        process.terminate()
        said = process.communicate(timeout=120)[1]
    assert process.returncode == 130, said
    assert said.splitlines()[-1] == "cuvis-dist: interrupted"
