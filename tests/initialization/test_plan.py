"""The passes that a pipeline needs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.clustering.kmeans import KMeansClusterer
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.normalization import MinMaxNormalizer
from cuvis_ai.node.pretreatments.scaling import MeanCenter
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.initialization.plan import make_plan
from cuvis_dist.runs.trainrun import load_trainrun


def names(pipeline):
    return [[node.name for node in p.nodes] for p in make_plan(pipeline, fold=True)]


def test_the_guides_pipeline_needs_two_readings(demo_trainrun):
    first, second = make_plan(load_trainrun(demo_trainrun).pipeline, fold=True)
    assert [node.name for node in first.nodes] == ["normalizer", "selector", "rx_detector"]
    assert [m.key for m in first.measurements] == ["Extrema(data.cube)", "Moments(data.cube)"]
    assert [hop.node.name for hop in first.fits[2].chain] == ["normalizer", "selector"]
    assert [node.name for node in second.nodes] == ["logit_head"]


def test_without_folding_there_is_one_pass_per_dependency_level(demo_trainrun):
    plan = make_plan(load_trainrun(demo_trainrun).pipeline, fold=False)
    fitted = [[node.name for node in p.nodes] for p in plan]
    assert fitted == [["normalizer"], ["selector"], ["rx_detector"], ["logit_head"]]
    assert not any(fit.chain for p in plan for fit in p.fits)


def chain(*nodes):
    """A pipeline that feeds each node's first output to the next one's first input."""
    pipeline = CuvisPipeline("p")
    for a, b in pairwise([CU3SDataNode(name="data"), *nodes]):
        pipeline.connect(
            (
                getattr(a.outputs, next(iter(a.OUTPUT_SPECS))),
                getattr(b.inputs, next(iter(b.INPUT_SPECS))),
            )
        )
    return pipeline


def test_normalizer_and_detector_need_one_reading():
    assert len(make_plan(chain(MinMaxNormalizer(), RXGlobal(4)), fold=True)) == 1


def test_the_catalogs_deep_svdd_pipeline_needs_two_readings():
    import cuvis_ai
    from cuvis_ai_core.pipeline.factory import PipelineBuilder
    from cuvis_ai_schemas.pipeline import PipelineConfig

    path = Path(cuvis_ai.__file__).parent / "configs/pipeline/anomaly/deep_svdd/deep_svdd.yaml"
    pipeline = PipelineBuilder().build_from_config(PipelineConfig.load_from_file(path).to_dict())
    assert names(pipeline) == [["ZScoreNormalizerGlobal"], ["DeepSVDDCenterTracker"]]


def test_a_streamed_node_ends_a_chain():
    capped = MinMaxNormalizer(max_initialization_frames=2, name="capped")
    after = RXGlobal(4, name="after")
    first, second = make_plan(chain(capped, after), fold=True)
    assert first.streamed is capped
    assert second.nodes == [after]
    assert not second.fits[0].chain


def test_variances_come_from_a_full_covariance_of_the_same_port():
    rx, pca = RXGlobal(4, name="rx"), MeanCenter(name="center")
    data, pipeline = CU3SDataNode(name="data"), CuvisPipeline("p")
    pipeline.connect((data.outputs.cube, rx.inputs.data), (data.outputs.cube, pca.inputs.cube))
    (only,) = make_plan(pipeline)
    assert [m.key for m in only.measurements] == ["Moments(data.cube)"]


def test_independent_nodes_share_a_pass_and_unknown_ones_get_their_own():
    data, pipeline = CU3SDataNode(name="data"), CuvisPipeline("p")
    low, rx = MinMaxNormalizer(name="low"), RXGlobal(4, name="rx")
    clusters = KMeansClusterer(n_clusters=2, name="clusters")
    capped = MinMaxNormalizer(max_initialization_frames=2, name="capped")
    per_sample = MinMaxNormalizer(use_running_stats=False, name="per_sample")
    after = RXGlobal(4, name="after")
    pipeline.connect(
        (data.outputs.cube, low.inputs.data),
        (data.outputs.cube, rx.inputs.data),
        (data.outputs.cube, clusters.inputs.cube),
        (data.outputs.cube, capped.inputs.data),
        (data.outputs.cube, per_sample.inputs.data),
        (per_sample.outputs.normalized, after.inputs.data),
    )
    together, alone = names(pipeline)
    assert sorted(together) == ["after", "clusters", "low", "rx"]
    assert alone == ["capped"]


def test_a_pipeline_without_statistical_nodes_needs_none():
    data, pipeline = CU3SDataNode(name="data"), CuvisPipeline("p")
    plain = MinMaxNormalizer(use_running_stats=False)
    pipeline.connect((data.outputs.cube, plain.inputs.data))
    assert make_plan(pipeline) == []
