"""A value that nothing logs is refused before phase 1; what upstream logs is not."""

from __future__ import annotations

import pytest
from cuvis_ai_core.training.config import TrainingConfig

from cuvis_dist.errors import InputError
from cuvis_dist.training.monitoring import check_monitored


def check(**training):
    config = TrainingConfig.model_validate({"max_epochs": 1, **training})
    check_monitored(config, ["bce"], ["metrics_anomaly"])


@pytest.mark.parametrize(
    "key",
    ["train_loss", "val_loss", "val/bce", "train/bce", "metrics_anomaly/iou", "epoch", "lr-AdamW"],
)
def test_what_is_logged_is_accepted(key):
    check(callbacks={"checkpoint": {"monitor": key}, "early_stopping": [{"monitor": key}]})
    check(scheduler={"name": "reduce_on_plateau", "monitor": key})


@pytest.mark.parametrize(
    ("training", "setting", "meant"),
    [
        (
            {"callbacks": {"checkpoint": {"monitor": "metrics_anomly/iou"}}},
            "callbacks.checkpoint.monitor",
            "metrics_anomaly/iou",
        ),
        (
            {"callbacks": {"early_stopping": [{"monitor": "val_los"}]}},
            "callbacks.early_stopping[0].monitor",
            "val_loss",
        ),
        (
            {"scheduler": {"name": "reduce_on_plateau", "monitor": "val/bec"}},
            "scheduler.monitor",
            "val/bce",
        ),
    ],
)
def test_what_nothing_logs_is_refused_with_what_is_meant(training, setting, meant):
    with pytest.raises(InputError) as caught:
        check(**training)
    assert f"training.{setting} is" in str(caught.value)
    assert f"did you mean {meant}?" in str(caught.value)


def test_a_value_that_need_not_be_there_is_accepted():
    check(callbacks={"checkpoint": {"monitor": "unknown", "save_top_k": 0}})
    check(callbacks={"early_stopping": [{"monitor": "unknown", "strict": False}]})


def test_schedulers_are_named_as_upstream_takes_them():
    check(scheduler={"name": None})
    check(scheduler={"name": "none", "monitor": "unknown"})
    with pytest.raises(InputError, match=r"scheduler\.monitor is 'unknown'"):
        check(scheduler={"name": "Plateau", "monitor": "unknown"})
