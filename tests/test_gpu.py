"""Both phases on a GPU: the CPU's result, but for rounding."""

from __future__ import annotations

import pytest
import torch
from archives import relative_difference

from cuvis_dist import GradientTrainer, Scaling, StatisticalTrainer
from cuvis_dist.trainrun import load_trainrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("ray_session"),
]


def initialized(path, **scaling):
    trainrun = load_trainrun(path)
    trainer = StatisticalTrainer(
        trainrun.pipeline, trainrun.datamodule(), scaling=Scaling(workers=1, **scaling)
    )
    trainer.fit()
    return trainrun, trainer


def test_measuring_and_evaluating_on_a_gpu(demo_trainrun):
    on_cpu, here = initialized(demo_trainrun)
    on_gpu, there = initialized(demo_trainrun, worker_gpus=1, gpus_per_worker=1)
    for mine, other in zip(on_gpu.pipeline.nodes(), on_cpu.pipeline.nodes(), strict=True):
        for name, value in other.state_dict().items():
            assert mine.state_dict()[name].device.type == "cpu"
            tolerance = 1e-4 if name == "cov_inv" or other.name == "logit_head" else 1e-6
            difference = relative_difference(mine.state_dict()[name], value)
            assert difference <= tolerance, (other.name, name)
    assert there.test().metrics == pytest.approx(here.test().metrics, abs=1e-3)


def test_training_on_a_gpu(demo_trainrun, tmp_path):
    trainrun, _ = initialized(demo_trainrun)
    trainrun.pipeline.unfreeze_nodes_by_name(trainrun.config.unfreeze_nodes)
    trainrun.config.training.callbacks.checkpoint.dirpath = str(tmp_path / "checkpoints")
    trainer = GradientTrainer(
        trainrun.pipeline,
        trainrun.datamodule(),
        trainrun.loss_nodes,
        trainrun.metric_nodes,
        trainrun.config.training,
        scaling=Scaling(gpus_per_worker=1, output_dir=tmp_path),
    )
    trainer.fit()
    assert trainer.epochs == 3
    assert all(p.device.type == "cpu" for n in trainrun.pipeline.nodes() for p in n.parameters())
