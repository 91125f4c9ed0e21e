"""What does one DDP worker do?

It runs upstream's gradient trainer on its part of every batch. Different from one process are
only the reductions: a logged value is the one of all frames, a pooled metric is merged before
it is computed, monitors write on rank 0, and the post-fit steps wait until the workers are gone.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import ray
import ray.train
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training import GradientTrainer as UpstreamGradientTrainer
from cuvis_ai_core.training.config import TrainingConfig
from cuvis_ai_core.training.evaluation import batch_frames
from cuvis_ai_core.training.post_fit import (
    CheckpointRestored,
    EmitFn,
    EpochProgress,
    EvaluationOutcome,
    EvaluationStatus,
    FrameProgress,
    PostFitCallback,
    TrainEvent,
    TrainHook,
)
from cuvis_ai_schemas.enums import ExecutionStage
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, Dataset
from torchmetrics import Metric

from cuvis_dist.archive import NamedFrames, open_split
from cuvis_dist.errors import InputError
from cuvis_dist.execution.worker import prepare_worker
from cuvis_dist.nodes.sinks import close_sinks, silence_sinks
from cuvis_dist.scaling import Scaling
from cuvis_dist.storage import Mirror, OutputFolder, writing_to
from cuvis_dist.training.checkpoint import LAST, LastEpoch, continued
from cuvis_dist.training.dealing import Batches, DealtBatches, deal, keeps_own_order
from cuvis_dist.training.heartbeat import Heartbeat
from cuvis_dist.training.ingest import CachedFrames, FrameCache, ReadAhead, make_cache
from cuvis_dist.training.lightning import RankConfig
from cuvis_dist.training.watch import COMPUTING, STARTING, STORING


@dataclass(frozen=True)
class Assignment:
    """Everything that a worker needs, as the driver had it.

    Attributes
    ----------
    verb : str
        ``fit``, ``validate`` or ``test``.
    checkpoint : str or None
        Lightning checkpoint to evaluate; a fit goes on from its own, if that is there.
    output : OutputFolder
        Where checkpoints and logs belong.
    watch : actor handle
        Of a :class:`~cuvis_dist.training.watch.Watch`.
    directory : str
        The driver's working directory, against which relative paths are meant.
    """

    verb: str
    pipeline: CuvisPipeline
    datamodule: pl.LightningDataModule
    loss_nodes: list[str]
    metric_nodes: list[str]
    training_config: TrainingConfig
    monitors: list[Any]
    callbacks: list[Callback]
    emit: EmitFn
    output: OutputFolder
    scaling: Scaling
    directory: str
    watch: Any
    checkpoint: str | None = None


@dataclass(frozen=True)
class Outcome:
    """What rank 0 brings back."""

    nodes: list[Node]
    checkpoint: CheckpointRestored | None = None
    epochs: int = 0
    metrics: Sequence[Mapping[str, float]] = ()
    callback_states: tuple[dict[str, Any], ...] = ()
    notes: tuple[str, ...] = ()


def run_rank(config: dict[str, Any]) -> Outcome | None:
    """Carry out the assignment on this worker; rank 0 returns the outcome."""
    job: Assignment = ray.get(config["assignment"])
    prepare_worker(int(job.scaling.resources.cpus_per_worker))
    if os.path.isdir(job.directory):
        os.chdir(job.directory)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    group = _agreed_name()
    ray.get(job.watch.begin.remote(group, world_size))
    on_gpu = job.scaling.resources.train_gpus > 0
    heartbeat = Heartbeat(job.watch, rank, group, job.scaling.resources.stall_seconds, on_gpu)
    if job.verb == "fit":  # also what an earlier group of this fit left, of more or fewer workers
        last = str(job.output.at(LAST)) if job.output.exists(LAST) else None
        job = replace(job, checkpoint=last)
    with Mirror(job.output, partial(heartbeat.doing, STORING)) as mirror, writing_to(mirror.root):
        return _carry_out(job, rank, heartbeat, mirror)


def _carry_out(job: Assignment, rank: int, heartbeat: Heartbeat, mirror: Mirror) -> Outcome | None:
    first, on_gpu = rank == 0, job.scaling.resources.train_gpus > 0
    named = {node.name: node for node in job.pipeline.nodes()}
    _bring_checkpoints(job, mirror, first)
    module = RankTrainer(
        job.pipeline,
        DealtDataModule(job, rank, ray.train.get_context().get_world_size(), heartbeat),
        [named[name] for name in job.loss_nodes],
        [named[name] for name in job.metric_nodes],
        RankConfig.of(job.training_config, on_gpu, str(mirror.root), heartbeat),
        callbacks=job.callbacks,
    )
    module.heartbeat = heartbeat
    if job.monitors:
        module.monitors = [StepMonitor(module, job.monitors if first else [])]
    if first:
        module.events = EpochEvents(job.emit)
    else:
        silence_sinks(job.pipeline)
    checkpoint, metrics = None, []
    with heartbeat, closing(module.datamodule):
        if job.verb == "fit":
            module.last = LastEpoch(mirror, job.pipeline)
            module.resume_from = mirror.to_local(job.checkpoint)
            module.fit()
        else:
            metrics = getattr(module, job.verb)(ckpt_path=mirror.to_local(job.checkpoint))
    if not first:
        return None
    if job.verb == "fit":
        checkpoint = module.load_best_checkpoint()
        checkpoint = replace(checkpoint, path=mirror.to_output(checkpoint.path))
        mirror.push()
    module.zero_grad(set_to_none=True)
    close_sinks(job.pipeline)
    job.pipeline.cpu()
    return Outcome(
        list(job.pipeline.nodes()),
        checkpoint,
        module.trainer.current_epoch,
        [dict(row) for row in metrics],
        # best scores are where they were computed, and the driver may have no GPU
        tuple(
            move_data_to_device(mirror.to_output(callback.state_dict()), "cpu")
            for callback in job.callbacks
        ),
        tuple(module.datamodule.notes),
    )


def _agreed_name() -> str:
    """Return a name that this group of workers has for itself, and no other group."""
    name = [uuid.uuid4().hex]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(name)
    return name[0]


def _bring_checkpoints(job: Assignment, mirror: Mirror, first: bool) -> None:
    """Have on this machine what the assignment reads, and let callbacks write here.

    Rank 0 needs the checkpoints of earlier fits, too: one of them may turn out to be the best.
    """
    if job.output.local is not None:
        return
    if job.checkpoint is not None and (name := job.output.name_of(job.checkpoint)) is not None:
        mirror.pull(name)
    training = job.training_config
    logs = OutputFolder(training.default_root_dir or job.output.location)
    folders = {str(logs.at("lightning_logs"))}
    training.default_root_dir = mirror.to_local(training.default_root_dir)
    if (config := job.training_config.callbacks) is not None and config.checkpoint is not None:
        folders.add(config.checkpoint.dirpath)
        config.checkpoint.dirpath = mirror.to_local(config.checkpoint.dirpath)
    for callback in job.callbacks:
        if isinstance(callback, ModelCheckpoint):
            folders.add(str(callback.dirpath))
            state = mirror.to_local(callback.state_dict())
            callback.dirpath = state["dirpath"]
            callback.load_state_dict(state)
    if first and job.verb == "fit":
        for folder in sorted(filter(None, map(job.output.name_of, folders))):
            mirror.pull_folder(folder, ".ckpt")


class RankTrainer(UpstreamGradientTrainer):
    """Upstream's gradient trainer as one of several."""

    heartbeat: Heartbeat
    events: Callback | None = None
    last: LastEpoch | None = None
    resume_from: str | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        #: What a training step logs, until its gradients have met.
        self._to_log: list[tuple[str, torch.Tensor, dict[str, Any]]] | None = None

    def _build_trainer(self) -> pl.Trainer:
        """Build upstream's trainer, less the post-fit steps, which follow on all workers."""
        trainer = super()._build_trainer()
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, PostFitCallback)]
        if self.last is not None:  # before the user's, which may change nodes at an epoch's start
            trainer.callbacks.insert(0, self.last)
        if self.events is not None:
            trainer.callbacks.append(self.events)
        if self.resume_from is not None:  # upstream's fit has no argument for it
            trainer.fit = partial(trainer.fit, ckpt_path=self.resume_from, weights_only=False)
            trainer.loggers = [continued(each, Path(self.resume_from)) for each in trainer.loggers]
        return trainer

    @property
    def _dealt(self) -> DealtBatches:
        """The batches of the loader that is being iterated."""
        trainer = self.trainer
        loader = trainer.train_dataloader
        if trainer.validating or trainer.sanity_checking or trainer.evaluating:
            loader = trainer.val_dataloaders
        if trainer.testing:
            loader = trainer.test_dataloaders
        return loader.batch_sampler

    def _run_step(self, batch: Any, batch_idx: int, **kwargs: Any) -> torch.Tensor:
        """Run upstream's step with this worker's share of the loss and of what is logged."""
        dealt = self._dealt
        weight = dealt.weights[batch_idx]
        whole = dealt.whole
        self._share = weight * batch_frames(batch) / dealt.frames if whole else weight
        self._to_log = None if whole else []
        # A node may compute a pooled metric within a step (a running value for its port):
        # workers have unlike numbers of steps, so nothing may be synchronized there.
        pooled = [m for m in self.pipeline_modules.modules() if isinstance(m, Metric)]
        available = [metric.distributed_available_fn for metric in pooled]
        for metric in pooled:
            metric.compute_with_cache = False
            metric.distributed_available_fn = _not_now
        try:
            with self.heartbeat.doing(COMPUTING):
                loss = super()._run_step(batch, batch_idx, **kwargs)
        finally:
            for metric, function in zip(pooled, available, strict=True):
                metric.distributed_available_fn = function
        if whole and not weight:
            for metric in pooled:
                metric.reset()
        return loss if whole else loss * weight

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        """Log the value of all workers' frames.

        In a training step the mean over workers of ``value · share`` is that of the global batch.
        In evaluation the shares of all batches of the split add up to 1. A torchmetrics object
        synchronizes its own states when Lightning computes it at the end.
        """
        if self._to_log is not None and not isinstance(value, Metric):
            share = torch.as_tensor(value, device=self.device).detach() * self._share
            self._to_log.append((name, share, kwargs))
            return
        with self.heartbeat.doing("logging"):  # the others may be waited for here
            if isinstance(value, Metric):
                super().log(name, value, **kwargs)
            elif self.trainer.training:  # by a callback, between two steps
                super().log(name, value, **{"sync_dist": True, **kwargs})
            else:
                share = torch.as_tensor(value, device=self.device) * self._share
                super().log(name, share, sync_dist=True, reduce_fx=torch.sum, **kwargs)

    def on_after_backward(self) -> None:
        """Reduce what the step logged, all at once: its gradients have just met, too."""
        super().on_after_backward()
        logged, self._to_log = self._to_log, None
        if not logged:
            return
        with self.heartbeat.doing("logging"):
            shares = torch.stack([share.double().flatten()[0] for _, share, _ in logged])
            values = self.trainer.strategy.reduce(shares, reduce_op="mean")
        for (name, _, options), value in zip(logged, values, strict=True):
            super().log(name, value, **options)


class StepMonitor:
    """Gives rank 0's monitors a training step's loss over all of its frames.

    Validation batches go to one worker whole: of these the monitors see rank 0's.
    """

    def __init__(self, module: RankTrainer, monitors: Sequence[Any]) -> None:
        self.module, self.monitors = module, monitors

    def log(self, name: str, value: torch.Tensor, step: int) -> None:
        """Reduce over the workers in training, and pass on."""
        module = self.module
        if module.trainer.training:
            with module.heartbeat.doing("logging"):
                value = module.trainer.strategy.reduce(
                    value.detach() * module._share, reduce_op="mean"
                )
        for monitor in self.monitors:
            monitor.log(name, value, step=step)


def _not_now() -> bool:
    return False


class DealtDataModule(pl.LightningDataModule):
    """The run's data module, with every loader dealt to this worker."""

    def __init__(self, job: Assignment, rank: int, world_size: int, heartbeat: Heartbeat) -> None:
        super().__init__()
        self.module, self.heartbeat = job.datamodule, heartbeat
        self.config, self.scaling = job.training_config, job.scaling
        self.rank, self.world_size = rank, world_size
        self._caches: dict[str, FrameCache] = {}
        #: What the driver shall say, once each.
        self.notes: list[str] = []
        self._parted = False
        self._run = ray.train.get_context().get_experiment_name()

    def setup(self, stage: str | None = None) -> None:
        """Do nothing: :func:`~cuvis_dist.archive.open_split` sets the module up per split."""

    def _loader(self, split: str, limit: int | float | None = None) -> DataLoader | ReadAhead:
        loader, frames = open_split(self.module, split)
        batches = DealtBatches(
            loader,
            self.rank,
            self.world_size,
            whole=split != "train",
            limit=limit,
            share=partial(self._share, split),
        )
        if split == "train" and keeps_own_order(loader):
            self.notes.append(
                f"the train loader of {type(self.module).__name__} keeps a random state of its "
                "own: frames come in the order that rank 0 draws, which is not upstream's where "
                "phase 1 draws from the same state"
            )
        if self.trainer is not None:  # a fit that goes on asks for its epoch before it says so
            batches.set_epoch(self.trainer.current_epoch)
        if limit and not len(batches):
            raise InputError(
                f"training.limit_{split}_batches is {limit}, which leaves none of the "
                f"{len(loader)} batches of the {split} split"
            )
        ahead = self.scaling.reading.read_ahead
        dataset = self._cached(split, NamedFrames(loader.dataset, frames), loader.num_workers)
        dealt = deal(loader, dataset, batches, keep_workers=self.scaling.reading.cache == "memory")
        if not ahead:
            return dealt
        return ReadAhead(dealt, ahead, partial(self.heartbeat.doing, STARTING))

    def _share(self, split: str, batches: Batches) -> Batches:
        """Return rank 0's batches, and go on from rank 0's random state as it has drawn them.

        Raises
        ------
        InputError
            If the ranks have unequal numbers of batches.
        """
        if self.world_size == 1:
            return batches
        with self.heartbeat.doing("agreeing on the order"):
            mine = len(batches), torch.get_rng_state().numpy().tobytes()
            everyones: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(everyones, mine)
            steps, states = zip(*everyones, strict=True)
            epoch = self.trainer.current_epoch + 1 if self.trainer else 1
            if len(set(steps)) > 1:
                counts = ", ".join(f"rank {rank} {n}" for rank, n in enumerate(steps))
                raise InputError(
                    f"the workers have unequal numbers of batches in epoch {epoch} ({counts}): "
                    f"the {split} loader of {type(self.module).__name__} is another one in each "
                    "process. It must list the same batches everywhere under the same seed; "
                    "cuvis_dist deals them"
                )
            if len(set(states)) > 1 and not self._parted:
                self._parted = True
                self.notes.append(
                    f"the workers' random states differ from epoch {epoch} on: something draws "
                    "random numbers for each frame. All workers go on from rank 0's state, and "
                    "from then on the order of frames is not upstream's"
                )
            shared = [batches]
            torch.distributed.broadcast_object_list(shared)
        torch.set_rng_state(torch.frombuffer(bytearray(states[0]), dtype=torch.uint8))
        return shared[0]

    def _cached(self, split: str, frames: Dataset, processes: int) -> Dataset:
        """Keep the frames of a split as the scaling says, over all of its loaders."""
        if self.scaling.reading.cache == "none":
            return frames
        if split not in self._caches:
            limit = self.scaling.reading.cache_bytes - sum(c.held for c in self._caches.values())
            limit //= max(1, processes)  # each process of a loader has a cache of its own
            self._caches[split] = make_cache(
                self.scaling.reading.cache, limit, f"{self._run}-{split}"
            )
        return CachedFrames(frames, self._caches[split])

    def close(self) -> None:
        """Give back what the caches hold."""
        for cache in self._caches.values():
            cache.clear()

    def train_dataloader(self) -> DataLoader | ReadAhead:
        """Return this worker's part of every training batch."""
        return self._loader("train", self.config.limit_train_batches)

    def val_dataloader(self) -> DataLoader | ReadAhead:
        """Return this worker's validation batches."""
        return self._loader("val", self.config.limit_val_batches)

    def test_dataloader(self) -> DataLoader | ReadAhead:
        """Return this worker's test batches."""
        return self._loader("test")


class EpochEvents(Callback):
    """Reports a fit as upstream's events, a few times a second at most."""

    def __init__(self, emit: EmitFn) -> None:
        super().__init__()
        self.emit = emit
        self._done = 0
        self._sent = 0.0

    def _progress(self, trainer: pl.Trainer, hook: TrainHook, **values: Any) -> None:
        epochs = EpochProgress(trainer.current_epoch + 1, max(trainer.max_epochs or 0, 0))
        total = trainer.train_dataloader.batch_sampler.frames if trainer.train_dataloader else 0
        frames = FrameProgress(min(self._done, total), total)
        self.emit(TrainEvent(hook, epochs=epochs, progress=frames, **values))

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Announce an epoch."""
        self._done = 0
        self._progress(trainer, TrainHook.EPOCH_START)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the frames of all workers."""
        dealt = trainer.train_dataloader.batch_sampler  # type: ignore[union-attr]
        self._done = dealt.frames * (batch_idx + 1) // max(1, len(dealt))
        if time.monotonic() - self._sent > 0.3:
            self._sent = time.monotonic()
            self._progress(trainer, TrainHook.TRAIN_PROGRESS)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report the epoch with every value that callbacks can monitor."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        outcome = EvaluationOutcome(ExecutionStage.VAL, EvaluationStatus.EVALUATED, metrics=values)
        self._progress(trainer, TrainHook.EPOCH_END, evaluation=outcome)
