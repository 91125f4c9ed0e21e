"""How does a step of one rank become its share of the step of a single process?

Different from upstream's trainer are only the frames that nodes see and the reductions: a rank's
mean counts by its share of the frames, a joint node runs on those of all ranks
(:mod:`~cuvis_dist.training.joint`), a logged value is the one of all frames, and a pooled metric is
merged before it is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from cuvis_ai_core.training import GradientTrainer as UpstreamGradientTrainer
from cuvis_ai_core.training.evaluation import batch_frames
from cuvis_ai_core.training.post_fit import PostFitCallback
from cuvis_ai_schemas.enums import ExecutionStage
from torch.optim import Optimizer
from torchmetrics import Metric

from cuvis_dist.errors import InputError
from cuvis_dist.nodes.survey import NodePlan
from cuvis_dist.training.agreement import agree_on_order, agree_on_training
from cuvis_dist.training.assignment import TrainerParts
from cuvis_dist.training.checkpoint import LastState
from cuvis_dist.training.dealing import DealtBatches
from cuvis_dist.training.gathering import Cut
from cuvis_dist.training.heartbeat import Heartbeat
from cuvis_dist.training.joint import JointStep
from cuvis_dist.training.lightning import RankConfig
from cuvis_dist.training.loaders import DealtDataModule
from cuvis_dist.training.logged import reduce_as_asked
from cuvis_dist.training.reporting import EpochEvents, StepMonitor
from cuvis_dist.training.watch import COMPUTING, GATHERING


class RankTrainer(UpstreamGradientTrainer):
    """Upstream's gradient trainer as one of several.

    Parameters
    ----------
    parts : TrainerParts
        Nodes, monitors and callbacks.
    datamodule : DealtDataModule
        The loaders of this rank.
    config : RankConfig
        The training configuration of this rank.
    heartbeat : Heartbeat
        It tells the watch what the rank is doing.
    last : LastState, optional
        It keeps the state of a fit, and takes it up again.
    events : EpochEvents, optional
        It reports epochs; on rank 0 alone.
    """

    def __init__(
        self,
        parts: TrainerParts,
        datamodule: DealtDataModule,
        config: RankConfig,
        heartbeat: Heartbeat,
        *,
        last: LastState | None = None,
        events: EpochEvents | None = None,
    ) -> None:
        named = {node.name: node for node in parts.pipeline.nodes()}
        super().__init__(
            parts.pipeline,
            datamodule,
            [named[name] for name in parts.loss_nodes],
            [named[name] for name in parts.metric_nodes],
            config,
            callbacks=parts.callbacks,
        )
        self.heartbeat, self.last, self.events = heartbeat, last, events
        #: How each node runs in a training step, once the ranks have agreed.
        self.plans: dict[str, NodePlan] = {}
        self._joint = JointStep(parts.pipeline, self.plans)
        if parts.monitors:  # every rank reduces for them
            told = parts.monitors if datamodule.rank == 0 else []
            self.monitors = [StepMonitor(self._of_all_frames, told)]
        #: Which parameters were to be trained when DDP was told of them.
        self._trained: frozenset[str] = frozenset()
        #: The weight of this rank's values: in evaluation, its batch's share in the split.
        self._share = 1.0
        #: What a training step logs, until its gradients have met.
        self._to_log: list[tuple[str, torch.Tensor, dict[str, Any]]] | None = None

    def fit(self) -> None:
        """Train, after the ranks have agreed on how each node sees the frames of a step."""
        data = self.datamodule
        if data.world_size > 1:
            with self.heartbeat.doing("agreeing on the nodes"):
                self.plans = agree_on_training(
                    self.pipeline, self.loss_nodes, partial(data.head, "train"), self._cut(1)
                )
            waiting = partial(self.heartbeat.doing, GATHERING)
            self._joint = JointStep(self.pipeline, self.plans, waiting)
        self._agree_on_order(ExecutionStage.VAL)
        super().fit()

    def validate(self, ckpt_path: str | None = None) -> Sequence[Mapping[str, float]]:
        """Evaluate the validation split; every rank runs all of it where its order matters."""
        self._agree_on_order(ExecutionStage.VAL)
        self.trainer = self._build_trainer()  # else upstream warns, which only the driver can
        return super().validate(ckpt_path)

    def test(self, ckpt_path: str | None = "best") -> Sequence[Mapping[str, float]]:
        """Evaluate the test split; every rank runs all of it where its order matters."""
        self._agree_on_order(ExecutionStage.TEST)
        self.trainer = self._build_trainer()
        return super().test(ckpt_path)

    def _agree_on_order(self, stage: ExecutionStage) -> None:
        data, split = self.datamodule, stage.value
        if data.world_size == 1:
            return
        with self.heartbeat.doing("agreeing on the nodes"):
            names = agree_on_order(self.pipeline, stage, partial(data.head, split), self._cut(1))
        if names:
            data.in_order.add(split)
            data.notes.append(
                f"every worker runs all batches of the {split} split, in order: each of them "
                f"changes {', '.join(names)}"
            )

    def _cut(self, frames: int, order: tuple[int, ...] | None = None) -> Cut:
        return Cut.of(frames, self.datamodule.rank, self.datamodule.world_size, order=order)

    def _build_trainer(self) -> pl.Trainer:
        """Build upstream's trainer, less the post-fit steps, which follow on all workers."""
        trainer = super()._build_trainer()
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, PostFitCallback)]
        if self.last is not None:
            self.last.attach_to(trainer)
        if self.events is not None:
            trainer.callbacks.append(self.events)
        return trainer

    @property
    def _dealt(self) -> DealtBatches:
        """The batches of the loader that is being iterated."""
        trainer = self.trainer
        loader: Any = trainer.train_dataloader
        if trainer.validating or trainer.sanity_checking or trainer.evaluating:
            loader = trainer.val_dataloaders
        if trainer.testing:
            loader = trainer.test_dataloaders
        return loader.batch_sampler

    # ---- parameters ----------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer | dict:
        """Return upstream's optimizer and scheduler, which Lightning asks for as it sets up DDP."""
        self._trained = self._unfrozen()
        return super().configure_optimizers()

    def on_train_epoch_start(self) -> None:
        """Refuse to train what DDP does not know of; callbacks have been at it by now.

        Raises
        ------
        InputError
            If a callback has unfrozen parameters since: each rank would train its own.
        """
        super().on_train_epoch_start()
        new = self._unfrozen() - self._trained
        if new and self.datamodule.world_size > 1:
            raise InputError(
                f"{', '.join(sorted(new))} became trainable after training had begun on "
                f"{self.datamodule.world_size} workers, which would not train it together: leave "
                "it unfrozen from the start, or train by one worker (--train-workers 0)"
            )

    def _unfrozen(self) -> frozenset[str]:
        return frozenset(
            f"{node.name}.{name}"
            for node in self.pipeline.nodes()
            for name, parameter in node.named_parameters()
            if parameter.requires_grad
        )

    # ---- steps ---------------------------------------------------------------------------

    def _run_step(self, batch: Any, batch_idx: int, **kwargs: Any) -> torch.Tensor:
        """Run upstream's step with this rank's share of the loss and of what is logged.

        Parameters
        ----------
        batch : dict
            This rank's part of a global batch in training, else a whole batch.
        batch_idx : int
            Position of the batch in the epoch.
        **kwargs
            As upstream's.

        Returns
        -------
        torch.Tensor
            Shape ``[]``. In training a loss whose mean over the ranks is that of the global
            batch (:mod:`~cuvis_dist.training.gathering`), and so with the gradients; else that
            of the batch.
        """
        dealt = self._dealt
        weight, whole = dealt.weights[batch_idx], dealt.whole
        self._share = weight * batch_frames(batch) / dealt.frames if whole else 1.0
        self._to_log = None if whole else []
        cut = self._cut(dealt.sizes[batch_idx], dealt.orders[batch_idx])
        joint = nullcontext() if whole else self._joint.of(cut)
        pooled = [m for m in self.pipeline_modules.modules() if isinstance(m, Metric)]
        with _not_synchronized(pooled), self.heartbeat.doing(COMPUTING), joint:
            loss = super()._run_step(batch, batch_idx, **kwargs)
        if whole and not weight:  # the batch is another rank's, and only keeps this one in step
            for metric in pooled:
                metric.reset()
        return loss

    # ---- values --------------------------------------------------------------------------

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        """Log the value of all workers' frames.

        In a training step the mean over workers is the value of the global batch. In evaluation
        the shares of all batches of the split add up to 1. A torchmetrics object synchronizes its
        own states when Lightning computes it at the end.
        """
        if self._to_log is not None and not isinstance(value, Metric):
            share = torch.as_tensor(value, device=self.device).detach() * self._share
            self._to_log.append((name, share, kwargs))
            return
        with self.heartbeat.doing("logging"):  # the others may be waited for here
            if isinstance(value, Metric):
                super().log(name, value, **kwargs)
            elif self.trainer.training:  # by a callback, between two steps
                self._log_together(name, value, {"sync_dist": True} | kwargs)
            else:
                share = torch.as_tensor(value, device=self.device) * self._share
                super().log(name, share, sync_dist=True, reduce_fx=torch.sum, **kwargs)

    def on_after_backward(self) -> None:
        """Reduce what the step logged, all at once: its gradients have just met, too.

        With it goes the wish of rank 0 to save the state, so that all ranks do at the same step.
        """
        super().on_after_backward()
        logged, self._to_log = self._to_log or [], None
        shares = [share.double().flatten()[0] for _, share, _ in logged]
        if self.last is not None:
            shares.append(torch.as_tensor(self.last.wish, dtype=torch.double, device=self.device))
        if not shares:
            return
        with self.heartbeat.doing("logging"):
            values = self.trainer.strategy.reduce(torch.stack(shares), reduce_op="mean")
        for (name, _, options), value in zip(logged, values, strict=False):
            self._log_together(name, value, options)
        if self.last is not None:
            self.last.agreed = values[-1]

    def _log_together(self, name: str, value: Any, options: dict[str, Any]) -> None:
        """Log a value, which counts in an epoch's mean by the frames of the global batch."""
        trainer = self.trainer
        key, sync_dist = f"{self._current_fx_name}.{name}", options.get("sync_dist", False)
        reduce_as_asked(trainer, key, sync_dist)
        loop = trainer.fit_loop.epoch_loop
        frames = 1 if loop._results.batch is None else self._dealt.sizes[loop.batch_idx]
        super().log(name, value, **{"batch_size": frames} | options)

    def _of_all_frames(self, value: torch.Tensor) -> torch.Tensor:
        """Return a training step's value over all of its frames; other values as they are."""
        if not self.trainer.training:
            return value
        with self.heartbeat.doing("logging"):
            return self.trainer.strategy.reduce(value.detach() * self._share, reduce_op="mean")


@contextmanager
def _not_synchronized(pooled: Sequence[Metric]) -> Iterator[None]:
    """Keep metrics from exchanging their states inside the block.

    A node may compute a pooled metric within a step (a running value for its port), and ranks
    have unlike numbers of steps: those that wait there would wait for ever.
    """
    available = [metric.distributed_available_fn for metric in pooled]
    for metric in pooled:
        metric.compute_with_cache = False
        metric.distributed_available_fn = _not_now
    try:
        yield
    finally:
        for metric, function in zip(pooled, available, strict=True):
            metric.distributed_available_fn = function


def _not_now() -> bool:
    return False
