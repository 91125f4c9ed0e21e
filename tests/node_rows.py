"""Which nodes stand for the classes of the catalogue? A row for each, and for settings."""

from __future__ import annotations

from cuvis_ai.node.anomaly.deep_svdd import (
    DeepSVDDCenterTracker,
    DeepSVDDProjection,
    DeepSVDDScores,
    ZScoreNormalizerGlobal,
)
from cuvis_ai.node.anomaly.lad_detector import LADGlobal
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.channel_mixer import LearnableChannelMixer
from cuvis_ai.node.channel_selector import (
    FixedWavelengthSelector,
    HighContrastSelector,
    SoftChannelSelector,
    SupervisedFullSpectrumSelector,
)
from cuvis_ai.node.clustering.gmm import GaussianMixtureClusterer
from cuvis_ai.node.clustering.kmeans import KMeansClusterer
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.data import AnomalyDataNode, CU3SDataNode
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import (
    IdentityNormalizer,
    MinMaxNormalizer,
    PercentileNormalizer,
    PerPixelUnitNorm,
)
from cuvis_ai.node.preprocessors import BandpassByWavelength
from cuvis_ai.node.pretreatments.scaling import MeanCenter, UnitVarianceScaling
from cuvis_ai.node.svm import OneClassSVMDetector
from cuvis_ai.node.unmixing.nmf import NMFUnmixing

C = 12
#: A row for each class of the catalogue, and for settings under which its facts differ.
NODES = {
    "anomaly data": lambda: AnomalyDataNode(normal_class_ids=[0]),
    "band selector": lambda: FixedWavelengthSelector(norm_mode="statistical"),
    "bandpass": lambda: BandpassByWavelength(500, 800),
    "data": lambda: CU3SDataNode(),
    "gaussian mixture": lambda: GaussianMixtureClusterer(n_components=2),
    "identity": lambda: IdentityNormalizer(),
    "index selector": lambda: HighContrastSelector(norm_mode="statistical"),
    "k-means": lambda: KMeansClusterer(n_clusters=2),
    "lad": lambda: LADGlobal(C),
    "mean center": lambda: MeanCenter(),
    "min-max": lambda: MinMaxNormalizer(),
    "min-max of each frame": lambda: MinMaxNormalizer(use_running_stats=False),
    "mixer": lambda: LearnableChannelMixer(C, 3, init_method="pca"),
    "nmf": lambda: NMFUnmixing(n_endmembers=2),
    "one-class svm": lambda: OneClassSVMDetector(),
    "pca": lambda: TrainablePCA(C, 4),
    "percentile": lambda: PercentileNormalizer(C, norm_mode="statistical"),
    "percentile, inverted": lambda: PercentileNormalizer(C, norm_mode="statistical", invert=True),
    "rx": lambda: RXGlobal(C),
    "rx, no cached inverse": lambda: RXGlobal(C, cache_inverse=False),
    "score to logit": lambda: ScoreToLogit(),
    "selector, uniform": lambda: SoftChannelSelector(3, C),
    "selector, variance": lambda: SoftChannelSelector(3, C, init_method="variance"),
    "supervised selector": lambda: SupervisedFullSpectrumSelector(num_spectral_bands=C),
    "svdd center": lambda: DeepSVDDCenterTracker(rep_dim=C),
    "svdd projection": lambda: DeepSVDDProjection(in_channels=C, rep_dim=4, hidden=8),
    "svdd scores": lambda: DeepSVDDScores(),
    "unit norm": lambda: PerPixelUnitNorm(),
    "unit variance": lambda: UnitVarianceScaling(),
    "z-score": lambda: ZScoreNormalizerGlobal(num_channels=C),
}
