"""Failures with real processes: training goes on, or ends with a name, and nothing hangs."""

from __future__ import annotations

import re
import signal

import pytest
import pytorch_lightning as pl
from archives import assert_same_state, buffers_sha256
from cuvis_ai_core.training.post_fit import TrainHook
from faults import OwnFrames, TroubledModule
from gradients import initialized, train, train_upstream
from readings import counted
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cuvis_dist.errors import ClusterError, InputError

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]
OVERRIDES = ("data.batch_size=3", "training.scheduler.patience=0")


class EveryStep(pl.Callback):
    """Has the state kept after every step, however long that takes."""

    def setup(self, trainer, pl_module, stage):
        pl_module.last.pace.pause = 0


def test_a_killed_worker_is_replaced_and_training_goes_on(demo_trainrun, tmp_path, warnings):
    """At the next step, within its epoch."""
    expected = initialized(demo_trainrun, tmp_path / "one", *OVERRIDES)
    reference = train_upstream(expected)

    trainrun = initialized(demo_trainrun, tmp_path / "two", *OVERRIDES)
    module = TroubledModule(trainrun.datamodule(), tmp_path, "die", at=28)  # third epoch of 10
    trainer = train(trainrun, 2, module, {"save_seconds": 0}, more=[EveryStep()])

    assert (tmp_path / "happened").exists()
    (line,) = [text for text in warnings if "lost" in text]
    assert re.search(r"Training goes on after batch [12] of epoch 3 \(failure 1, at most 3\)", line)
    read = counted(tmp_path / "read.log")
    assert read.total() <= 3 * 10 + 2 * 3, "more than the steps at hand was read again"
    assert min(read.values()) == 3
    (board,) = (trainrun.output_dir / "lightning_logs").iterdir()  # one run, each step once
    logged = EventAccumulator(str(board)).Reload().Scalars("val_loss")
    assert len(logged) == len({event.step for event in logged}) == 3
    assert_same_state(trainrun.pipeline, expected.pipeline, 1e-5)
    ours, theirs = trainer.callbacks[0].values, reference.callbacks[0].values
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-6)


@pytest.mark.long
def test_fewer_workers_than_asked_for_train_the_same(demo_trainrun, tmp_path, warnings):
    """The cluster has room for 3 of 40, and one of these is lost."""
    expected = initialized(demo_trainrun, tmp_path / "one", *OVERRIDES)
    train_upstream(expected)

    trainrun = initialized(demo_trainrun, tmp_path / "two", *OVERRIDES)
    module = TroubledModule(trainrun.datamodule(), tmp_path, "die", at=15)
    train(trainrun, 40, module, {"min_train_workers": 1})

    (line,) = [text for text in warnings if "Training goes on" in text]
    assert "from the end of epoch 1" in line or "of epoch 2" in line
    assert_same_state(trainrun.pipeline, expected.pipeline, 1e-5)


@pytest.mark.long
def test_a_stuck_worker_is_named(demo_trainrun, tmp_path):
    trainrun = initialized(demo_trainrun, tmp_path, *OVERRIDES)
    module = TroubledModule(trainrun.datamodule(), tmp_path, "sleep", at=5, rank=1)
    with pytest.raises(ClusterError, match=r"stuck for 4 s.*: rank 1 reading frames") as error:
        train(trainrun, 2, module, {"stall_seconds": 4})
    assert "meanwhile: rank 0" in str(error.value)
    assert (tmp_path / "happened").exists()


def test_this_process_is_named_and_interrupted_where_it_is_stuck(demo_trainrun, tmp_path):
    trainrun = initialized(demo_trainrun, tmp_path, *OVERRIDES)
    module = TroubledModule(trainrun.datamodule(), tmp_path, "sleep", at=5)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ClusterError, match=r"training was ended: stuck for 4 s.*: rank 0 reading"):
        train(trainrun, 0, module, {"stall_seconds": 4})
    assert (tmp_path / "happened").exists()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("later", [0, pytest.param(2, marks=pytest.mark.long)])
def test_this_process_is_interrupted_and_goes_on(demo_trainrun, tmp_path, later):
    """What it leaves is what workers leave, and the other way round; within an epoch, too."""
    expected = initialized(demo_trainrun, tmp_path / "one", *OVERRIDES)
    scaling = {"workers": 0, "save_seconds": 0}
    train(expected, 0, scaling=scaling)

    trainrun = initialized(demo_trainrun, tmp_path / "two", *OVERRIDES)
    at = 10 + 8  # in the third batch of the second epoch
    module = TroubledModule(trainrun.datamodule(), tmp_path, "interrupt", at)
    with pytest.raises(KeyboardInterrupt):
        train(trainrun, 0, module, scaling, more=[EveryStep()])
    assert counted(tmp_path / "read.log").total() == at

    again = initialized(demo_trainrun, tmp_path / "two", *OVERRIDES)
    module = TroubledModule(again.datamodule(), tmp_path, "interrupt", at)
    epochs = []
    train(again, later, module, scaling, resume=True, emit=epochs.append)
    ended = [e.epochs.current for e in epochs if e.hook is TrainHook.EPOCH_END]
    assert ended == [2, 3]
    (first, _) = [e for e in epochs if e.hook is TrainHook.EPOCH_START]
    assert (first.epochs.current, first.progress.done) == (2, 5), "half of 10 frames in 4 batches"
    read = counted(tmp_path / "read.log")
    tried = 2 if later else 0  # workers find out how nodes treat frames
    assert read.total() == 3 * 10 + tried + 2, "two of the step at hand were read again"
    assert min(read.values()) == 3
    if later:
        assert_same_state(again.pipeline, expected.pipeline, 1e-5)
    else:
        assert buffers_sha256(again.pipeline) == buffers_sha256(expected.pipeline)


@pytest.mark.long
def test_unequal_steps_are_told_before_the_first_one(demo_trainrun, tmp_path):
    trainrun = initialized(demo_trainrun, tmp_path)
    with pytest.raises(InputError, match=r"epoch 1 \(rank 0 5, rank 1 3\).*of OwnFrames"):
        train(trainrun, 2, OwnFrames(trainrun.datamodule()))
