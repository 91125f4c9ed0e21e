"""However a command ends, it says so: real signals to real processes, its own and Ray's."""

from __future__ import annotations

import fcntl
import functools
import json
import os
import signal
import subprocess
import sys
import termios
import time

import psutil
import pytest
from commands import Command, record
from heads import cluster

from cuvis_dist.cli import main

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SLOWLY = {"CUVIS_DIST_READING_SECONDS": "0.3"}


def ending(output):
    """Return how the record of the run and that of the job say that it ended."""
    said = [json.loads((output / name).read_text()) for name in ("run.json", "result.json")]
    (ends,) = {(each["status"], each["exit_code"]) for each in said}
    return ends


@pytest.mark.parametrize("name", ["gcs_server", pytest.param("raylet", marks=pytest.mark.long)])
def test_the_loss_of_the_cluster_is_said_at_once(demo_trainrun, tmp_path, name):
    out = tmp_path / "out"
    options = ("--output-dir", out, "--set", "measuring.shard_frames=1")
    command = Command(
        tmp_path, "init", demo_trainrun, *options, "--workers", 1,
        "--set", "resources.save_seconds=0", **SLOWLY,
    )  # fmt: skip
    kept = out / "resume" / "passes" / "1.state"
    killed = []

    def kill() -> bool:
        if not kept.exists():
            return False
        for process in psutil.Process(command.process.pid).children(recursive=True):
            if process.name() == name:
                process.kill()
                killed.append(time.monotonic())
        return True

    code, said, _ = command.run(until=kill)
    assert killed
    assert code == 4, said
    assert time.monotonic() - killed[0] < 10
    last = [line for line in said.splitlines() if line.startswith("cuvis-dist:")]
    assert len(last) == 1, said
    assert f"the Ray cluster was lost: its {name}" in last[0]
    assert "Traceback" not in said
    assert ending(out) == ("failed", 4)

    again = Command(tmp_path, "init", demo_trainrun, *options, "--workers", 0)
    code, said, _ = again.run()
    assert code == 0, said
    assert "pass 1 goes on: " in said
    assert ending(out) == ("done", 0)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gcs_server", "has not answered for 9 s"),
        ("raylet", "the raylet of this machine was ended"),
    ],
)
def test_the_loss_of_a_cluster_that_was_joined(demo_trainrun, tmp_path, name, reason):
    out = tmp_path / "out"
    patience = {"RAY_gcs_rpc_server_reconnect_timeout_s": "12"}
    with cluster(tmp_path, 9700, cpus=1, **patience) as head:
        command = Command(
            tmp_path, "init", demo_trainrun, "--output-dir", out, "--address", "127.0.0.1:9701",
            **head.environment, **SLOWLY,
        )  # fmt: skip
        killed = []

        def kill() -> bool:
            if "waiting for workers" not in next(tmp_path.glob("stderr_*")).read_text():
                return False
            started = psutil.Process(head.nodes[0].process.pid)
            started.suspend()  # it would end the raylet with the head
            for process in started.children(recursive=True):
                if process.name() == name:
                    process.kill()
                    killed.append(process.pid)
            return True

        code, said, _ = command.run(until=kill)
    assert killed
    assert code == 4, said
    assert reason in said.splitlines()[-1]
    assert ending(out) == ("failed", 4)


NOHUP = """
import os, signal
from cuvis_dist.stopping import terminable
with terminable():
    os.kill(os.getpid(), signal.SIGHUP)
print("goes on")
"""


def test_nohup_is_heeded():
    ignoring = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    done = subprocess.run(
        [sys.executable, "-c", NOHUP], capture_output=True, text=True, preexec_fn=ignoring
    )
    assert done.stdout == "goes on\n", done


def test_a_closed_terminal_interrupts(demo_trainrun, tmp_path):
    out = tmp_path / "out"
    command = Command(tmp_path, "run", demo_trainrun, "--output-dir", out, **SLOWLY)
    terminal, its = os.openpty()

    def own_terminal() -> None:
        os.setsid()
        fcntl.ioctl(its, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        command.arguments, env=command.environment, stdin=its, stdout=its, stderr=its,
        preexec_fn=own_terminal,
    )  # fmt: skip
    os.close(its)
    said = b""
    while b"fitting" not in said and b"frames" not in said:
        said += os.read(terminal, 4096)
    os.close(terminal)
    assert process.wait(60) == 130
    assert ending(out) == ("interrupted", 130)


@pytest.mark.parametrize(
    ("until", "workers"),
    [
        ("waiting for the first of", ("--workers", 1)),
        pytest.param("epoch 1/", ("--workers", 0, "--train-workers", 1), marks=pytest.mark.long),
    ],
)
def test_a_second_ctrl_c_ends_it_at_once(demo_trainrun, tmp_path, until, workers):
    out = tmp_path / "out"
    command = Command(tmp_path, "run", demo_trainrun, "--output-dir", out, *workers, **SLOWLY)
    first = []

    def press() -> bool:
        """Press once, and half a second later again and again."""
        if not first and until in next(tmp_path.glob("stderr_*")).read_text():
            command.process.send_signal(signal.SIGINT)
            first.append(time.monotonic())
        if first and time.monotonic() - first[0] > 0.7:
            command.process.send_signal(signal.SIGINT)
        return False

    code, said, _ = command.run(until=press)
    assert code == 130, said
    assert time.monotonic() - first[0] < 5
    assert "Traceback" not in said
    assert ending(out) == ("interrupted", 130)


def test_a_run_that_was_killed_is_shown_as_interrupted(demo_trainrun, tmp_path, capsys):
    out = tmp_path / "out"
    command = Command(tmp_path, "run", demo_trainrun, "--output-dir", out, **SLOWLY)
    shown = ["info", str(demo_trainrun), "--output-dir", str(out)]
    during = []

    def look() -> bool:
        if not (out / "run.json").exists():
            return False
        assert main(shown) == 0
        during.append(capsys.readouterr().out)
        return True

    code, said, _ = command.run(until=look, number=signal.SIGKILL)
    assert code == -signal.SIGKILL, said
    assert record(out)["status"] == "running"
    assert f"running since {record(out)['started']}, process {command.process.pid}" in during[0]
    assert main(shown) == 0
    assert "last     run, interrupted since" in capsys.readouterr().out
