# ruff: noqa: RUF012  (specs of nodes are class attributes, as upstream declares them)
"""Labelled frames that need no fit, and metric nodes unlike those of the catalog.

A module of its own, so that workers can import it.
"""

from __future__ import annotations

import torch
from cuvis_ai.node.data import LentilsAnomalyDataNode
from cuvis_ai.node.deciders.two_stage_decider import TwoStageBinaryDecider
from cuvis_ai.node.metrics import AnomalyDetectionMetrics, ScoreStatisticsMetric
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import ExecutionStage, NodeCategory, NodeTag
from cuvis_ai_schemas.execution import Metric
from cuvis_ai_schemas.pipeline import PortSpec
from faults import FragileCubes
from torch.utils.data import DataLoader
from torchmetrics import MaxMetric
from torchmetrics.classification import BinaryAveragePrecision, BinaryCalibrationError


class FirstBand(Node):
    """Scores a pixel by its first band."""

    _category = NodeCategory.TRANSFORM
    _tags = frozenset({NodeTag.ANOMALY})
    INPUT_SPECS = {"data": PortSpec(dtype=torch.float32, shape=(-1, -1, -1, -1))}
    OUTPUT_SPECS = {
        "scores": PortSpec(dtype=torch.float32, shape=(-1, -1, -1, 1)),
        "plane": PortSpec(dtype=torch.float32, shape=(-1, -1, -1)),
    }

    def forward(self, data, **_):
        return {"scores": data[..., :1], "plane": data[..., 0]}


class Trail(Node):
    """Adds what it saw before to a frame; it keeps that in no tensor of its own."""

    _category = NodeCategory.TRANSFORM
    _tags = frozenset({NodeTag.TRACKING})
    INPUT_SPECS = {"data": PortSpec(dtype=torch.float32, shape=(-1, -1, -1, -1))}
    OUTPUT_SPECS = {"normalized": PortSpec(dtype=torch.float32, shape=(-1, -1, -1, -1))}
    seen = 0.0

    def forward(self, data, **_):
        output = data + self.seen
        self.seen += float(data.mean())
        return {"normalized": output}


class Count(Trail):
    """The same, and its tags do not say so."""

    _tags = frozenset()


class ExactMetrics(Node):
    """Pooled metrics that keep every score (states that are concatenated)."""

    _category = NodeCategory.METRIC
    _tags = frozenset({NodeTag.EVALUATION})
    EXECUTION_STAGES = {ExecutionStage.VAL, ExecutionStage.TEST}
    POOLED_METRIC_NAMES = frozenset({"exact_ap", "calibration_error"})
    INPUT_SPECS = {
        "scores": PortSpec(dtype=torch.float32, shape=(-1, -1, -1, 1)),
        "targets": PortSpec(dtype=torch.bool, shape=(-1, -1, -1, 1)),
    }
    OUTPUT_SPECS = {"metrics": PortSpec(dtype=list, shape=())}

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.pooled = torch.nn.ModuleDict(
            {"exact_ap": BinaryAveragePrecision(), "calibration_error": BinaryCalibrationError()}
        )

    def pooled_metrics(self):
        return dict(self.pooled)

    def forward(self, scores, targets, context):
        for metric in self.pooled.values():
            metric.update(scores.flatten(), targets.flatten().int())
        values = {name: float(metric.compute()) for name, metric in self.pooled.items()}
        values["batch_idx"] = float(context.batch_idx)
        return {
            "metrics": [
                Metric(name=name, value=value, stage=context.stage, epoch=0, batch_idx=0)
                for name, value in values.items()
            ]
        }


class RunningMaximum(ExactMetrics):
    """A pooled metric that torchmetrics cannot merge."""

    POOLED_METRIC_NAMES = frozenset({"maximum"})

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.pooled = torch.nn.ModuleDict({"maximum": MaxMetric()})

    def forward(self, scores, targets, context):
        self.pooled["maximum"].update(scores)
        return {"metrics": []}


def scoring_pipeline(*, exact=ExactMetrics, before=None):
    """Data, an optional node on the cube, scores, a decider to calibrate, and metrics."""
    data, score = LentilsAnomalyDataNode(normal_class_ids=[0]), FirstBand(name="score")
    decider = TwoStageBinaryDecider(name="decider")
    anomaly, statistics = AnomalyDetectionMetrics(name="anomaly"), ScoreStatisticsMetric(name="st")
    exact = exact(name="exact")
    pipeline = CuvisPipeline("scoring")
    edges = [
        (score.outputs.scores, decider.inputs.logits),
        (score.outputs.scores, anomaly.inputs.logits),
        (score.outputs.scores, exact.inputs.scores),
        (score.outputs.plane, statistics.inputs.scores),
        (decider.outputs.decisions, anomaly.inputs.decisions),
        (data.outputs.mask, anomaly.inputs.targets),
        (data.outputs.mask, exact.inputs.targets),
    ]
    if before is None:
        edges.append((data.outputs.cube, score.inputs.data))
    else:
        edges.append((data.outputs.cube, before.inputs.data))
        edges.append((before.outputs.normalized, score.inputs.data))
    pipeline.connect(*edges)
    return pipeline


class LabelledCubes(FragileCubes):
    """Frames of :class:`FragileCubes` with a mask; one of them may be damaged."""

    damaged: int | None = None

    @property
    def rows(self):
        return [
            {"source": "field.cu3s", "index": i, "materialized_path": f"frames/{i}.npz"}
            for i in range(len(self))
        ]

    def __getitem__(self, index):
        item = super().__getitem__(index)
        if index == self.damaged:
            raise ValueError("File is not a zip file")
        mask = (item["cube"][..., 0] > 0.9) if index % 2 else item["cube"][..., 0] > 2
        return item | {"mask": mask.astype("int32")}


class LabelledModule:
    """Twelve frames as val and as test split, in batches that leave a small one over."""

    def __init__(self, folder, batch_size=5, fragile=False, **options):
        self.val_ds = self.test_ds = LabelledCubes(folder, fragile)
        self.options = {"batch_size": batch_size, **options}

    def setup(self, stage):
        pass

    def val_dataloader(self):
        return DataLoader(self.val_ds, **self.options)

    test_dataloader = val_dataloader
