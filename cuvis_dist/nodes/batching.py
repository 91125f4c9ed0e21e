"""How does a node treat the frames of a training batch: per frame, as a mean, or jointly?

What is written here for the classes of cuvis.ai was read in their ``forward``; what nobody wrote
down is found out by running the node (:mod:`cuvis_dist.nodes.probing`). Classes are named, not
imported: a pipeline that does not use a node should not load it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cuvis_ai_core.node.node import Node
from cuvis_ai_schemas.enums import ExecutionStage

from cuvis_dist.nodes.treatment import Batching, Treatment, Use

_EVALUATING = (ExecutionStage.VAL, ExecutionStage.TEST)
_ALONE = Batching(Treatment.PER_FRAME, "treats each frame by itself")


def _joint(why: str, **more: Any) -> Batching:
    return Batching(Treatment.JOINT, why, **more)


def _mean(why: str = "is a mean over pixels") -> Batching:
    return Batching(Treatment.MEAN, why)


def known(node: Node, use: Use) -> Batching | None:
    """Return what is written down about a node of exactly this class, or None."""
    fact = _FACTS.get(f"{type(node).__module__}.{type(node).__qualname__}")
    return fact(node, use) if callable(fact) else fact


def is_classed(node_class: type[Node]) -> bool:
    """Whether something is written down about the class."""
    return f"{node_class.__module__}.{node_class.__qualname__}" in _FACTS


def is_always_joint(node_class: type[Node]) -> bool:
    """Whether the class is written down as joint, whatever its settings."""
    fact = _FACTS.get(f"{node_class.__module__}.{node_class.__qualname__}")
    return isinstance(fact, Batching) and fact.treatment is Treatment.JOINT


# ---- settings that decide --------------------------------------------------------------


def _reduced(node: Any, use: Use) -> Batching:
    return _mean() if node.reduction == "mean" else _joint("adds up over the batch")


def _tracked_center(node: Any, use: Use) -> Batching:
    return _joint(
        "moves its centre with every batch", evolves=_EVALUATING if node.update_in_eval else ()
    )


def _mixer(node: Any, use: Use) -> Batching:
    if not node.normalize_output:
        return _ALONE
    why = "treats each frame by itself, but for its batch norm"
    return Batching(Treatment.PER_FRAME, why, batch_norms=True)


def _running(why: str) -> Batching:
    return _joint(why, evolves=(*_EVALUATING, ExecutionStage.INFERENCE))


_BOUNDS_MOVE = "its bounds move with every frame"


def _percentiles(node: Any, use: Use) -> Batching:
    return _running(_BOUNDS_MOVE) if node.norm_mode == "running" else _ALONE


def _bands(node: Any, use: Use) -> Batching:
    normalizes = getattr(node, "_effective_normalize_output", node.normalize_output)
    if normalizes and node.norm_mode == "running":
        return _running(_BOUNDS_MOVE)
    return _ALONE


def _contrast_bands(node: Any, use: Use) -> Batching:
    return _running(_BOUNDS_MOVE) if _bands(node, use) is not _ALONE else _joint(_FIRST)


def _fast_rgb(node: Any, use: Use) -> Batching:
    scales = node.normalization_strength > 1e-3
    return _joint("scales with the mean over the batch") if scales else _ALONE


def _over_dimensions(node: Any, use: Use) -> Batching:
    """Class a node by whether the dimensions that it reduces include the frames."""
    dims = node.dims if hasattr(node, "dims") else node.reduce_dims
    over_batch = dims is not None and any(dim in (0, -4) for dim in dims)
    return _joint("reduces over the frames of a batch") if over_batch else _ALONE


def _pca(node: Any, use: Use) -> Batching:
    last = use.read & {"components", "explained_variance_ratio"}
    return _joint(f"{' and '.join(sorted(last))}: of the batch's last frame") if last else _ALONE


def _gate(node: Any, use: Use) -> Batching:
    return _running("remembers the scores of earlier frames") if node.smooth_k > 1 else _ALONE


def _patches(node: Any, use: Use) -> Batching:
    """Distinguish a sampler that draws patches, in evaluation too, from one that takes all."""
    if node.mode == "eval":
        return _joint("makes as many patches as a frame has labels", ragged=True)
    why, stages = "draws patches, how many depends on the frame", _running("").evolves
    return _joint(why, random=True, ragged=True, evolves=stages)


def _unless_framed(*ports: str) -> Callable[[Any, Use], Batching]:
    """Per frame as long as these inputs do not come with the frames."""

    def fact(node: Any, use: Use) -> Batching:
        framed = sorted(use.framed & set(ports))
        return _joint(f"mixes each frame with every {framed[0]}") if framed else _ALONE

    return fact


def _counted(node: Any, use: Use) -> Batching:
    return _joint("lists the batch's frames") if "metrics" in use.read else _ALONE


_FIRST = "reads the first frame of a batch"
_CURSOR = "counts the times it was run"
_SHOWN = "shows frames of a batch, on rank 0"
_WRITTEN = "writes, on rank 0"
_METRIC = "is a number of the batch"
_WHOLE = Batching(Treatment.JOINT, "takes what it is given as a whole")

Fact = Batching | Callable[[Any, Use], Batching]

#: By module below ``cuvis_ai.node``: class names, and what holds for them.
_CLASSES: dict[str, list[tuple[str, Fact]]] = {
    "_statistical_fit": [("_StatisticalFitNode", _ALONE)],
    "anomaly.deep_svdd": [
        ("DeepSVDDProjection ZScoreNormalizerGlobal", _ALONE),
        ("DeepSVDDScores", _unless_framed("center")),
        ("DeepSVDDCenterTracker", _tracked_center),
    ],
    "anomaly.lad_detector": [("LADGlobal", _ALONE)],
    "anomaly.rx_detector": [("RXBase RXGlobal RXPerBatch", _ALONE)],
    "anomaly_visualization": [
        (
            "AnomalyMask ChannelSelectorFalseRGBViz ChannelWeightsViz ImageArtifactVizBase "
            "RGBAnomalyMask ScoreHeatmapVisualizer",
            _joint(_SHOWN),
        ),
        ("BBoxesOverlayNode TrackingOverlayNode TrackingPointerOverlayNode", _joint(_FIRST)),
        ("MaskOverlayNode", _ALONE),
    ],
    "blob_detector": [("BlobDetector", _joint(_FIRST))],
    "channel_mixer": [
        ("LearnableChannelMixer", _mixer),
        (
            "ConcreteChannelMixer",
            Batching(Treatment.PER_FRAME, "the same noise for each frame of a batch", random=True),
        ),
    ],
    "channel_selector": [
        (
            "CIETristimulusRGBSelector CIRSelector CameraEmulationFalseRGBSelector "
            "ChannelSelectorBase FixedWavelengthSelector RangeAverageFalseRGBSelector "
            "SupervisedCIRSelector SupervisedFullSpectrumSelector SupervisedSelectorBase "
            "SupervisedWindowedSelector _SupervisedWindowSelectorBase",
            _bands,
        ),
        (
            "CIRedEdgeSelector EVI2Selector EVISelector GNDVISelector MCARISelector "
            "MSAVISelector NBRSelector NDRESelector NDVISelector NDWISelector PRISelector "
            "SAVISelector SoftChannelSelector _ColormappedNormalizedDifferenceSelector "
            "_NormalizedDifferenceIndexBase _VegetationIndexBase",
            _ALONE,
        ),
        ("FastRGBSelector", _fast_rgb),
        ("HighContrastSelector", _contrast_bands),
        ("TopKIndices", _WHOLE),
    ],
    "clustering.gmm": [("GaussianMixtureClusterer", _ALONE)],
    "clustering.kmeans": [("KMeansClusterer", _ALONE)],
    "colormap": [("ClassMapToRGB ScalarHSVColormapNode", _ALONE)],
    "compositing": [
        (
            "ImageConcatenator InsetComposer LabelOverlay LegendStrip ROIZoomNode TitleOverlay",
            _ALONE,
        )
    ],
    "conversion": [("DecisionToMask ScoreToLogit", _ALONE)],
    "data": [("AnomalyDataNode CU3SDataNode LentilsAnomalyDataNode", _ALONE)],
    "deciders.binary_decider": [
        ("BinaryDecider", _ALONE),
        ("ScoreThreshold", _unless_framed("threshold")),
        ("QuantileBinaryDecider", _over_dimensions),
    ],
    "deciders.frame_score_gate": [("FrameScoreGate", _gate)],
    "deciders.multi_range_decider": [("MultiRangeSlicer", _ALONE)],
    "deciders.two_stage_decider": [("TwoStageBinaryDecider", _ALONE)],
    "dimensionality_reduction": [
        ("PCA", _pca),
        ("FixedPCAProjection TrainablePCA", _ALONE),
    ],
    "fusion": [("DecisionFusion ScoreMapFusion", _ALONE)],
    "image_file": [("PngWriter", _joint(_WRITTEN))],
    "json_file": [
        (
            "CocoTrackBBoxWriter CocoTrackMaskWriter DetectionCocoJsonNode "
            "_BaseCocoTrackWriter _BaseJsonWriterNode",
            _joint(_WRITTEN),
        ),
        ("DetectionJsonReader TrackingResultsReader", _running(_CURSOR)),
    ],
    "labels": [("BinaryAnomalyLabelMapper", _ALONE)],
    "losses": [
        ("AnomalyBCEWithLogits MSEReconstructionLoss", _reduced),
        ("CrossEntropyLoss", _joint("its mean leaves out pixels, or weighs them by class")),
        ("DeepSVDDSoftBoundaryLoss", _mean()),
        ("DiceLoss IoULoss", _joint("is a ratio of sums over the batch")),
        (
            "ForegroundContrastLoss",
            _joint("is a mean over those frames that have a foreground"),
        ),
        (
            "DistinctnessLoss LossNode OrthogonalityLoss SelectorDiversityRegularizer "
            "SelectorEntropyRegularizer",
            _WHOLE,
        ),
    ],
    "mask_ops": [
        (
            "ClassMapRobustifier LabelOffset MaskBlobFilter MaskBlobGate MaskComposite "
            "MaskMinArea MaskPeakGate MaskRobustifier NearestLabelFill ScoreMapSuppression",
            _ALONE,
        ),
        ("MajorityVoteByBlob", _joint(_FIRST)),
        ("MaskToBBoxKalman", _running("follows an object from frame to frame")),
    ],
    "metrics": [
        (
            "AnomalyDetectionMetrics AnomalyPixelStatisticsMetric ComponentOrthogonalityMetric "
            "ExplainedVarianceMetric ScoreStatisticsMetric SelectorDiversityMetric "
            "SelectorEntropyMetric",
            _joint(_METRIC),
        ),
        ("DistinctLabelCount", _counted),
    ],
    "monitor": [("TensorBoardMonitorNode", _joint(_WRITTEN))],
    "morphology": [("ShapeMorphology", _ALONE)],
    "normalization": [
        (
            "DisplayNormalizer IdentityNormalizer MinMaxNormalizer PerPixelUnitNorm "
            "SigmoidNormalizer SigmoidTransform _NormalizerBase",
            _ALONE,
        ),
        ("PercentileNormalizer", _percentiles),
        ("ZScoreNormalizer", _over_dimensions),
    ],
    "numpy_file": [("NpyReader", _ALONE), ("NumpyFeatureWriterNode", _joint(_WRITTEN))],
    "occlusion": [
        (
            "OcclusionNodeBase PoissonCubeOcclusionNode PoissonOcclusionNode SolidOcclusionNode",
            _joint(_FIRST),
        )
    ],
    "patch_inference": [
        ("ClassMapAccumulator", _joint(_WRITTEN)),
        ("PatchSampler", _patches),
    ],
    "pipeline_visualization": [
        ("CubeRGBVisualizer PCAVisualization PipelineComparisonVisualizer", _joint(_SHOWN))
    ],
    "preprocessors": [
        ("BBoxRoiCropNode", _joint("makes as many crops as a frame has boxes", ragged=True)),
        ("BandpassByWavelength", _unless_framed("wavelengths")),
        ("ChannelNormalizeNode SaturatedPixelDetector SpatialRotateNode SpectralValidity", _ALONE),
    ],
    "pretreatments.continuum_removal": [("ContinuumRemoval", _ALONE)],
    "pretreatments.logarithm": [("Logarithm", _ALONE)],
    "pretreatments.savitzky_golay": [("SavitzkyGolay", _ALONE)],
    "pretreatments.scaling": [("MeanCenter UnitVarianceScaling", _ALONE)],
    "pretreatments.snv": [("SNVCorrection", _ALONE)],
    "pretreatments.spectral_derivative": [("SpectralDerivative", _ALONE)],
    "prompts": [("BBoxPrompt MaskPrompt PointPrompt TextPrompt", _joint(_FIRST))],
    "segmentation.intensity": [("IntensityThresholdSegmenter", _ALONE)],
    "spatial": [("GridSubsample ScoreMapSmoothing ScoreUpsample", _ALONE)],
    "spectral_angle_mapper": [
        ("SpectralAngleMapper", _unless_framed("spectral_signature")),
        ("SpectralObjectMask", _ALONE),
    ],
    "spectral_extractor": [
        ("BBoxSpectralExtractor SignaturesToReferences SpectralSignatureExtractor", _joint(_FIRST)),
        ("MaskedMeanSpectrum", _ALONE),
    ],
    "spectrum_plot": [
        ("SpectraPlot", _ALONE),
        ("SpectrumPlotNode", _running("holds the spectrum of earlier frames")),
    ],
    "svm": [("OneClassSVMDetector", _ALONE)],
    "tiling": [("GridStitcher ImageTiler", _ALONE)],
    "unmixing.nmf": [("NMFUnmixing", _ALONE)],
    "unmixing.nnls": [("NNLSUnmixing", _unless_framed("endmembers"))],
    "video": [("ToImage ToVideoNode", _joint(_WRITTEN)), ("VideoFrameNode", _ALONE)],
}

_FACTS: dict[str, Fact] = {
    f"cuvis_ai.node.{module}.{name}": fact
    for module, classes in _CLASSES.items()
    for names, fact in classes
    for name in names.split()
}
