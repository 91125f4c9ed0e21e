"""How does a test get a cluster of its own, with token authentication, on loopback?

A head node with a dashboard, and further nodes that join, and that can be killed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
#: A lost node is noticed after two seconds and not thirty.
QUICK_HEALTH_CHECKS = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "2",
}


class Node:
    """``ray start --block`` in a process group of its own, to end as one."""

    def __init__(self, log: Path, environment: dict[str, str], *options: str) -> None:
        command = [
            str(BIN / "ray"), "start", "--block", "--object-store-memory=200000000", *options,
        ]  # fmt: skip
        self.log = log
        with open(log, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def kill(self) -> None:
        """End all of its processes at once, as a power cut would."""
        if self.process.poll() is None:
            started = psutil.Process(self.process.pid)
            for process in [started, *started.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
        self.process.wait()


class Cluster:
    """A running head, to which nodes may be added.

    Attributes
    ----------
    address : str
        Where the dashboard takes jobs.
    environment : dict
        The variables of a process that may use the cluster.
    nodes : list of Node
        The head, and those that joined.
    """

    def __init__(self, folder: Path, port: int, environment: dict[str, str], cpus: int) -> None:
        self.folder, self.port, self.environment = folder, port, environment
        self.address = f"http://127.0.0.1:{port}"
        self.nodes: list[Node] = []
        head = Node(
            folder / "head.log", environment, "--head", f"--dashboard-port={port}",
            f"--port={port + 1}", f"--ray-client-server-port={port + 5}",
            "--dashboard-host=127.0.0.1", f"--num-cpus={cpus}", *self._place(),
        )  # fmt: skip
        self.nodes.append(head)

    def _place(self) -> list[str]:
        """Return what the next node must have of its own, as if it were another machine."""
        first = self.port + 6 + 4 * len(self.nodes)
        return [
            f"--node-ip-address=127.0.0.{len(self.nodes) + 1}",
            f"--temp-dir={self.environment['RAY_TMPDIR']}/{len(self.nodes)}",
            f"--dashboard-agent-listen-port={first}",
            f"--metrics-export-port={first + 1}",
            f"--runtime-env-agent-port={first + 2}",
        ]

    def join(self, cpus: int = 1, **environment: str) -> Node:
        """Start a node; :meth:`wait` until it has joined."""
        node = Node(
            self.folder / f"node_{len(self.nodes)}.log", self.environment | environment,
            f"--address=127.0.0.1:{self.port + 1}", f"--num-cpus={cpus}", *self._place(),
        )  # fmt: skip
        self.nodes.append(node)
        return node

    def wait(self) -> None:
        """Wait until every node has joined."""
        for node in self.nodes:
            _wait_until(lambda node=node: "runtime started" in node.log.read_text(), node)


@contextlib.contextmanager
def cluster(
    folder: Path, port: int, cpus: int = 0, nodes: int = 0, **environment: str
) -> Iterator[Cluster]:
    """Start a head and ``nodes`` nodes of one CPU each, and end all of their processes.

    Parameters
    ----------
    folder : Path
        Where the token and the logs are written.
    port : int
        The port of the dashboard; the cluster takes up to 30 from there, which must lie outside
        Ray's worker ports (10002 to 19999).
    cpus : int
        How many CPUs the head has.
    environment : str
        Variables that every process of the cluster gets.
    """
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp") as ray_tmpdir:  # sockets: short
        may_use = {
            **os.environ,
            **QUICK_HEALTH_CHECKS,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": ray_tmpdir,
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # a job's python is the cluster's
            **environment,
        }
        started = Cluster(folder, port, may_use, cpus)
        try:
            _wait_until(lambda: _answers(started.address), started.nodes[0])
            for _ in range(nodes):
                started.join()
            started.wait()
            yield started
        finally:
            for node in reversed(started.nodes):
                node.kill()


@contextlib.contextmanager
def head_node(folder: Path, port: int, cpus: int = 3) -> Iterator[tuple[str, dict[str, str]]]:
    """Start a :func:`cluster` of one node; yields its address and environment."""
    with cluster(folder, port, cpus) as head:
        yield head.address, head.environment


def _wait_until(happened, node: Node) -> None:
    for _ in range(240):
        assert node.process.poll() is None, f"a node ended: {node.log.read_text()}"
        if happened():
            return
        time.sleep(0.25)
    raise AssertionError(f"a node does not come up: see {node.log}")


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
    except urllib.error.HTTPError:
        return True  # it answers, and refuses who has no token
    except OSError:
        return False
    return True
