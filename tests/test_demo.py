"""The demo at its own size: does phase 2 visibly help?"""

from __future__ import annotations

import pytest
from cuvis_ai_core.training.post_fit import TrainHook

from cuvis_dist import GradientTrainer, Scaling, StatisticalTrainer
from cuvis_dist.demo import DemoSettings, write_demo
from cuvis_dist.runs.trainrun import load_trainrun


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.usefixtures("ray_session")
def test_phase_two_lowers_the_loss_and_finds_more(tmp_path):
    trainrun = load_trainrun(write_demo(tmp_path, DemoSettings()), output_dir=tmp_path / "results")
    pipeline, module = trainrun.pipeline, trainrun.datamodule()
    scaling = Scaling(resources={"workers": 2, "train_workers": 2})
    initialization = StatisticalTrainer(
        pipeline, module, metric_nodes=trainrun.metric_nodes, scaling=scaling
    )
    initialization.fit()
    before = initialization.test().metrics

    pipeline.unfreeze_nodes_by_name(trainrun.config.unfreeze_nodes)
    trainrun.config.training.callbacks.checkpoint.dirpath = str(tmp_path / "checkpoints")
    events = []
    training = GradientTrainer(
        pipeline,
        module,
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        trainrun.config.training,
        emit=events.append,
        scaling=scaling,
        output_dir=trainrun.output_dir,
    )
    training.fit()
    epochs = [e.evaluation.metrics for e in events if e.hook is TrainHook.EPOCH_END]
    assert epochs[-1]["train_loss"] < 0.6 * epochs[0]["train_loss"]
    assert epochs[-1]["val_loss"] < epochs[0]["val_loss"]
    after = training.outcome.evaluations["test"].metrics
    for name in ("average_precision", "iou", "f1_score", "image_f1", "precision"):
        assert after[f"metrics_anomaly/{name}"] >= before[f"metrics_anomaly/{name}"], name
    assert after["metrics_anomaly/iou"] > before["metrics_anomaly/iou"] + 0.1
