"""Is the Ray cluster of this process still there? A thread looks all the time.

Ray ends a driver that has lost its cluster, from C++ and with exit code 1, up to a minute later.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from cuvis_dist.errors import ClusterError
from cuvis_dist.stopping import end_now, is_command

#: Seconds between two looks; soon Ray prints the last lines of its raylet's log.
_SECONDS, _JOINED_SECONDS = 0.1, 1.0
#: Ray's setting: seconds after which a driver that does not reach its head is ended.
_RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
#: What part of the time after which Ray gives a head up, a minute, a joined one may not answer.
_PATIENCE = 0.75


@contextmanager
def watched_cluster() -> Iterator[None]:
    """End the command when the cluster that this process is connected to goes away in the block.

    Where there is no command, but somebody's Python, Ray does what it does.
    """
    over = threading.Event()
    node = ray._private.worker._global_node
    if is_command() and node is not None:
        arguments = node, over
        threading.Thread(target=_watch, args=arguments, name="cuvis-dist-ray", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _watch(node: Any, over: threading.Event) -> None:
    patience = _PATIENCE * float(os.environ.get(_RECONNECT, 60))
    answered, own = time.monotonic(), "raylet" in node.all_processes
    while not over.wait(_SECONDS if own else _JOINED_SECONDS):
        reason = _ended(node) if own else None
        if not own and not _listens(node.raylet_socket_name):
            reason = "the raylet of this machine was ended"
        elif own or _answers(node.gcs_address):
            answered = time.monotonic()
        elif time.monotonic() - answered > patience:
            reason = f"its head at {node.gcs_address} has not answered for {patience:.0f} s"
        if reason and not over.is_set():
            end_now(
                "failed",
                ClusterError.exit_code,
                f"the Ray cluster was lost: {reason}. What is done is kept: the same command goes "
                "on, on a cluster that is there",
            )


def _ended(node: Any) -> str | None:
    """Return which process of a cluster that was started here has ended, if one has."""
    for name in ("gcs_server", "raylet"):
        for info in node.all_processes.get(name, []):
            if info.process.poll() is not None:
                return f"its {name}, process {info.process.pid} of this machine, was ended"
    return None


def _listens(path: str) -> bool:
    """Whether somebody on this machine has a Unix socket at a path, as far as the system tells."""
    try:
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as sockets:
            return any(line.rstrip("\n").endswith(f" {path}") for line in sockets)
    except OSError:
        return True


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_JOINED_SECONDS).close()
    except OSError:
        return False
    return True
