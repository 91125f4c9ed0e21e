"""How does a Lightning trainer run inside a Ray Train worker?

On ``pytorch_lightning`` alone, the package that upstream's module is made of:
``ray.train.lightning`` prefers the package ``lightning`` when both are installed, and its
strategy is then refused.
"""

from __future__ import annotations

from typing import Any

import ray.train
import ray.train.torch
import torch
from cuvis_ai_core.training.config import TrainingConfig
from pydantic import PrivateAttr
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.profilers import Profiler
from pytorch_lightning.strategies import DDPStrategy


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


class RankConfig(TrainingConfig):
    """A run's training configuration, with what a Ray worker adds to ``pl.Trainer``.

    Upstream builds its trainer from ``to_lightning_kwargs``, which has no strategy; adding it
    here leaves upstream's ``_build_trainer`` as it is.
    """

    _extra: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(
        cls, config: TrainingConfig, on_gpu: bool, log_dir: str, profiler: Profiler
    ) -> RankConfig:
        """Return ``config`` for one worker; ``log_dir`` is used where it names no root."""
        rank_config = cls.model_validate(config.model_dump())
        rank_config._extra = {
            "accelerator": "gpu" if on_gpu else "cpu",
            "devices": "auto",
            # A node may hold parameters that a forward does not use: RXGlobal's covariance
            # beside its cached inverse. DDP would wait for their gradients.
            "strategy": RayDDPStrategy(find_unused_parameters=True),
            "plugins": [RayEnvironment()],
            "profiler": profiler,
            "use_distributed_sampler": False,  # frames are dealt by training/dealing.py
            "default_root_dir": config.default_root_dir or log_dir,
        }
        if ray.train.get_context().get_world_rank() != 0:
            rank_config._extra["enable_progress_bar"] = False
        return rank_config

    def to_lightning_kwargs(self) -> dict[str, Any]:
        """Return upstream's keywords and this worker's; batches are limited when dealt."""
        kwargs = super().to_lightning_kwargs() | self._extra
        for name in ("limit_train_batches", "limit_val_batches"):
            kwargs.pop(name, None)
        return kwargs
