"""Which nodes belong to rank 0, and what does a silenced pipeline still do?"""

from __future__ import annotations

import pytest
from cuvis_ai.node.anomaly_visualization import ScoreHeatmapVisualizer
from cuvis_ai.node.monitor import TensorBoardMonitorNode
from cuvis_ai_schemas.enums import ExecutionStage
from gradients import initialized
from ray import cloudpickle

from cuvis_dist.archive import open_archive
from cuvis_dist.nodes.sinks import close_sinks, rank_zero_nodes, silence_sinks
from cuvis_dist.runs.trainrun import load_trainrun


@pytest.fixture
def shown(demo_trainrun, tmp_path):
    """The demo's pipeline with pictures on a TensorBoard, and a first validation batch."""
    trainrun = initialized(demo_trainrun, tmp_path)
    pipeline = trainrun.pipeline
    named = {node.name: node for node in pipeline.nodes()}
    heatmap = ScoreHeatmapVisualizer(name="heatmap", up_to=1)
    board = TensorBoardMonitorNode(name="board", output_dir=str(tmp_path / "runs"))
    pipeline.connect(
        (named["logit_head"].outputs.logits, heatmap.inputs.scores),
        (heatmap.outputs.artifacts, board.inputs.artifacts),
        (named["metrics_anomaly"].outputs.metrics, board.inputs.metrics),
    )
    batch = open_archive(trainrun.datamodule(), "val").read(0)
    return pipeline, batch, tmp_path / "runs"


def test_sinks_and_what_only_they_read(shown, demo_trainrun):
    pipeline, _, _ = shown
    assert {node.name for node in rank_zero_nodes(pipeline)} == {"heatmap", "board"}
    assert rank_zero_nodes(load_trainrun(demo_trainrun).pipeline) == []


def test_a_silenced_pipeline_computes_and_writes_nothing(shown):
    pipeline, batch, runs = shown
    spoken = pipeline.forward(batch=batch, stage=ExecutionStage.VAL)
    close_sinks(pipeline)
    assert len(list(runs.iterdir())) == 1
    silence_sinks(pipeline)
    silent = pipeline.forward(batch=batch, stage=ExecutionStage.VAL)
    assert len(list(runs.iterdir())) == 1
    assert set(spoken) - set(silent) == {("heatmap", "artifacts")}
    assert ("metrics_anomaly", "metrics") in silent


def test_a_board_goes_on_in_its_folder_in_another_process(shown):
    pipeline, batch, runs = shown
    pipeline.forward(batch=batch, stage=ExecutionStage.VAL)
    close_sinks(pipeline)
    (folder,) = runs.iterdir()
    before = {path.name for path in folder.iterdir()}
    sent = cloudpickle.loads(cloudpickle.dumps(pipeline))
    sent.forward(batch=batch, stage=ExecutionStage.TEST)
    close_sinks(sent)
    assert list(runs.iterdir()) == [folder]
    assert {path.name for path in folder.iterdir()} > before
    close_sinks(pipeline)
    assert sent.serialize().nodes == pipeline.serialize().nodes, "nothing of it is saved"
