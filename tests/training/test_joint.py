"""Do steps on ranks equal those of one process, for every loss and every joint node?

In float64, where rounding cannot hide anything, and in the float32 of upstream.
"""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
from contextlib import nullcontext
from types import SimpleNamespace

import cuvis_ai.node
import pytest
import torch
from cases import CASES
from cuvis_ai.node.losses import LossNode
from cuvis_ai_core.node import Node
from cuvis_ai_core.training.config import TrainingConfig
from cuvis_ai_schemas.enums import ExecutionStage
from ranks import Ranks
from steps import (
    BATCHES,
    OPTIMIZERS,
    Run,
    chosen,
    deviation,
    deviations,
    frames,
    state_of,
    steps,
    steps_on_ranks,
)

from cuvis_dist.errors import InputError
from cuvis_dist.nodes.batching import is_always_joint, is_classed
from cuvis_dist.nodes.probing import random_states
from cuvis_dist.nodes.survey import evolving_nodes, training_survey
from cuvis_dist.nodes.treatment import Treatment
from cuvis_dist.training.assignment import TrainerParts
from cuvis_dist.training.module import RankTrainer


def catalog():
    """Every node class of the installed cuvis-ai."""
    classes = set()
    for module in pkgutil.walk_packages(cuvis_ai.node.__path__, "cuvis_ai.node."):
        for value in vars(importlib.import_module(module.name)).values():
            if inspect.isclass(value) and issubclass(value, Node):
                classes.add(value)
    return sorted(
        (cls for cls in classes if cls.__module__.startswith("cuvis_ai.")),
        key=lambda cls: cls.__name__,
    )


@pytest.fixture(scope="module")
def ranks():
    pool = Ranks("cases")
    yield pool
    pool.close()


#: Cases with nodes that compute in float32 whatever they are given.
IN_FLOAT32 = ("bce", "contrast", "running", "last_frames_components")


@pytest.mark.parametrize(
    "world_size",
    [
        pytest.param(1, marks=pytest.mark.long),
        pytest.param(2, marks=pytest.mark.long),
        3,
    ],
)
@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_one_process(ranks, name, world_size):
    single = name.startswith(IN_FLOAT32)
    # Sums in another order round otherwise: in float32 1.4e-5 of how far a weight moved.
    tolerance, least = (2e-5, 0.01) if single else (1e-8, 1.0)
    for optimizer in OPTIMIZERS:
        for sizes in BATCHES.values():
            run = Run(CASES[name], optimizer, sizes, torch.float32 if single else torch.float64)
            expected = steps(run)
            assert all(map(math.isfinite, expected.losses))
            for trained in ranks.run(world_size, steps_on_ranks, run):
                where = (optimizer, sizes, trained.plan)
                assert trained.losses == pytest.approx(expected.losses, rel=tolerance), where
                found = deviations(trained, expected, least)
                assert not {k: v for k, v in found.items() if v > tolerance}, where


#: Parameters whose gradient is zero in exact arithmetic, by case.
IDLE = {
    "iou-minmax": "mixer.convs.0.bias",  # minimum and maximum of the scores move along
    "mixer_with_batch_norm-None": "mixer.convs.0.bias",  # so does the mean of a batch
}


@pytest.mark.parametrize("name", IDLE)
def test_adamw_moves_by_rounding_what_has_no_gradient(name):
    """It divides the rounding of a gradient by its size: so in one process, against itself.

    With the frames of each batch in the other order, all else agrees.
    """
    there, back = (steps(Run(CASES[name], "adamw", (4, 3), reverse=way)) for way in (False, True))
    found = deviations(back, there)
    assert found.pop(IDLE[name]) > 1e-2
    assert all(v < 1e-4 for k, v in found.items() if "running_mean" not in k), found
    exact, other = (
        steps(Run(CASES[name], "adamw", (4, 3), torch.float64, way)) for way in (False, True)
    )
    assert max(deviations(other, exact, 1.0).values()) < 1e-8


# ---- what is known, and what a probe finds ---------------------------------------------


@pytest.mark.parametrize("node_class", catalog(), ids=lambda cls: cls.__name__)
def test_a_class_is_known(node_class):
    assert is_classed(node_class), (
        f"{node_class.__name__} is new: say in cuvis_dist/nodes/batching.py how it treats the "
        "frames of a batch"
    )


#: Of joint nodes, and of those with batch norms or noise, the cases that train them.
TRAINED = {name: {type(node).__name__ for node in CASES[name]()[0].nodes()} for name in CASES}
#: Known as joint, and in no case: they are not in a training step, or they write, show or count.
NOT_TRAINED = {
    "AnomalyDetectionMetrics", "AnomalyMask", "AnomalyPixelStatisticsMetric", "BBoxPrompt",
    "BBoxRoiCropNode", "BBoxSpectralExtractor", "BBoxesOverlayNode", "BlobDetector",
    "ChannelSelectorFalseRGBViz", "ChannelWeightsViz", "ClassMapAccumulator",
    "CocoTrackBBoxWriter", "CocoTrackMaskWriter", "ComponentOrthogonalityMetric",
    "CubeRGBVisualizer", "DetectionCocoJsonNode", "DetectionJsonReader",
    "ExplainedVarianceMetric", "ImageArtifactVizBase", "LossNode", "MajorityVoteByBlob",
    "MaskPrompt", "MaskToBBoxKalman", "NumpyFeatureWriterNode", "OcclusionNodeBase",
    "PCAVisualization", "PipelineComparisonVisualizer", "PngWriter", "PointPrompt",
    "PoissonCubeOcclusionNode", "PoissonOcclusionNode", "RGBAnomalyMask",
    "ScoreHeatmapVisualizer", "ScoreStatisticsMetric", "SelectorDiversityMetric",
    "SelectorEntropyMetric", "SignaturesToReferences", "SolidOcclusionNode",
    "SpectralSignatureExtractor", "SpectrumPlotNode", "TensorBoardMonitorNode", "TextPrompt",
    "ToImage", "ToVideoNode", "TopKIndices", "TrackingOverlayNode",
    "TrackingPointerOverlayNode", "TrackingResultsReader", "_BaseCocoTrackWriter",
    "_BaseJsonWriterNode",
}  # fmt: skip


def test_every_loss_and_joint_class_is_trained_in_a_case():
    always_joint = {cls.__name__ for cls in catalog() if is_always_joint(cls)}
    losses = {cls.__name__ for cls in catalog() if issubclass(cls, LossNode)}
    assert always_joint | losses == set().union(*TRAINED.values()) & (
        always_joint | losses
    ) | NOT_TRAINED & (always_joint | losses)


PROBED = {
    "DiceLoss": ("dice-3", Treatment.JOINT),
    "AnomalyBCEWithLogits": ("bce-mean", Treatment.MEAN),
    "CrossEntropyLoss": ("cross_entropy-plain", Treatment.JOINT),
    "ForegroundContrastLoss": ("contrast-0.0-rgb", Treatment.JOINT),
    "IoULoss": ("iou-sigmoid", Treatment.JOINT),
    "MSEReconstructionLoss": ("mse-sum", Treatment.JOINT),
    "DeepSVDDSoftBoundaryLoss": ("svdd", Treatment.MEAN),
    "DeepSVDDCenterTracker": ("svdd", Treatment.JOINT),
    "ConcreteChannelMixer": ("concrete", Treatment.PER_FRAME),
    "LearnableChannelMixer": ("mixer_with_batch_norm-None", Treatment.PER_FRAME),
    "PercentileNormalizer": ("running_percentiles-2-4", Treatment.JOINT),
    "CIRSelector": ("running_selector-CIRSelector", Treatment.JOINT),
    "FastRGBSelector": ("running_selector-FastRGBSelector", Treatment.JOINT),
    "HighContrastSelector": ("running_selector-HighContrastSelector", Treatment.JOINT),
    "ZScoreNormalizer": ("z_score_over_frames", Treatment.JOINT),
    "SoftChannelSelector": ("selector-variance", Treatment.PER_FRAME),
    "TrainablePCA": ("orthogonality", Treatment.PER_FRAME),
    "PCA": ("last_frames_components", Treatment.JOINT),
    "PatchSampler": ("patches", Treatment.JOINT),
}


@pytest.mark.parametrize("name", PROBED)
def test_a_probe_finds_what_is_written_down(name, monkeypatch):
    case, treatment = PROBED[name]
    pipeline, losses = CASES[case]()
    two = frames(2)
    written = training_survey(pipeline, two, chosen(two, slice(1)), losses)
    monkeypatch.setattr("cuvis_dist.nodes.survey.known", lambda node, use: None)
    found = training_survey(pipeline, two, chosen(two, slice(1)), losses)
    (node,) = (node for node in pipeline.nodes() if type(node).__name__ == name)
    assert found[node.name].batching.found
    for plan in (written[node.name], found[node.name]):
        assert plan.batching.treatment is treatment, plan
    for fact in ("random", "batch_norms"):
        assert getattr(found[node.name].batching, fact) == getattr(
            written[node.name].batching, fact
        )
    assert found[node.name].inputs == written[node.name].inputs


def test_a_survey_leaves_nodes_and_random_states_as_they_are():
    for name in ("unknown-Memory", "unknown-Refiner", "running_percentiles-2-4", "patches"):
        pipeline, losses = CASES[name]()
        two, before, drawn = frames(2), state_of(pipeline), random_states()
        training_survey(pipeline, two, chosen(two, slice(1)), losses)
        after = state_of(pipeline)
        assert all(deviation(after[k], v, v, 1.0) == 0 for k, v in before.items()), name
        assert random_states() == drawn


@pytest.mark.parametrize(
    ("name", "evolving"),
    [
        ("unknown-Memory", ["strange"]),
        ("unknown-Noise", ["strange"]),
        ("unknown-Refiner", []),
        ("running_percentiles-10-20", ["PercentileNormalizer"]),
        ("svdd", []),
        ("bce-mean", []),
    ],
)
def test_nodes_that_change_in_validation_are_found(name, evolving):
    pipeline, _ = CASES[name]()
    assert evolving_nodes(pipeline, lambda: frames(2), ExecutionStage.VAL) == evolving


def test_what_is_unfrozen_after_ddp_was_set_up_is_refused():
    """Its gradients would not meet: each rank would go its own way."""
    pipeline, losses = CASES["dice-3"]()
    (mixer,) = (node for node in pipeline.nodes() if node.name == "mixer")
    _, *later = mixer.parameters()
    names = [losses[0].name]
    parts = TrainerParts(pipeline, None, names, [], TrainingConfig(), [], [])
    for world_size in (1, 2):
        for parameter in later:
            parameter.requires_grad_(False)
        module = RankTrainer(
            parts, SimpleNamespace(rank=0, world_size=world_size), TrainingConfig(), None
        )
        module.configure_optimizers()
        module.on_train_epoch_start()
        later[0].requires_grad_(True)
        said = r"mixer\..* after training had begun on 2 workers"
        refused = pytest.raises(InputError, match=said) if world_size > 1 else nullcontext()
        with refused:
            module.on_train_epoch_start()
