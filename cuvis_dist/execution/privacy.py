"""Who can reach the Ray cluster that a run starts? This user's processes on this machine."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loguru import logger
from ray._private import ray_constants
from ray._raylet import (  # type: ignore[attr-defined]
    AuthenticationMode,
    AuthenticationTokenLoader,
    Config,
    get_authentication_mode,
)

LOOPBACK = "127.0.0.1"
#: What says which token a process of Ray uses: the token, or the file that it is in.
_TOKEN, _TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


@contextmanager
def private_cluster() -> Iterator[dict[str, Any]]:
    """Yield the options with which ``ray.init`` starts a cluster on loopback, with its own token.

    The processes that Ray starts inside the block inherit its variables. Afterwards they are gone
    from this process, so that it can join another cluster with the token of that one. Without
    a token in the variables Ray would write one to a file that others can read.
    """
    variables = {
        # Ray's name for: this machine alone. Else it takes another address than loopback.
        ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0",
        _TOKEN: os.environ.get(_TOKEN, ""),
        # Only Ray sets it, for good, and would then ask for a token wherever it is to join.
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", ""),
    }
    if not variables[_TOKEN] and not os.environ.get(_TOKEN_PATH):
        variables[_TOKEN] = secrets.token_hex(32)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # the ranks of training
        variables[name] = os.environ.get(name) or _loopback_interface()
    before = {name: os.environ.get(name) for name in variables}
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update({name: value for name, value in variables.items() if value})
    ray_constants.ENABLE_RAY_CLUSTER = False  # Ray reads the variable when it is imported
    try:
        forget_token()
        yield {"_node_ip_address": LOOPBACK}
        warn_of_readable_token()
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def forget_token() -> None:
    """Let Ray look anew for the token, and for whether one is asked for: it remembers both."""
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def warn_of_readable_token() -> None:
    """Warn when the cluster's token is from a file that other users of this machine can read."""
    if os.environ.get(_TOKEN) or get_authentication_mode() != AuthenticationMode.TOKEN:
        return
    path = Path(os.environ.get(_TOKEN_PATH) or Path.home() / ".ray" / "auth_token").expanduser()
    try:
        mode = path.stat().st_mode
    except OSError:
        return
    if mode & 0o077:
        logger.warning(
            f"the token of the Ray cluster is in {path}, which other users of this machine can "
            f"read (mode {mode & 0o777:04o}): whoever has it runs code as you. chmod 600 {path}, "
            "and replace the token where others use this machine"
        )


def _loopback_interface() -> str:
    """Return what the network interface of loopback is called here."""
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")
