"""What does a node class need that `cuvis_dist` has never heard of? One entry, in its module."""

from __future__ import annotations

import pytest
import torch
from archives import relative_difference
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.data import LentilsAnomalyDataNode
from cuvis_ai.node.losses import AnomalyBCEWithLogits
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from newcomer import Standardizer
from settings import scaling_of

from cuvis_dist import GradientTrainer, StatisticalTrainer
from cuvis_dist.initialization.measuring import Measurer
from cuvis_dist.initialization.plan import make_plan
from cuvis_dist.runs.trainrun import load_trainrun

C = 12


def new_pipeline():
    """Frames, the new node, a detector behind it, and a loss."""
    data, new = LentilsAnomalyDataNode(normal_class_ids=[0], name="data"), Standardizer(C)
    rx, head, bce = RXGlobal(C, name="rx"), ScoreToLogit(name="head"), AnomalyBCEWithLogits()
    pipeline = CuvisPipeline("new")
    pipeline.connect(
        (data.outputs.cube, new.inputs.data),
        (new.outputs.standard, rx.inputs.data),
        (rx.outputs.scores, head.inputs.scores),
        (head.outputs.logits, bce.inputs.predictions),
        (data.outputs.mask, bce.inputs.targets),
    )
    return pipeline, new, bce


def fitted(trainrun, fold):
    pipeline, new, bce = new_pipeline()
    scaling = scaling_of(workers=2, fold=fold)
    trainer = StatisticalTrainer(pipeline, trainrun.datamodule(), scaling=scaling)
    trainer.fit()
    return trainer, new, bce


def test_a_new_node_is_planned_folded_and_given_strips():
    pipeline, new, _ = new_pipeline()
    first, second = make_plan(pipeline, fold=True)
    assert [m.key for m in first.measurements] == ["Moments(data.cube)"]
    assert [fit.node.name for fit in first.fits] == [new.name, "rx"]
    assert [hop.node for hop in first.fits[1].chain] == [new]
    assert [node.name for node in second.nodes] == ["head"]
    assert Measurer(pipeline, second.by_key()).by_strips


def test_a_new_node_is_measured_and_diagnosed(demo_trainrun, ray_session):
    trainrun = load_trainrun(demo_trainrun)
    folded, new, _ = fitted(trainrun, fold=True)
    assert [list(record.nodes) for record in folded.records] == [[new.name, "rx"], ["head"]]

    alone, module = Standardizer(C), trainrun.datamodule()
    module.setup("fit")
    batches = list(module.train_dataloader())
    pixels = sum(batch["cube"][..., 0].numel() for batch in batches)
    alone.statistical_initialization({"data": batch["cube"].double()} for batch in batches)
    for name in ("mean", "deviation"):
        assert relative_difference(getattr(new, name), getattr(alone, name)) <= 1e-6

    measured, _, _ = fitted(trainrun, fold=False)
    rx, theirs = (
        next(node for node in trainer.pipeline.nodes() if node.name == "rx")
        for trainer in (folded, measured)
    )
    assert len(measured.records) == 3
    assert relative_difference(rx.cov, theirs.cov) <= 1e-5

    assert [finding for finding in folded.diagnose() if finding.node == new.name] == []
    new.least = float(new.deviation.sort().values[1])  # all but one band vary as much
    faintest = int(new.deviation.argmin())
    nm = int(batches[0]["wavelengths"][0, faintest])
    (finding,) = (finding for finding in folded.diagnose() if finding.node == new.name)
    assert finding.message == f"band {faintest} ({nm} nm) is faint in {pixels} pixels"


@pytest.mark.slow
def test_a_new_node_is_trained(demo_trainrun, tmp_path, ray_session):
    trainrun = load_trainrun(demo_trainrun)
    initialization, new, bce = fitted(trainrun, fold=True)
    pipeline = initialization.pipeline
    before = {n.name: {k: v.clone() for k, v in n.state_dict().items()} for n in pipeline.nodes()}
    pipeline.unfreeze_nodes_by_name([new.name])
    config = trainrun.config.training.model_copy(
        update={"scheduler": None, "callbacks": None, "max_epochs": 1}
    )
    trainer = GradientTrainer(
        pipeline, trainrun.datamodule(), [bce],
        training_config=config, scaling=scaling_of(train_workers=0, workers=0), output_dir=tmp_path,
    )  # fmt: skip
    trainer.fit()
    for node in pipeline.nodes():
        same = [torch.equal(before[node.name][k], v) for k, v in node.state_dict().items()]
        assert not any(same) if node is new else all(same), node.name
    assert all(value.isfinite().all() for value in new.state_dict().values())
