"""How does a test get a head node of its own, with token authentication and a dashboard?"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

BIN = Path(sys.executable).parent


@contextlib.contextmanager
def head_node(folder: Path, port: int, cpus: int = 3) -> Iterator[tuple[str, dict[str, str]]]:
    """Start ``ray start --head`` on loopback and end all of its processes.

    Parameters
    ----------
    folder : Path
        For the token and the log.
    port : int
        The dashboard's; the head takes ``port`` to ``port + 5``, which must lie outside Ray's
        worker ports (10002 to 19999).

    Yields
    ------
    tuple of str and dict
        The dashboard's address, and the environment of a process that may use the cluster.
    """
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp") as ray_tmpdir:  # sockets: short
        environment = {
            **os.environ,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": ray_tmpdir,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # a job's python is the cluster's
        }
        command = [
            BIN / "ray", "start", "--head", "--block", f"--dashboard-port={port}",
            f"--port={port + 1}", f"--dashboard-agent-listen-port={port + 2}",
            f"--metrics-export-port={port + 3}", f"--runtime-env-agent-port={port + 4}",
            f"--ray-client-server-port={port + 5}", "--dashboard-host=127.0.0.1",
            "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}",
            "--object-store-memory=200000000",
        ]  # fmt: skip
        with open(folder / "head.log", "w", encoding="utf-8") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,  # a process group of its own, to end as one
            )
            try:
                address = f"http://127.0.0.1:{port}"
                _wait_until_it_answers(address, process)
                yield address, environment
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(15)
                    os.killpg(process.pid, signal.SIGKILL)  # what did not listen
                process.wait()


def _wait_until_it_answers(address: str, process: subprocess.Popen) -> None:
    for _ in range(120):
        assert process.poll() is None, "the head node ended: see head.log"
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
        except urllib.error.HTTPError:
            return  # it answers, and refuses who has no token
        except OSError:
            time.sleep(0.5)
        else:
            return
    raise AssertionError("the head node does not answer: see head.log")
