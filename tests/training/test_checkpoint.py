"""A fit that goes on from its last epoch ends in the bits of one that was not disturbed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from archives import assert_same_state
from cuvis_ai_core.training import GradientTrainer as UpstreamGradientTrainer
from cuvis_ai_core.training.post_fit import PostFitCallback
from gradients import callbacks, initialized
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cuvis_dist.pace import Pace
from cuvis_dist.storage import OutputFolder, mirror_of
from cuvis_dist.training.checkpoint import LAST, LastState, Reached, continued, reached
from cuvis_dist.training.dealing import DealtBatches, deal


class Annealing(pl.Callback):
    """Cools the selector at the start of each epoch; its temperature is in no state dict."""

    def on_train_epoch_start(self, trainer, pl_module):
        (selector,) = [n for n in pl_module.pipeline.nodes() if n.name == "selector"]
        selector.temperature *= 0.7

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        """Step on a random number, as dropout does."""
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1 + 1e-3 * torch.rand(()))


class Trainer(UpstreamGradientTrainer):
    """Upstream's, with our checkpoint."""

    last: LastState

    def _build_trainer(self):
        trainer = super()._build_trainer()
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, PostFitCallback)]
        self.last.attach_to(trainer)
        return trainer


def fit(path, folder, *overrides, resume=None, more=(), every=math.inf):
    trainrun = initialized(path, folder, *overrides)
    config, module = trainrun.config.training, trainrun.datamodule()
    loader = module.train_dataloader()

    def train_dataloader():
        return deal(loader, loader.dataset, DealtBatches(loader, 0, 1))

    module.train_dataloader = train_dataloader
    trainer = Trainer(
        trainrun.pipeline,
        module,
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        config.model_copy(update={"default_root_dir": str(folder)}),
        callbacks=[*callbacks(trainrun), Annealing(), *more],
    )
    resume_from = str(resume) if resume else None
    mirror = mirror_of(OutputFolder(folder))
    trainer.last = LastState(mirror, trainrun.pipeline, Pace(every), resume_from)
    trainer.last.pace.pause = 0
    trainer.fit()
    return trainrun, trainer


@pytest.mark.parametrize(
    "overrides",
    [
        ("training.scheduler.patience=0",),
        (
            "training.scheduler={name: cosine, warmup_epochs: 1}",
            "training.accumulate_grad_batches=3",
            "training.val_check_interval=0.5",
            "training.optimizer={name: sgd, lr: 0.0001}",
        ),
    ],
    ids=["plateau, AdamW", "cosine, accumulation, SGD"],
)
def test_goes_on_in_the_same_bits(demo_trainrun, tmp_path, overrides):
    overrides = ("data.batch_size=3", *overrides)
    whole, undisturbed = fit(demo_trainrun, tmp_path / "whole", *overrides)
    last = tmp_path / "whole" / LAST
    assert reached(last) == Reached(2)
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]

    resumed, trainer = fit(demo_trainrun, tmp_path / "resumed", *overrides, resume=last)
    assert_same_state(resumed.pipeline, whole.pipeline, 0)
    temperatures = {
        node.temperature
        for run in (whole, resumed)
        for node in run.pipeline.nodes()
        if node.name == "selector"
    }
    assert len(temperatures) == 1
    assert trainer.callbacks[0].values == undisturbed.callbacks[0].values
    assert trainer.global_step == undisturbed.global_step
    states = [t.trainer.optimizers[0].state_dict() for t in (trainer, undisturbed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    # The other run's folder was another one: its checkpoints are looked for in this one's.
    ours, theirs = (t.trainer.checkpoint_callback for t in (trainer, undisturbed))
    assert ours.best_model_score == theirs.best_model_score
    best = Path(theirs.best_model_path).relative_to(tmp_path / "whole")
    assert Path(ours.best_model_path) == tmp_path / "resumed" / best


def test_the_users_checkpoints_are_as_they_were(demo_trainrun, tmp_path):
    _, trainer = fit(demo_trainrun, tmp_path)
    path = trainer.trainer.checkpoint_callback.best_model_path
    checkpoint = torch.load(path, weights_only=True)  # as upstream loads it
    assert "LastState" not in checkpoint["callbacks"]


def test_nothing_to_go_on_from(tmp_path):
    assert reached(tmp_path / LAST) == Reached()


def test_a_log_that_goes_on_has_each_step_once(tmp_path):
    """In one folder; what was logged after the checkpoint counts as undone."""
    first = TensorBoardLogger(tmp_path, name="logs")
    for step in range(8):
        first.log_metrics({"loss": 1.0}, step)
    first.finalize("success")
    torch.save({"global_step": 5, "epoch": 1}, tmp_path / "last.ckpt")

    again = continued(TensorBoardLogger(tmp_path, name="logs"), tmp_path / "last.ckpt")
    for step in range(5, 10):
        again.log_metrics({"loss": 2.0}, step)
    again.finalize("success")

    (folder,) = (tmp_path / "logs").iterdir()
    events = EventAccumulator(str(folder)).Reload().Scalars("loss")
    assert [(e.step, e.value) for e in events] == [
        (step, 1.0 if step < 5 else 2.0) for step in range(10)
    ]


class Opaque(Annealing):
    """Lets a node hold what cannot be written without code, or has such a state itself."""

    def __init__(self, where):
        self.where = where

    def on_train_epoch_start(self, trainer, pl_module):
        if self.where == "node":
            (selector,) = [n for n in pl_module.pipeline.nodes() if n.name == "selector"]
            selector.own = print

    def state_dict(self):
        return {"own": print} if self.where == "callback" else {}


@pytest.mark.parametrize(
    ("where", "what"),
    [("node", "selector.own is no plain value"), ("callback", "the state of the callback Opaque")],
)
def test_what_cannot_be_kept_without_code_is_said_once(
    demo_trainrun, tmp_path, warnings, where, what
):
    """Training goes on, and leaves nothing to go on from."""
    _, trainer = fit(demo_trainrun, tmp_path, more=[Opaque(where)])
    assert trainer.trainer.current_epoch == 3
    assert not list((tmp_path / "resume").iterdir())
    (line,) = [line for line in warnings if "training is not kept" in line]
    assert what in line
