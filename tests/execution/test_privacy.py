"""What a run on one machine opens, and to whom: real sockets of a real run, on a fresh account."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from commands import Command

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def listening(pid: int) -> dict[int, tuple[str, str]]:
    """Return who listens where, by port, among a process and all that it started."""
    found = {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found[connection.laddr.port] = connection.laddr.ip, process.name()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_a_run_opens_nothing_but_loopback_and_writes_no_token(demo_trainrun, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    command = Command(
        tmp_path, "run", demo_trainrun, "--output-dir", tmp_path / "out",
        "--workers", 1, "--train-workers", 2, HOME=str(home), RAY_TMPDIR="/tmp",
    )  # fmt: skip
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        command.environment.pop(name, None)
    sockets: dict[int, tuple[str, str]] = {}
    modes = set()

    def looked() -> bool:
        if "epoch 1/" not in next(tmp_path.glob("stderr_*")).read_text():
            return False
        sockets.update(listening(command.process.pid))
        for process in psutil.Process(command.process.pid).children(recursive=True):
            if process.name() in ("gcs_server", "raylet"):
                environment = process.environ()
                modes.add((environment["RAY_AUTH_MODE"], bool(environment.get("RAY_AUTH_TOKEN"))))
        return True

    _, said, _ = command.run(until=looked, number=signal.SIGKILL)
    names = {name for _, name in sockets.values()}
    assert {"gcs_server", "raylet"} <= names, said
    assert len(sockets) > 10, "training workers have sockets, too"
    open_to_others = {
        port: where
        for port, where in sockets.items()
        if where[0].removeprefix("::ffff:") != "127.0.0.1"
    }
    assert not open_to_others
    assert modes == {("token", True)}
    assert not (home / ".ray").exists()


WARNING = """
import os, sys
from loguru import logger
logger.remove(); logger.add(sys.stdout, format="{message}")
from cuvis_dist.execution.privacy import warn_of_readable_token
for mode in 0o600, 0o640, 0o604:
    os.chmod(os.environ["RAY_AUTH_TOKEN_PATH"], mode)
    warn_of_readable_token()
"""


def test_a_token_that_others_can_read_is_warned_of(tmp_path):
    token = tmp_path / "token"
    token.touch()
    environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    said = subprocess.run(
        [sys.executable, "-c", WARNING], env=os.environ | environment, text=True,
        capture_output=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert len(said) == 2
    for line, mode in zip(said, ("0640", "0604"), strict=True):
        assert str(token) in line
        assert mode in line


def test_the_last_cluster_of_this_machine_is_not_joined():
    """Ray would join the one that `ray start` has noted, also after that was killed."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as folder:  # sockets: a short path
        noted = Path(folder, "ray", "ray_current_cluster")
        noted.parent.mkdir()
        noted.write_text("192.0.2.2:6399")
        code = (
            "import ray; from cuvis_dist import Scaling\n"
            "from cuvis_dist.execution.session import connect\n"
            "connect(Scaling(resources={'workers': 1}))\n"
            "print(ray.get_runtime_context().gcs_address)"
        )
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment["RAY_TMPDIR"] = folder
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert "127.0.0.1:" in done.stdout
