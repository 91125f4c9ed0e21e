"""Which pipelines are trained to see that every class of cuvis.ai trains as in one process?

Small ones, around one loss or node each. Each case makes its pipeline anew, and its loss nodes.
"""

# ruff: noqa: RUF012 (ports are declared as upstream declares them)

from __future__ import annotations

import torch
from cuvis_ai.node.anomaly.deep_svdd import (
    DeepSVDDCenterTracker,
    DeepSVDDProjection,
    ZScoreNormalizerGlobal,
)
from cuvis_ai.node.channel_mixer import ConcreteChannelMixer, LearnableChannelMixer
from cuvis_ai.node.channel_selector import (
    CIRSelector,
    FastRGBSelector,
    HighContrastSelector,
    SoftChannelSelector,
)
from cuvis_ai.node.data import AnomalyDataNode
from cuvis_ai.node.dimensionality_reduction import PCA, TrainablePCA
from cuvis_ai.node.losses import (
    AnomalyBCEWithLogits,
    CrossEntropyLoss,
    DeepSVDDSoftBoundaryLoss,
    DiceLoss,
    DistinctnessLoss,
    ForegroundContrastLoss,
    IoULoss,
    MSEReconstructionLoss,
    OrthogonalityLoss,
    SelectorDiversityRegularizer,
    SelectorEntropyRegularizer,
)
from cuvis_ai.node.normalization import PercentileNormalizer, SigmoidTransform, ZScoreNormalizer
from cuvis_ai.node.patch_inference import PatchSampler
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.pipeline import PortSpec
from steps import BANDS, frames
from torch import nn

CASES = {}


def case(*args):
    """Register a case under the function's name, or one for each named argument."""

    def register(function):
        for arguments in args or ((),):
            said = [getattr(each, "__name__", str(each)) for each in arguments]
            name = "-".join([function.__name__, *said])
            CASES[name] = _Case(function.__name__, arguments)
        return function

    return register


class _Case:
    """A case that can be sent to another process."""

    def __init__(self, function, arguments):
        self.function, self.arguments = function, arguments

    def __call__(self):
        return globals()[self.function](*self.arguments)


def data():
    return AnomalyDataNode(normal_class_ids=[0], name="data")


def mixer(channels, name="mixer", **options):
    options = {"normalize_output": False, "use_activation": False} | options
    node = LearnableChannelMixer(BANDS, channels, name=name, **options)
    node.unfreeze()
    return node


def built(*connections, losses):
    pipeline = CuvisPipeline("case")
    pipeline.connect(*connections)
    return pipeline, losses


def head(loss, source="cube", channels=1, **options):
    """data -> mixer -> loss on scores."""
    source_node, scores = data(), mixer(channels)
    predictions, targets = loss.INPUT_SPECS
    target = source_node.outputs.mask
    return built(
        (source_node.outputs.cube, scores.inputs.data),
        (scores.outputs.rgb, loss._input_ports[predictions]),
        (target, loss._input_ports[targets]),
        losses=[loss],
    )


@case(("mean",), ("sum",))
def bce(reduction):
    return head(AnomalyBCEWithLogits(reduction=reduction, pos_weight=3.0))


@case(("sigmoid",), ("clamp",), ("minmax",))
def iou(method):
    return head(IoULoss(normalize_method=method))


@case(("mean",), ("sum",))
def mse(reduction):
    source, down, loss = data(), mixer(BANDS), MSEReconstructionLoss(reduction=reduction)
    return built(
        (source.outputs.cube, down.inputs.data),
        (down.outputs.rgb, loss.inputs.reconstruction),
        (source.outputs.cube, loss.inputs.target),
        losses=[loss],
    )


class Labels(Node):
    """The mask of the batch as classes; nobody described it."""

    INPUT_SPECS = {"mask": PortSpec(torch.int32, (-1, -1, -1))}
    OUTPUT_SPECS = {
        "labels": PortSpec(torch.int32, (-1, -1, -1)),
        "long": PortSpec(torch.int64, (-1, -1, -1)),
    }

    def forward(self, mask, **_):
        return {"labels": mask.clone(), "long": mask.long()}


def segmentation(loss, channels=3):
    source, labels, logits = data(), Labels(), mixer(channels)
    return built(
        (source.outputs.cube, logits.inputs.data),
        (logits.outputs.rgb, loss.inputs.logits),
        (labels.outputs.labels, loss.inputs.targets),
        losses=[loss],
    )


@case(("plain",), ("weights",), ("ignore",))
def cross_entropy(kind):
    options = {"weights": {"class_weights": [0.2, 1.0, 3.0]}, "ignore": {"ignore_index": 2}}
    return segmentation(CrossEntropyLoss(**options.get(kind, {})))


@case((1,), (3,))
def dice(channels):
    return segmentation(DiceLoss(ignore_index=2 if channels == 1 else None), channels)


@case((0.0, "rgb"), (0.5, "oklab"))
def contrast(compactness, space):
    source, labels, rgb, squash = data(), Labels(), mixer(3), SigmoidTransform()
    loss = ForegroundContrastLoss(
        compactness_weight=compactness, anchor_weight=compactness, color_space=space
    )
    return built(
        (source.outputs.cube, rgb.inputs.data),
        (rgb.outputs.rgb, squash.inputs.data),
        (squash.outputs.transformed, loss.inputs.rgb),
        (labels.outputs.labels, loss.inputs.mask),
        losses=[loss],
    )


@case()
def svdd():
    source, scale, down = (
        data(),
        ZScoreNormalizerGlobal(num_channels=BANDS),
        DeepSVDDProjection(in_channels=BANDS, rep_dim=4, hidden=6),
    )
    tracker, loss = DeepSVDDCenterTracker(rep_dim=4), DeepSVDDSoftBoundaryLoss()
    scale.statistical_initialization(iter([{"data": frames()["cube"]}]))
    tracker.statistical_initialization(iter([{"embeddings": torch.ones(1, 1, 2, 4)}]))
    scale.unfreeze()
    down.unfreeze()
    return built(
        (source.outputs.cube, scale.inputs.data),
        (scale.outputs.normalized, down.inputs.data),
        (down.outputs.embeddings, tracker.inputs.embeddings),
        (down.outputs.embeddings, loss.inputs.embeddings),
        (tracker.outputs.center, loss.inputs.center),
        losses=[loss],
    )


@case()
def orthogonality():
    source, pca = data(), TrainablePCA(num_channels=BANDS, n_components=3)
    pca.statistical_initialization(iter([{"data": frames()["cube"]}]))
    pca.unfreeze()
    loss, fit = OrthogonalityLoss(weight=0.5), ToMask(3)
    return built(
        (source.outputs.cube, pca.inputs.data),
        (pca.outputs.components, loss.inputs.components),
        (pca.outputs.projected, fit.inputs.values),
        losses=[loss, fit],
    )


@case(("variance",), ("entropy",))
def selector(kind):
    source, gate = data(), SoftChannelSelector(n_select=3, input_channels=BANDS)
    gate.unfreeze()
    regularizer = {
        "variance": SelectorDiversityRegularizer, "entropy": SelectorEntropyRegularizer
    }[kind](weight=0.3)  # fmt: skip
    fit = ToMask(BANDS)
    return built(
        (source.outputs.cube, gate.inputs.data),
        (gate.outputs.selected, fit.inputs.values),
        (gate.outputs.weights, regularizer.inputs.weights),
        losses=[regularizer, fit],
    )


@case()
def concrete():
    source, mix = data(), ConcreteChannelMixer(BANDS, 3, max_epochs=3)
    mix.unfreeze()
    loss, fit = DistinctnessLoss(weight=0.2), ToMask(3)
    return built(
        (source.outputs.cube, mix.inputs.data),
        (mix.outputs.selection_weights, loss.inputs.selection_weights),
        (mix.outputs.rgb, fit.inputs.values),
        losses=[loss, fit],
    )


@case((None,), ((BANDS, 5, 3),))
def mixer_with_batch_norm(scheme):
    source = data()
    mix = mixer(3, normalize_output=True, reduction_scheme=list(scheme) if scheme else None)
    fit = ToMask(3)
    return built(
        (source.outputs.cube, mix.inputs.data), (mix.outputs.rgb, fit.inputs.values), losses=[fit]
    )


def through(node, channels, port="data", **more):
    """data -> node -> mixer -> a mean loss."""
    source, mix, fit = (
        data(),
        LearnableChannelMixer(
            channels, 2, normalize_output=False, use_activation=False, name="mixer"
        ),
        ToMask(2),
    )
    mix.unfreeze()
    (output, *_) = node.OUTPUT_SPECS
    if "wavelengths" in node.INPUT_SPECS:
        more = {"wavelengths": source.outputs.wavelengths}
    return built(
        (source.outputs.cube, node._input_ports[port]),
        *((value, node._input_ports[name]) for name, value in more.items()),
        (node._output_ports[output], mix.inputs.data),
        (mix.outputs.rgb, fit.inputs.values),
        losses=[fit],
    )


@case((2, 4), (10, 20))
def running_percentiles(warmup, freeze):
    return through(
        PercentileNormalizer(
            BANDS, running_warmup_frames=warmup, freeze_running_bounds_after_frames=freeze
        ),
        BANDS,
    )


@case()
def z_score_over_frames():
    return through(ZScoreNormalizer(dims=[0, 1, 2]), BANDS)


@case(("CIRSelector",), ("HighContrastSelector",), ("FastRGBSelector",))
def running_selector(name):
    node = {
        "CIRSelector": lambda: CIRSelector(norm_mode="running", running_warmup_frames=2),
        "HighContrastSelector": lambda: HighContrastSelector(norm_mode="per_frame"),
        "FastRGBSelector": lambda: FastRGBSelector(),
    }[name]()
    return through(node, 3, port="cube")


@case()
def last_frames_components():
    source, pca, fit = data(), PCA(n_components=BANDS), Together()
    mix = mixer(BANDS)
    return built(
        (source.outputs.cube, mix.inputs.data),
        (source.outputs.cube, pca.inputs.data),
        (mix.outputs.rgb, fit.inputs.values),
        (pca.outputs.components, fit.inputs.whole),
        losses=[fit],
    )


@case()
def patches():
    source, labels, sampler = data(), Labels(), PatchSampler(patch_size=3, samples_per_frame=4)
    mix, fit = mixer(2), ToLabels()
    return built(
        (source.outputs.cube, sampler.inputs.cube),
        (labels.outputs.long, sampler.inputs.targets),
        (sampler.outputs.patches, mix.inputs.data),
        (mix.outputs.rgb, fit.inputs.values),
        (sampler.outputs.labels, fit.inputs.labels),
        losses=[fit],
    )


# ---- nodes that nobody described -------------------------------------------------------

IMAGE = PortSpec(torch.float32, (-1, -1, -1, -1))
NUMBER = PortSpec(torch.float32, ())


class ToMask(Node):
    """A loss that is a mean over frames."""

    INPUT_SPECS = {"values": IMAGE, "mask": PortSpec(torch.int32, (-1, -1, -1))}
    OUTPUT_SPECS = {"loss": NUMBER}

    def __init__(self, channels=1, **options):
        super().__init__(channels=channels, **options)
        self.channels = channels

    def forward(self, values, mask, **_):
        return {"loss": (values.mean(-1).tanh() - mask.float()).square().mean()}


class ToLabels(Node):
    """A mean over patches, of which a batch has any number."""

    INPUT_SPECS = {"values": IMAGE, "labels": PortSpec(torch.int64, (-1,))}
    OUTPUT_SPECS = {"loss": NUMBER}

    def forward(self, values, labels, **_):
        return {"loss": (values.mean((1, 2, 3)) - labels.float()).square().mean()}


class Together(Node):
    """A loss of the batch's images and of something that all frames share."""

    INPUT_SPECS = {"values": IMAGE, "whole": PortSpec(torch.float32, (-1, -1))}
    OUTPUT_SPECS = {"loss": NUMBER}

    def forward(self, values, whole, **_):
        return {"loss": (values @ whole.abs().T).square().mean()}


class Refiner(Node):
    """A small network with batch norms, trained."""

    INPUT_SPECS = {"data": IMAGE}
    OUTPUT_SPECS = {"out": IMAGE}

    def __init__(self, **options):
        super().__init__(**options)
        self.net = nn.Sequential(
            nn.Conv2d(BANDS, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(),
            nn.Conv2d(5, BANDS, 1), nn.BatchNorm2d(BANDS, momentum=None),
        )  # fmt: skip

    def forward(self, data, **_):
        return {"out": self.net(data.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}


class Memory(Node):
    """A Python list that grows, and what it says goes into the output."""

    INPUT_SPECS = {"data": IMAGE}
    OUTPUT_SPECS = {"out": IMAGE}

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []
        self.scale = nn.Parameter(torch.ones(BANDS))

    def forward(self, data, **_):
        self.seen.append(float(data.detach().mean()))
        level = sum(self.seen) / len(self.seen)
        return {"out": data * self.scale / (1 + level)}


class Noise(Node):
    """Noise for every pixel, dropout, and a NumPy number."""

    INPUT_SPECS = {"data": IMAGE}
    OUTPUT_SPECS = {"out": IMAGE}

    def __init__(self, **options):
        super().__init__(**options)
        self.drop = nn.Dropout(0.3)
        self.scale = nn.Parameter(torch.ones(BANDS))

    def forward(self, data, **_):
        noisy = data + 0.1 * torch.randn_like(data)
        return {"out": self.drop(noisy) * self.scale}


class Jitter(Node):
    """One draw for the whole batch."""

    INPUT_SPECS = {"data": IMAGE}
    OUTPUT_SPECS = {"out": IMAGE}

    def __init__(self, **options):
        super().__init__(**options)
        self.scale = nn.Parameter(torch.ones(BANDS))

    def forward(self, data, **_):
        return {"out": data * (self.scale + 0.3 * torch.rand(BANDS))}


class Contrast(Node):
    """Frames against all frames of the batch: a joint node in the middle."""

    INPUT_SPECS = {"data": IMAGE}
    OUTPUT_SPECS = {"out": IMAGE, "level": PortSpec(torch.float32, (-1,))}

    def __init__(self, **options):
        super().__init__(**options)
        self.mix = nn.Linear(BANDS, BANDS)

    def forward(self, data, **_):
        mixed = self.mix(data)
        level = mixed.mean((0, 1, 2))
        return {"out": mixed - level, "level": level}


class Ratio(Node):
    """Two ports read together, as a ratio over the batch, and a sum behind it."""

    INPUT_SPECS = {"a": IMAGE, "b": IMAGE, "level": PortSpec(torch.float32, (-1,))}
    OUTPUT_SPECS = {"ratio": NUMBER, "level_loss": NUMBER}

    def forward(self, a, b, level, **_):
        return {
            "ratio": (a * b).sum() / (1 + a.square().sum()),
            "level_loss": level.square().sum(),
        }


@case((Refiner,), (Memory,), (Noise,), (Jitter,))
def unknown(node_class):
    return through(node_class(name="strange"), BANDS)


@case()
def unknown_in_the_middle():
    source, before, middle, behind = data(), mixer(BANDS, "before"), Contrast(), mixer(BANDS)
    ratio, fit = Ratio(), ToMask(BANDS)
    return built(
        (source.outputs.cube, before.inputs.data),
        (before.outputs.rgb, middle.inputs.data),
        (middle.outputs.out, behind.inputs.data),
        (behind.outputs.rgb, fit.inputs.values),
        (behind.outputs.rgb, ratio.inputs.a),
        (before.outputs.rgb, ratio.inputs.b),
        (middle.outputs.level, ratio.inputs.level),
        losses=[ratio, fit],
    )
