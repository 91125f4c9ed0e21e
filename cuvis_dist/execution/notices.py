"""How does the driver hear at once of what a worker would warn of, while its task goes on?

Through the key-value store of the cluster's head, by the driver's job: workers' logs are not shown.
"""

from __future__ import annotations

import socket
import threading
import time
import uuid
from contextlib import suppress

import ray
from loguru import logger
from ray.experimental.internal_kv import (
    _internal_kv_del,
    _internal_kv_get,
    _internal_kv_list,
    _internal_kv_put,
)

_SECONDS = 2.0


def notice(message: str) -> None:
    """Warn, on the terminal of the driver, and say on which node this happens."""
    if not ray.is_initialized() or _is_driver():
        logger.warning(f"{message} (on {socket.gethostname()})")
        return
    with suppress(Exception):  # it is only a warning
        text = f"{message} (on node {ray.util.get_node_ip_address()})"
        _internal_kv_put(f"{_prefix()}{uuid.uuid4().hex}", text.encode())


def listen() -> None:
    """Log what the workers of this driver have to say, as long as it is connected."""
    threading.Thread(
        target=_log_notices, args=(_prefix(),), name="cuvis-dist-notices", daemon=True
    ).start()


def _is_driver() -> bool:
    return ray._private.worker.global_worker.mode == ray.SCRIPT_MODE


def _prefix() -> str:
    return f"cuvis-dist-notice-{ray.get_runtime_context().get_job_id()}-"


def _log_notices(prefix: str) -> None:
    with suppress(Exception):  # Ray was left
        while ray.is_initialized() and _prefix() == prefix:
            for key in _internal_kv_list(prefix):
                if text := _internal_kv_get(key):
                    logger.warning(text.decode())
                _internal_kv_del(key)
            time.sleep(_SECONDS)
