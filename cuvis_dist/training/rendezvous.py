"""Where do the ranks of a group find each other? At one address of rank 0's node.

Ray Train's own store listens on all addresses of that node, and asks nobody who he is.
"""

from __future__ import annotations

import os
import socket
from datetime import timedelta
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import (
    _set_torch_distributed_env_vars,
    _setup_torch_process_group,
    _TorchBackend,
)
from torch.distributed import TCPStore

#: The store that this process serves, for as long as it lives.
_served: list[TCPStore] = []


class OneAddressConfig(TorchConfig):
    """Ray Train's configuration of a group, with a store at the address of rank 0's node alone."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        """What starts the group."""
        return _OneAddressBackend


class _OneAddressBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Start the group as Ray Train does, every rank a client of the store."""
        address, port = worker_group.execute_single(0, _serve, backend_config.timeout_s)
        worker_group.execute(_set_torch_distributed_env_vars)
        worker_group.execute(_name_store, address, port)
        started = [
            worker_group.execute_single_async(
                rank,
                _setup_torch_process_group,
                backend=backend_config.backend,
                world_rank=rank,
                world_size=len(worker_group),
                init_method="env://",
                timeout_s=backend_config.timeout_s,
            )
            for rank in range(len(worker_group))
        ]
        ray.get(started)


def _serve(timeout_s: int) -> tuple[str, int]:
    """Serve a store in this process; return its address and port."""
    address = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listening = socket.create_server((address, 0), family=family, backlog=socket.SOMAXCONN)
    port = listening.getsockname()[1]
    store = TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listening.detach(),
    )
    _served[:] = [store]
    return address, port


def _name_store(address: str, port: int) -> None:
    """Tell torch, in its own variables, that somebody serves a store already, and where."""
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(True)
