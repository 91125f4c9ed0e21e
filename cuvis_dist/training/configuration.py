"""Can a training configuration run on these workers? The answer comes before any data is read.

Every field of upstream's ``TrainingConfig`` either means on many workers what it means in one
process, or is refused here. What upstream and Lightning would refuse later, on a worker and
after phase 1, they are asked to refuse now.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytorch_lightning as pl
import torch
from cuvis_ai_core.training.config import TrainingConfig, create_callbacks_from_config
from cuvis_ai_core.training.optimizer_registry import create_optimizer, create_scheduler
from loguru import logger

from cuvis_dist.errors import InputError, one_line
from cuvis_dist.scaling import Scaling

#: These settings change the state of a whole process, or need the workers' devices.
_ONLY_ON_WORKERS = {"accelerator", "devices", "deterministic", "benchmark", "default_root_dir"}


def check_training(config: TrainingConfig, scaling: Scaling) -> None:
    """Refuse a configuration that cannot work on these workers.

    Parameters
    ----------
    config : TrainingConfig
        The ``training`` block of a trainrun.
    scaling : Scaling
        The settings of the workers.

    Raises
    ------
    InputError
        Naming the setting, why it cannot work, and what to do.
    """
    for problem in (
        _devices(config, scaling),
        _accelerator(config, scaling),
        _precision(config, scaling),
        _nothing(config, scaling),
        _save_on_exception(config, scaling),
    ):
        if problem:
            raise InputError(f"training.{problem}")
    try:
        optimizer = create_optimizer(config.optimizer, [torch.nn.Parameter(torch.zeros(1))])
        create_scheduler(config.scheduler, optimizer, config.max_epochs)
        callbacks = create_callbacks_from_config(config.callbacks)
        kwargs = config.to_lightning_kwargs()
        for name in _ONLY_ON_WORKERS:
            kwargs.pop(name, None)
        if scaling.resources.train_gpus:
            kwargs.pop("precision", None)
        if config.callbacks and config.callbacks.checkpoint:
            kwargs["enable_checkpointing"] = True
        with _silent():
            pl.Trainer(**kwargs, accelerator="cpu", devices=1, logger=False, callbacks=callbacks)
    except Exception as error:
        raise InputError(f"the training configuration cannot be used: {one_line(error)}") from error


def check_batches(config: TrainingConfig, split: str, batches: int) -> None:
    """Refuse limits and intervals that do not fit a split of so many batches.

    Parameters
    ----------
    config : TrainingConfig
        The ``training`` block of a trainrun.
    split : str
        ``train`` or ``val``.
    batches : int
        How many batches the data module's own loader makes of it.

    Raises
    ------
    InputError
        Naming the setting, and how many batches there are.
    """
    limit = getattr(config, f"limit_{split}_batches")
    count = batches if limit is None else min(batches, limit)
    if isinstance(limit, float):
        count = int(batches * limit)
    if limit and not count:
        raise InputError(
            f"training.limit_{split}_batches is {limit}, which leaves none of the {batches} "
            f"batches of the {split} split"
        )
    every, validates = config.val_check_interval, config.limit_val_batches != 0
    if split == "train" and validates and type(every) is int and every > count:
        # Upstream does not tell Lightning that check_val_every_n_epoch is null.
        raise InputError(
            f"training.val_check_interval is {every}, but an epoch has {count} batches: give at "
            "most that many, or a part of an epoch such as 0.5"
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Keep Lightning from telling about this process, which does not train."""
    lightning = logging.getLogger("pytorch_lightning")
    level = lightning.level
    lightning.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        lightning.setLevel(level)


def _devices(config: TrainingConfig, scaling: Scaling) -> str | None:
    """Refuse devices by their ids: which one a worker gets is for Ray to say."""
    ids = [part.strip() for part in str(config.devices).strip("[] ").split(",") if part.strip()]
    listed = any(mark in str(config.devices) for mark in ",[")
    if not listed or ids == [str(number) for number in range(len(ids))]:
        return None
    return (
        f"devices is {config.devices!r}, which names devices by their ids: Ray decides which one "
        "each worker gets. Remove devices, and set CUDA_VISIBLE_DEVICES where Ray starts to keep "
        "it from the others; --train-workers says how many there are"
    )


def say_devices(config: TrainingConfig, scaling: Scaling) -> None:
    """Say in the log when the number of workers is not what a trainrun calls ``devices``.

    The setting speaks of the processes that upstream would start, mostly one.
    """
    workers = max(1, scaling.resources.train_workers)
    if config.devices in (None, "auto", -1, "-1") or str(config.devices) == str(workers):
        return
    logger.log(
        "INFO" if str(config.devices) == "1" else "WARNING",
        f"training.devices is {config.devices!r}, which speaks about one process: the scaling "
        f"decides, {workers} training workers (--train-workers)",
    )


def _accelerator(config: TrainingConfig, scaling: Scaling) -> str | None:
    on_gpu = scaling.resources.train_gpus > 0
    fitting = {"auto", "gpu", "cuda"} if on_gpu else {"auto", "cpu"}
    if config.accelerator in fitting:
        return None
    return (
        f"accelerator is {config.accelerator!r}, but each training worker has "
        f"{scaling.resources.train_gpus:g} GPUs. Set it to auto, and resources.train_gpus "
        "(--train-gpus) to what a worker shall have: 0 trains on CPUs, other devices are "
        "not supported"
    )


def _precision(config: TrainingConfig, scaling: Scaling) -> str | None:
    if str(config.precision) in ("16", "16-mixed") and not scaling.resources.train_gpus:
        return (
            f"precision is {config.precision!r}, which CPUs do not have. Use bf16-mixed or "
            "32-true, or train on GPUs (--train-gpus)"
        )
    return None


def _nothing(config: TrainingConfig, scaling: Scaling) -> str | None:
    if config.limit_train_batches == 0:
        return (
            "limit_train_batches is 0, so that nothing would be trained: remove it, or carry out "
            "phase 1 alone (cuvis-dist init)"
        )
    if type(config.val_check_interval) is int and not config.val_check_interval:
        return "val_check_interval is 0 batches: give a number of batches, or a part of an epoch"
    return None


def _save_on_exception(config: TrainingConfig, scaling: Scaling) -> str | None:
    checkpoint = config.callbacks.checkpoint if config.callbacks else None
    if (
        checkpoint is None
        or not checkpoint.save_on_exception
        or scaling.resources.train_workers <= 1
    ):
        return None
    return (
        "callbacks.checkpoint.save_on_exception cannot work on several workers: the others would "
        "not save with the one that fails. Remove it: the state of training is kept every few "
        "seconds in any case (resources.save_seconds), and the same command goes on from there"
    )
