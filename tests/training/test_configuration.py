"""Every setting of upstream's training configuration: decided, and refused early or equal."""

from __future__ import annotations

import pytest
from cuvis_ai_core.training.config import (
    CallbacksConfig,
    EarlyStoppingConfig,
    LearningRateMonitorConfig,
    ModelCheckpointConfig,
    OptimizerConfig,
    SchedulerConfig,
    TrainingConfig,
)
from loguru import logger
from settings import scaling_of

from cuvis_dist.errors import InputError
from cuvis_dist.training.configuration import check_batches, check_training, say_devices

#: Trained on workers and compared with one process: tests/training/test_trainer.py.
EQUAL = "equal to one process"
#: Decided from logged values or counts of steps, which are the same on every rank.
SAME = "the same on every rank"
#: Lightning lets rank 0 alone write or print.
RANK_ZERO = "rank 0 alone"
#: Concerns each process by itself.
EACH = "each process by itself"
#: Refused by check_training where it cannot work, tested below.
REFUSED = "refused where it contradicts"
#: Speaks of one process: the scaling decides, and the log says so. Ids are refused.
ANSWERED = "the scaling's"
#: Applied to the global batches when they are dealt: tests/training/test_dealing.py.
DEALT = "dealt"

DECISIONS = {
    TrainingConfig: {
        "seed": EQUAL,
        "optimizer": EQUAL,
        "scheduler": EQUAL,
        "callbacks": EQUAL,
        "release_cuda_cache_on_validation": EACH,
        "max_epochs": EQUAL,
        "accelerator": REFUSED,
        "devices": ANSWERED,
        "default_root_dir": RANK_ZERO,
        "precision": REFUSED,
        "accumulate_grad_batches": EQUAL,
        "enable_progress_bar": RANK_ZERO,
        "enable_checkpointing": RANK_ZERO,
        "log_every_n_steps": RANK_ZERO,
        "val_check_interval": EQUAL,
        "check_val_every_n_epoch": EQUAL,
        "limit_train_batches": EQUAL,
        "limit_val_batches": EQUAL,
        "num_sanity_val_steps": EACH,
        "gradient_clip_val": EQUAL,
        "deterministic": EACH,
        "benchmark": EACH,
    },
    OptimizerConfig: dict.fromkeys(("name", "lr", "weight_decay", "momentum", "betas"), EQUAL),
    SchedulerConfig: dict.fromkeys(
        ("name", "warmup_epochs", "min_lr", "t_max", "step_size", "gamma", "monitor", "mode",
         "factor", "patience", "threshold", "threshold_mode", "cooldown", "eps", "verbose"),
        SAME,
    ),
    CallbacksConfig: {
        "checkpoint": EQUAL,
        "early_stopping": EQUAL,
        "learning_rate_monitor": RANK_ZERO,
    },
    EarlyStoppingConfig: dict.fromkeys(
        ("monitor", "patience", "mode", "min_delta", "stopping_threshold", "strict",
         "check_finite", "divergence_threshold", "check_on_train_epoch_end"),
        SAME,
    ) | {"verbose": RANK_ZERO, "log_rank_zero_only": RANK_ZERO},
    ModelCheckpointConfig: dict.fromkeys(
        ("monitor", "mode", "save_top_k", "every_n_epochs", "every_n_train_steps",
         "save_on_train_epoch_end", "train_time_interval"),  # Lightning asks rank 0 for the time
        SAME,
    ) | dict.fromkeys(
        ("dirpath", "filename", "save_last", "auto_insert_metric_name", "verbose",
         "save_weights_only", "enable_version_counter"),
        RANK_ZERO,
    ) | {"save_on_exception": REFUSED},
    LearningRateMonitorConfig: dict.fromkeys(
        ("logging_interval", "log_momentum", "log_weight_decay"), RANK_ZERO
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", DECISIONS, ids=lambda model: model.__name__)
def test_every_field_is_decided(model):
    """A release of upstream with another field must not slip by."""
    decided, fields = set(DECISIONS[model]), set(model.model_fields)
    assert fields - decided == set(), "new upstream: decide what it means on many workers"
    assert decided - fields == set(), "gone upstream"


def test_every_nested_model_is_walked():
    nested = {TrainingConfig}
    for model in list(DECISIONS):
        for field in model.model_fields.values():
            for part in (field.annotation, *getattr(field.annotation, "__args__", ())):
                if hasattr(part, "model_fields"):
                    nested.add(part)
    assert nested == set(DECISIONS)


def checkpoint(**options):
    return {"callbacks": {"checkpoint": {"monitor": "val_loss", **options}}}


GPU = {"train_gpus": 1}
REFUSALS = {
    "device ids": ({"devices": "2,3"}, {"train_workers": 2}, "devices is '2,3'.*by their ids"),
    "a device id": ({"devices": "[1]"}, GPU, "by their ids.*CUDA_VISIBLE_DEVICES"),
    "a GPU without GPUs": ({"accelerator": "gpu"}, {}, "accelerator is 'gpu'.*--train-gpus"),
    "a CPU with GPUs": ({"accelerator": "cpu"}, GPU, "accelerator is 'cpu'"),
    "a TPU": ({"accelerator": "tpu"}, {}, "other devices are not supported"),
    "half precision on CPUs": ({"precision": "16-mixed"}, {}, "which CPUs do not have"),
    "no such precision": ({"precision": "12-true"}, {}, "12-true"),
    "saving on one rank": (
        checkpoint(save_on_exception=True), {"train_workers": 2}, "same command goes on",
    ),
    "no such optimizer": ({"optimizer": {"name": "lion"}}, {}, "Unsupported optimizer: lion"),
    "no such scheduler": ({"scheduler": {"name": "polynomial"}}, {}, "polynomial"),
    "plateau after a warmup": (
        {"scheduler": {"name": "plateau", "warmup_epochs": 2}}, {}, "warmup_epochs",
    ),
    "two cadences": (
        checkpoint(every_n_epochs=1, every_n_train_steps=1), {}, "mutually exclusive",
    ),
    "no such mode": (
        {"callbacks": {"early_stopping": [{"monitor": "val_loss", "mode": "least"}]}}, {}, "least",
    ),
    "more than an epoch": ({"val_check_interval": 1.5}, {}, "val_check_interval"),
    "every 0 batches": ({"val_check_interval": 0}, {}, "val_check_interval is 0 batches"),
    "no training": ({"limit_train_batches": 0}, {}, "limit_train_batches is 0.*cuvis-dist init"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_work_is_refused(case):
    config, scaling, message = REFUSALS[case]
    with pytest.raises(InputError, match=f"(?s){message}"):
        check_training(TrainingConfig.model_validate(config), scaling_of(**scaling))


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({}, {}),
        ({"devices": 2}, {"train_workers": 2}),
        ({"devices": 1}, {"train_workers": 2}),
        ({"devices": "0,1"}, {"train_workers": 2}),
        ({"devices": "0,"}, GPU),
        ({"devices": "auto", "accelerator": "auto"}, {"train_workers": 3}),
        ({"devices": -1, "accelerator": "cuda", "precision": "16-mixed"}, GPU),
        ({"precision": "bf16-mixed", "accelerator": "cpu"}, {}),
        ({"deterministic": True, "val_check_interval": 3, "check_val_every_n_epoch": None}, {}),
        (checkpoint(save_on_exception=True), {}),
    ],
)
def test_what_works_is_not_refused(config, scaling):
    check_training(TrainingConfig.model_validate(config), scaling_of(**scaling))


@pytest.mark.parametrize(
    ("config", "split", "message"),
    [
        ({"limit_train_batches": 0.1}, "train", "is 0.1, which leaves none of the 5 batches"),
        ({"limit_val_batches": 0.1}, "val", "limit_val_batches is 0.1.* of the val split"),
        ({"val_check_interval": 6}, "train", "is 6, but an epoch has 5 batches"),
        ({"val_check_interval": 3, "limit_train_batches": 0.4}, "train", "is 3, .* has 2 batches"),
        ({"val_check_interval": 5}, "train", None),
        ({"val_check_interval": 6, "limit_val_batches": 0}, "train", None),
        ({"val_check_interval": 6}, "val", None),
        ({"val_check_interval": 0.01}, "train", None),
        ({"limit_val_batches": 9}, "val", None),
    ],
)
def test_what_does_not_fit_five_batches_is_refused(config, split, message):
    training = TrainingConfig.model_validate(config)
    if message is None:
        return check_batches(training, split, 5)
    with pytest.raises(InputError, match=message):
        check_batches(training, split, 5)


@pytest.mark.parametrize(
    ("devices", "said"), [(1, 1), ("auto", 0), (2, 0), (4, 1), (None, 0), ("0,", 1)]
)
def test_devices_are_answered_by_the_scaling(devices, said):
    lines = []
    handler = logger.add(lines.append, level="INFO", format="{message}")
    say_devices(TrainingConfig(devices=devices), scaling_of(train_workers=2))
    logger.remove(handler)
    assert len(lines) == said
    assert all(f"devices is {devices!r}" in line and "2 training workers" in line for line in lines)
