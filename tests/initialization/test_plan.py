"""The passes that a pipeline needs."""

from __future__ import annotations

from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.clustering.kmeans import KMeansClusterer
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.normalization import MinMaxNormalizer
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.initialization import make_plan
from cuvis_dist.run import load_trainrun


def names(pipeline):
    return [[node.name for node in p.nodes] for p in make_plan(pipeline)]


def test_one_pass_per_dependency_level(demo_trainrun):
    pipeline = load_trainrun(demo_trainrun).pipeline
    assert names(pipeline) == [["normalizer"], ["selector"], ["rx_detector"], ["logit_head"]]


def test_independent_nodes_share_a_pass_and_unknown_ones_get_their_own():
    data, pipeline = CU3SDataNode(name="data"), CuvisPipeline("p")
    low, rx = MinMaxNormalizer(name="low"), RXGlobal(4, name="rx")
    clusters = KMeansClusterer(n_clusters=2, name="clusters")
    per_sample = MinMaxNormalizer(use_running_stats=False, name="per_sample")
    after = RXGlobal(4, name="after")
    pipeline.connect(
        (data.outputs.cube, low.inputs.data),
        (data.outputs.cube, rx.inputs.data),
        (data.outputs.cube, clusters.inputs.cube),
        (data.outputs.cube, per_sample.inputs.data),
        (per_sample.outputs.normalized, after.inputs.data),
    )
    together, alone = names(pipeline)
    assert sorted(together) == ["after", "low", "rx"]
    assert alone == ["clusters"]


def test_a_pipeline_without_statistical_nodes_needs_none():
    data, pipeline = CU3SDataNode(name="data"), CuvisPipeline("p")
    plain = MinMaxNormalizer(use_running_stats=False)
    pipeline.connect((data.outputs.cube, plain.inputs.data))
    assert make_plan(pipeline) == []
