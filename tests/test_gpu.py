"""Both phases, evaluation and scoring on a GPU: the CPU's result, but for rounding.

Two workers share the GPU where there is one.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from archives import edit, relative_difference
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import ExecutionStage
from faults import TroubledModule
from gradients import initialized, train, train_upstream
from settings import scaling_of

from cuvis_dist import StatisticalTrainer
from cuvis_dist.cli import main
from cuvis_dist.errors import ClusterError
from cuvis_dist.evaluation.steps import Evaluator
from cuvis_dist.runs.trainrun import load_trainrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("ray_session"),
]
HALF = {"train_gpus": 0.5}


def measured(path, **scaling):
    trainrun = load_trainrun(path)
    trainer = StatisticalTrainer(
        trainrun.pipeline,
        trainrun.datamodule(),
        scaling=scaling_of(workers=2, **scaling),
    )
    trainer.fit()
    return trainrun, trainer


def assert_close(ours: CuvisPipeline, theirs: CuvisPipeline, tolerance: float) -> None:
    """Within a tolerance, all on the CPU; what inverts a covariance multiplies the rounding."""
    for mine, other in zip(ours.nodes(), theirs.nodes(), strict=True):
        for name, value in other.state_dict().items():
            assert mine.state_dict()[name].device.type == "cpu"
            derived = name == "cov_inv" or other.name == "logit_head"
            difference = relative_difference(mine.state_dict()[name], value.cpu())
            assert difference <= tolerance * (100 if derived else 1), (other.name, name, difference)


@pytest.mark.parametrize("settings", [{}, {"pixels": "unlabelled", "fold": False}])
def test_measuring_and_evaluating(demo_trainrun, settings):
    on_cpu, here = measured(demo_trainrun, **settings)
    on_gpu, there = measured(demo_trainrun, gpus=0.5, **HALF, **settings)
    assert_close(on_gpu.pipeline, on_cpu.pipeline, 1e-6)
    assert there.test().metrics == pytest.approx(here.test().metrics, abs=1e-3)


def test_measuring_is_repeatable(demo_trainrun):
    """One worker or two, the bits are the same, if not the CPU's."""
    one, two = (measured(demo_trainrun, gpus=gpus, fold=False)[0].pipeline for gpus in (1, 0.5))
    for mine, other in zip(one.nodes(), two.nodes(), strict=True):
        for name, value in other.state_dict().items():
            assert torch.equal(mine.state_dict()[name], value), (other.name, name)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_equals_one_process_of_upstream(demo_trainrun, tmp_path, workers, optimizer):
    overrides = ["data.batch_size=3", f"training.optimizer.name={optimizer}"]
    if optimizer == "sgd":
        overrides.append("training.optimizer.lr=1.0e-6")
    expected = initialized(demo_trainrun, tmp_path / "one", *overrides)
    reference = train_upstream(expected)
    trainrun = initialized(demo_trainrun, tmp_path / "two", *overrides)
    trainer = train(trainrun, workers, scaling={"train_gpus": 1 / workers})
    assert trainer.epochs == 3
    assert_close(trainrun.pipeline, expected.pipeline, 1e-5)
    ours, theirs = trainer.callbacks[0].values, reference.callbacks[0].values
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_a_killed_worker_is_replaced(demo_trainrun, tmp_path, warnings):
    expected = initialized(demo_trainrun, tmp_path / "one", "data.batch_size=3")
    train(expected, 2, scaling=HALF)
    trainrun = initialized(demo_trainrun, tmp_path / "two", "data.batch_size=3")
    module = TroubledModule(trainrun.datamodule(), tmp_path, "die", at=25)
    train(trainrun, 2, module, HALF)
    assert (tmp_path / "happened").exists()
    assert any("Training goes on" in text and "of epoch" in text for text in warnings)
    assert_close(trainrun.pipeline, expected.pipeline, 1e-5)


def test_a_stuck_worker_is_named(demo_trainrun, tmp_path):
    trainrun = initialized(demo_trainrun, tmp_path, "data.batch_size=3")
    module = TroubledModule(trainrun.datamodule(), tmp_path, "sleep", at=5, rank=1)
    with pytest.raises(ClusterError, match=r"stuck for 4 s.*: rank 1 reading frames"):
        train(trainrun, 2, module, {**HALF, "stall_seconds": 4})


def test_a_whole_run_and_scores(demo, tmp_path, capsys):
    """What is saved is an ordinary pipeline, which the CPU scores with."""
    scaling, out = tmp_path / "scaling.yaml", tmp_path / "out"
    scaling.write_text(
        "measuring: {gpus: 0.5}\nresources: {train_gpus: 0.5, workers: 2, train_workers: 2}\n"
    )
    options = ["--scaling", str(scaling), "--output-dir", str(out)]
    edit(demo, lambda run: run["training"].update(max_epochs=2))
    assert main(["run", str(demo), *options]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["epochs"] == 2
    saved = record["pipeline"]
    for where, settings in (("gpu", options[:2]), ("cpu", [])):
        folder = str(tmp_path / where)
        command = ["score", saved, "--data", str(demo), "--output-dir", folder, *settings]
        assert main(command) == 0, capsys.readouterr().err
    files = sorted((tmp_path / "cpu" / "scores").rglob("*.npz"))
    assert len(files) == 22
    for file in files:
        name = file.relative_to(tmp_path / "cpu")
        with np.load(file) as cpu, np.load(tmp_path / "gpu" / name) as gpu:
            scores = "rx_detector.scores"
            np.testing.assert_allclose(gpu[scores], cpu[scores], rtol=1e-3)
    trainrun = load_trainrun(demo)
    pipeline = CuvisPipeline.load_pipeline(saved, saved.replace(".yaml", ".pt"))
    summaries = [
        Evaluator(
            pipeline,
            trainrun.datamodule(),
            scaling_of(train_workers=2, **settings),
            lambda event: None,
        ).evaluate(
            ExecutionStage.TEST, [n for n in pipeline.nodes() if n.name == "metrics_anomaly"]
        )
        for settings in (HALF, {})
    ]
    assert summaries[0].metrics == pytest.approx(summaries[1].metrics, abs=1e-3)
