"""What does a rank add to upstream's configuration of a Lightning trainer?"""

from __future__ import annotations

from typing import Any

from cuvis_ai_core.training.config import TrainingConfig
from pydantic import PrivateAttr
from pytorch_lightning.profilers import Profiler

from cuvis_dist.training.assignment import Seat


class RankConfig(TrainingConfig):
    """A run's training configuration, with what a rank adds to ``pl.Trainer``.

    Upstream builds its trainer from ``to_lightning_kwargs``, which has no strategy; adding it
    here leaves upstream's ``_build_trainer`` as it is.
    """

    _extra: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def of(
        cls, config: TrainingConfig, seat: Seat, on_gpu: bool, log_dir: str, profiler: Profiler
    ) -> RankConfig:
        """Return ``config`` for one rank; ``log_dir`` is used where it names no root."""
        rank_config = cls.model_validate(config.model_dump())
        rank_config._extra = {
            "accelerator": "gpu" if on_gpu else "cpu",
            "devices": "auto",
            "profiler": profiler,
            "use_distributed_sampler": False,  # frames are dealt by training/dealing.py
            "default_root_dir": config.default_root_dir or log_dir,
            **seat.lightning,
        }
        if seat.rank != 0:
            rank_config._extra["enable_progress_bar"] = False
        return rank_config

    def to_lightning_kwargs(self) -> dict[str, Any]:
        """Return upstream's keywords and this worker's; batches are limited when dealt."""
        kwargs = super().to_lightning_kwargs() | self._extra
        for name in ("limit_train_batches", "limit_val_batches"):
            if kwargs.get(name):  # by 0 Lightning knows that nothing is validated
                del kwargs[name]
        return kwargs
