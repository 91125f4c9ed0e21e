"""Which pixels and frames count: annotated anomalies, values that are not finite, samples."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from archives import buffers_sha256, relative_difference, statistical_trainrun
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai.node.normalization import MinMaxNormalizer
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from faults import FragileModule
from settings import scaling_of

from cuvis_dist import Scaling, StatisticalTrainer
from cuvis_dist.archive import open_archive
from cuvis_dist.errors import ClusterError, DataError, InputError
from cuvis_dist.statistics import Moments

pytestmark = pytest.mark.usefixtures("ray_session")

NODES = [
    ("data", "data.AnomalyDataNode", {"normal_class_ids": [0]}),
    ("normalizer", "normalization.MinMaxNormalizer", {}),
    ("rx", "anomaly.rx_detector.RXGlobal", {"num_channels": 12}),
    ("svm", "svm.OneClassSVMDetector", {"max_fit_pixels": 200}),
]
EDGES = [
    ("data.outputs.cube", "normalizer.inputs.data"),
    ("normalizer.outputs.normalized", "rx.inputs.data"),
    ("data.outputs.cube", "svm.inputs.cube"),
]


@pytest.fixture
def copied(demo):
    """``universe`` of a copy of the demo archive of which a test may change a frame."""
    return demo.parent / "archive" / "universe.csv"


def fit(folder, universe, nodes=NODES, edges=EDGES, **scaling):
    trainrun = statistical_trainrun(folder, universe, nodes, edges)
    trainer = StatisticalTrainer(
        trainrun.pipeline,
        trainrun.datamodule(),
        scaling=scaling_of(**{"shard_frames": 2} | scaling),
    )
    trainer.fit()
    return trainer, {node.name: node for node in trainrun.pipeline.nodes()}


def frames_of(universe):
    return [np.load(path) for path in sorted(universe.parent.glob("*.npz"))]


def assert_fitted_on(nodes, pixels):
    """The normalizer's range and the detector's moments are those of these raw pixels."""
    low, high = pixels.min(), pixels.max()
    assert float(nodes["normalizer"].running_min) == float(low)
    assert float(nodes["normalizer"].running_max) == float(high)
    moments = Moments.measure((pixels - low) / (high - low))
    assert relative_difference(nodes["rx"].mu, moments.mean) <= 1e-6
    assert (
        relative_difference(nodes["rx"].cov - nodes["rx"].eps * torch.eye(12), moments.covariance)
        <= 1e-5
    )


def test_annotated_anomalies_are_left_out(demo_trainrun, tmp_path):
    universe = demo_trainrun.parent / "archive" / "universe.csv"
    trainer, nodes = fit(tmp_path, universe, workers=2, pixels="unlabelled")
    cubes = [torch.as_tensor(f["cube"][f["mask"] == 0]) for f in frames_of(universe)]
    pixels = torch.cat(cubes).double()
    assert len(pixels) < 22 * 320, "the demo has no anomalies"
    assert_fitted_on(nodes, pixels)
    counted = {fit["pixels"] for record in trainer.records for fit in record.nodes.values()}
    assert counted == {len(pixels)}
    support = nodes["svm"].support_vectors.double()
    counted = {tuple(pixel) for pixel in pixels.tolist()}
    assert {tuple(pixel) for pixel in support.tolist()} <= counted, "a support vector is labelled"

    _, unlike = fit(tmp_path, universe, workers=2)
    assert not torch.equal(unlike["rx"].mu, nodes["rx"].mu)


def test_values_that_are_not_finite_are_left_out_where_asked(copied, tmp_path):
    path = copied.parent / "recording_01_001.npz"
    arrays = dict(np.load(path))
    arrays["cube"][2:4, 3, 5] = np.nan
    arrays["cube"][7, 7, 0] = np.inf
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=r"recording_01_001\.npz\) has 3 pixels .*pixels: finite"):
        fit(tmp_path, copied, workers=2)
    sample_alone = [NODES[0], NODES[3]], [EDGES[2]]
    with pytest.raises(DataError, match=r"has 3 pixels that are not finite at svm\.cube"):
        fit(tmp_path, copied, *sample_alone, workers=2)

    trainer, nodes = fit(tmp_path, copied, workers=2, pixels="finite")
    pixels = torch.cat(
        [torch.as_tensor(f["cube"]).reshape(-1, 12) for f in frames_of(copied)]
    ).double()
    assert_fitted_on(nodes, pixels[torch.isfinite(pixels).all(1)])
    assert trainer.records[0].nodes["rx"]["pixels"] == 22 * 320 - 3


def test_frames_without_annotation_are_named(tmp_path):
    data, rx = CU3SDataNode(), RXGlobal(5)
    pipeline = CuvisPipeline("p")
    pipeline.connect((data.outputs.cube, rx.inputs.data))
    scaling = Scaling(resources={"workers": 2}, measuring={"pixels": "unlabelled"})
    trainer = StatisticalTrainer(pipeline, FragileModule(tmp_path), scaling=scaling)
    with pytest.raises(DataError, match=r"frame data#\d+ has no annotation"):
        trainer.fit()


def test_streamed_nodes_read_whole_frames(tmp_path):
    """Which is said before anything is read, also when another pass would come first."""
    capped = MinMaxNormalizer(max_initialization_frames=2, name="capped")
    data, first, pipeline = CU3SDataNode(), MinMaxNormalizer(name="first"), CuvisPipeline("p")
    pipeline.connect(
        (data.outputs.cube, first.inputs.data), (first.outputs.normalized, capped.inputs.data)
    )
    module = FragileModule(tmp_path)
    trainer = StatisticalTrainer(pipeline, module, scaling=Scaling(measuring={"pixels": "finite"}))
    with pytest.raises(InputError, match=r"capped \(MinMaxNormalizer\).*whole frames"):
        trainer.fit()
    assert not (tmp_path / "read.log").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_workers_that_no_machine_can_offer_are_refused(tmp_path):
    data, rx, pipeline = CU3SDataNode(), RXGlobal(5), CuvisPipeline("p")
    pipeline.connect((data.outputs.cube, rx.inputs.data))
    scaling = Scaling(measuring={"gpus": 1})
    trainer = StatisticalTrainer(pipeline, FragileModule(tmp_path), scaling=scaling)
    with pytest.raises(ClusterError, match="workers of phase 1 need 1 GPUs, the cluster has 0"):
        trainer.fit()


def test_sampled_frames_are_drawn_by_hash_and_not_by_position(demo_trainrun, tmp_path):
    universe = demo_trainrun.parent / "archive" / "universe.csv"
    hashes = set()
    for workers in (0, 1, 3):
        trainer, nodes = fit(tmp_path, universe, workers=workers, sample_frames=6)
        assert [record.frames for record in trainer.records] == [6]
        hashes.add(buffers_sha256(trainer.pipeline))
    assert len(hashes) == 1

    archive = open_archive(trainer.datamodule, "train")
    drawn = archive.sampled(6, None)
    chosen = [frame.uid for frame in drawn.frames]
    every = [frame.uid for frame in archive.frames]
    assert chosen == sorted(chosen, key=every.index) != every[:6]
    frames = dict(zip(every, frames_of(universe), strict=True))
    cubes = [torch.as_tensor(frames[uid]["cube"]).reshape(-1, 12) for uid in chosen]
    assert_fitted_on(nodes, torch.cat(cubes).double())
    assert torch.equal(drawn.read(2)["cube"], torch.as_tensor(frames[chosen[2]]["cube"])[None])

    assert {f.uid for f in archive.sampled(None, 0.25).frames} == set(chosen), "22 / 4, rounded up"
    assert {f.uid for f in archive.sampled(3, 0.25).frames} < set(chosen)
    assert {f.uid for f in archive.sampled(6, None, seed=1).frames} != set(chosen)
    assert archive.sampled(100, None) is archive
    assert Counter(f.recording for f in drawn.frames).total() == 6
