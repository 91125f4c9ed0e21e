"""Phase 2 under Ray Train: what one process computes, on any number of workers."""

from __future__ import annotations

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from archives import assert_same_state
from cuvis_ai_core.training import GradientTrainer as UpstreamGradientTrainer
from cuvis_ai_core.training import StatisticalTrainer as UpstreamStatisticalTrainer
from cuvis_ai_core.training.config import create_callbacks_from_config
from cuvis_ai_core.training.evaluation import evaluate_split
from cuvis_ai_core.training.post_fit import TrainHook
from cuvis_ai_schemas.enums import ExecutionStage

from cuvis_dist import GradientTrainer, Scaling
from cuvis_dist.errors import ClusterError, DataError
from cuvis_dist.run import load_trainrun
from cuvis_dist.training.dealing import DealtBatches, deal

pytestmark = [pytest.mark.usefixtures("ray_session"), pytest.mark.slow]


class Epochs(pl.Callback):
    """Keeps every value that callbacks can monitor, epoch by epoch."""

    def __init__(self):
        self.values = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.values.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    def state_dict(self):
        return {"values": self.values}

    def load_state_dict(self, state_dict):
        self.values = state_dict["values"]


def initialized(path, folder, *overrides):
    """A trainrun after phase 1, its nodes unfrozen, its checkpoints in ``folder``."""
    trainrun = load_trainrun(path, [f"output_dir={folder}", *overrides])
    UpstreamStatisticalTrainer(trainrun.pipeline, trainrun.datamodule()).fit()
    trainrun.pipeline.unfreeze_nodes_by_name(trainrun.config.unfreeze_nodes)
    trainrun.config.training.callbacks.checkpoint.dirpath = str(folder / "checkpoints")
    return trainrun


def callbacks(trainrun):
    return [Epochs(), *create_callbacks_from_config(trainrun.config.training.callbacks)]


def train_upstream(trainrun):
    """Upstream's trainer in this process, on the global batches that the workers are dealt."""
    config, module = trainrun.config.training, trainrun.datamodule()
    loader = module.train_dataloader()
    module.train_dataloader = lambda: deal(
        loader, loader.dataset, DealtBatches(loader.batch_sampler, 0, 1, config.seed)
    )
    trainer = UpstreamGradientTrainer(
        trainrun.pipeline,
        module,
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        config.model_copy(update={"default_root_dir": str(trainrun.output_dir)}),
        callbacks=callbacks(trainrun),
    )
    trainer.fit()
    return trainer


def train(trainrun, workers, **options):
    trainer = GradientTrainer(
        trainrun.pipeline,
        trainrun.datamodule(),
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        trainrun.config.training,
        callbacks=callbacks(trainrun),
        scaling=Scaling(train_workers=workers, output_dir=trainrun.output_dir),
        **options,
    )
    trainer.fit()
    return trainer


@pytest.fixture(scope="module")
def reference(demo_trainrun, tmp_path_factory):
    """Upstream in one process: 10 train frames in batches of 3 leave one over."""
    trainrun = initialized(demo_trainrun, tmp_path_factory.mktemp("one"), "data.batch_size=3")
    return trainrun, train_upstream(trainrun)


@pytest.mark.parametrize("workers", [2, 3])
def test_equals_one_process_of_upstream(demo_trainrun, tmp_path, reference, workers):
    expected_run, expected = reference
    assert len(expected_run.datamodule().train_ds) % 3, "the last batch should be a small one"
    trainrun = initialized(demo_trainrun, tmp_path, "data.batch_size=3")
    events = []
    trainer = train(trainrun, workers, emit=events.append)

    assert_same_state(trainrun.pipeline, expected_run.pipeline, 1e-5)
    ours, theirs = trainer.callbacks[0].values, expected.callbacks[0].values
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            tolerance = {"abs": 1e-6} if "metrics" in name else {"rel": 1e-5}
            assert mine[name] == pytest.approx(value, **tolerance), name
    assert ours[-1]["val_loss"] < ours[0]["val_loss"]

    best, other = trainer.outcome.checkpoint, expected.callbacks[1]
    assert best.restored
    assert Path(best.path).name == Path(other.best_model_path).name, "another best epoch"
    assert Path(best.path).parent == tmp_path / "checkpoints"
    frames = len(trainrun.datamodule().train_ds)
    assert [e.progress.done for e in events if e.hook is TrainHook.EPOCH_END] == [frames] * 3

    # What the post-fit steps report is what upstream's evaluation finds in this process.
    module = trainrun.datamodule()
    module.setup("test")
    summary = evaluate_split(
        trainrun.pipeline,
        module.test_dataloader(),
        stage=ExecutionStage.TEST,
        metric_nodes=trainrun.metric_nodes,
    )
    assert trainer.outcome.evaluations["test"].frames == summary.frames
    assert trainer.outcome.evaluations["test"].metrics == pytest.approx(summary.metrics, abs=1e-6)
    (row,) = trainer.test()
    for name, value in summary.metrics.items():
        assert row[name] == pytest.approx(value, abs=1e-6)


def test_only_unfrozen_nodes_change_and_their_parameters_come_back(demo_trainrun, tmp_path):
    trainrun = initialized(demo_trainrun, tmp_path, "unfreeze_nodes=[logit_head]")
    before = {
        node.name: {k: v.clone() for k, v in node.state_dict().items()}
        for node in trainrun.pipeline.nodes()
    }
    train(trainrun, 1)
    for node in trainrun.pipeline.nodes():
        same = all(torch.equal(before[node.name][k], v) for k, v in node.state_dict().items())
        if node.name == "logit_head":
            assert not same
            assert isinstance(node.scale, torch.nn.Parameter)
        elif node.name not in ("metrics_anomaly", "decider"):
            assert same, node.name


def test_a_frame_that_cannot_be_read_is_named(demo_trainrun, tmp_path):
    import shutil

    folder = tmp_path / "demo"
    shutil.copytree(demo_trainrun.parent, folder)
    universe = folder / "archive" / "universe.csv"
    trainrun = initialized(
        folder / "trainrun.yaml", tmp_path, f"data.params.universe_csv={universe}"
    )
    (folder / "archive" / "recording_01_001.npz").write_bytes(b"not an npz")
    with pytest.raises(DataError, match=r"recording_01\.cu3s#1 .*recording_01_001\.npz"):
        train(trainrun, 1)


def test_more_workers_than_the_cluster_has_are_refused(demo_trainrun, tmp_path):
    trainrun = initialized(demo_trainrun, tmp_path)
    with pytest.raises(ClusterError, match="40 training workers need 40 CPUs, the cluster has 3"):
        train(trainrun, 40)
