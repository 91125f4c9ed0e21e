"""How do the Lightning trainers of Ray Train workers find each other?

On ``pytorch_lightning`` alone, the package that upstream's module is made of:
``ray.train.lightning`` prefers the package ``lightning`` when both are installed, and its
strategy is then refused.
"""

from __future__ import annotations

from typing import Any

import ray.train
import ray.train.torch
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.strategies import DDPStrategy


def lightning_keywords() -> dict[str, Any]:
    """Return what a worker of Ray Train tells ``pl.Trainer``."""
    return {
        # A node may hold parameters that a forward does not use: RXGlobal's covariance
        # beside its cached inverse. DDP would wait for their gradients.
        "strategy": RayDDPStrategy(find_unused_parameters=True),
        "plugins": [RayEnvironment()],
    }


class RayDDPStrategy(DDPStrategy):
    """Trains with DDP on the device that Ray gave this worker."""

    @property
    def root_device(self) -> torch.device:
        """The device of this worker."""
        return ray.train.torch.get_device()

    @root_device.setter
    def root_device(self, device: torch.device) -> None:
        """Do nothing: Ray decides."""


class RayEnvironment(LightningEnvironment):
    """Tells Lightning ranks and world size as Ray Train set them up."""

    @property
    def creates_processes_externally(self) -> bool:
        """Whether somebody else starts the processes: Ray has."""
        return True

    def world_size(self) -> int:
        """Return the number of workers."""
        return ray.train.get_context().get_world_size()

    def global_rank(self) -> int:
        """Return this worker's rank."""
        return ray.train.get_context().get_world_rank()

    def local_rank(self) -> int:
        """Return this worker's rank on its node."""
        return ray.train.get_context().get_local_rank()

    def node_rank(self) -> int:
        """Return the rank of this worker's node."""
        return ray.train.get_context().get_node_rank()

    def set_world_size(self, size: int) -> None:
        """Do nothing: Ray decides."""

    def set_global_rank(self, rank: int) -> None:
        """Do nothing: Ray decides."""

    def teardown(self) -> None:
        """Leave the environment to Ray."""
