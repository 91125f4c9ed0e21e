"""Does ``robust_pixels`` fit phase 1 on the pixels of the bulk, and on no others? Mostly no Ray."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from archives import real_scene, statistical_trainrun
from cuvis_ai.node.anomaly.rx_detector import RXPerBatch
from cuvis_ai.node.channel_selector import SupervisedFullSpectrumSelector
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.data import AnomalyDataNode, CU3SDataNode
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from scipy.stats import rankdata
from settings import scaling_of

from cuvis_dist import StatisticalTrainer
from cuvis_dist.archive import open_archive
from cuvis_dist.errors import InputError
from cuvis_dist.nodes.state import hash_state
from cuvis_dist.runs.trainrun import load_trainrun


def fit(run, folder, pipeline=None, **settings):
    pipeline = pipeline or run.pipeline
    settings = {"workers": 0, "store": str(folder / "store"), "robust_pixels": 0.9} | settings
    trainer = StatisticalTrainer(pipeline, run.datamodule(), scaling=scaling_of(**settings))
    trainer.fit()
    return pipeline, trainer


def cubes(run) -> np.ndarray:
    """Return all pixels of the train split ``[N, C]``."""
    archive = open_archive(run.datamodule(), "train")
    every = [archive.read(i)["cube"].numpy() for i in range(len(archive))]
    return np.concatenate([cube.reshape(-1, cube.shape[-1]) for cube in every])


def test_every_node_is_fitted_on_the_pixels_inside(demo, tmp_path):
    run = load_trainrun(demo)
    pipeline, trainer = fit(run, tmp_path)
    pixels, bulk = cubes(run), trainer._inside.bulk
    inside = pixels[bulk.distance(pixels) <= bulk.bound].astype(np.float64)
    assert 0.85 < len(inside) / len(pixels) < 1
    nodes = {node.name: node for node in pipeline.nodes()}
    low, high = inside.min(axis=0), inside.max(axis=0)
    assert np.allclose(nodes["normalizer"].running_min.numpy().ravel().min(), low.min())
    assert np.allclose(nodes["normalizer"].running_max.numpy().ravel().max(), high.max())
    counts = {fit["pixels"] for done in trainer.records for fit in done.nodes.values()}
    assert counts == {len(inside)}


@pytest.mark.parametrize(
    "settings",
    [
        {"shard_frames": 1},
        {"shard_frames": 3},
        {"later_levels": "sampled"},
        pytest.param({"workers": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_which_pixels_they_are_depends_on_nothing_else(demo, tmp_path, request, settings):
    if settings.get("workers"):
        request.getfixturevalue("ray_session")
    run = load_trainrun(demo)
    once = fit(run, tmp_path / "once")[1].records
    pipeline, again = fit(load_trainrun(demo), tmp_path / "again", **settings)
    assert once[0].inside == again.records[0].inside
    count = {fit["pixels"] for done in again.records for fit in done.nodes.values()}
    assert count == {fit["pixels"] for done in once for fit in done.nodes.values()}
    if settings.get("workers"):
        alone = load_trainrun(demo)
        fit(alone, tmp_path / "once")
        assert hash_state(pipeline.nodes()) == hash_state(alone.pipeline.nodes())


def linked(*edges):
    pipeline = CuvisPipeline("p")
    pipeline.connect(*edges)
    return pipeline


def test_what_cannot_be_served_is_refused_before_anything_is_read(demo, tmp_path):
    run, data = load_trainrun(demo), CU3SDataNode(name="data")
    with pytest.raises(InputError, match="name one \\(--store FOLDER\\)"):
        fit(run, tmp_path, store=None)
    selector = SupervisedFullSpectrumSelector(num_spectral_bands=12, name="selector")
    labels = AnomalyDataNode(normal_class_ids=[0], name="labels")
    streamed = linked(
        (data.outputs.cube, selector.inputs.cube),
        (labels.outputs.mask, selector.inputs.mask),
        (data.outputs.wavelengths, selector.inputs.wavelengths),
    )
    with pytest.raises(InputError, match="no pixel of them can be left out"):
        fit(run, tmp_path, streamed)
    first, head = RXPerBatch(name="first"), ScoreToLogit(name="head")  # by each frame
    of_frames = linked(
        (CU3SDataNode(name="data").outputs.cube, first.inputs.data),
        (first.outputs.scores, head.inputs.scores),
    )
    with pytest.raises(InputError, match="no sample of pixels there"):
        fit(run, tmp_path, of_frames)


def auc(scores: np.ndarray, anomalous: np.ndarray) -> float:
    ranks, n = rankdata(scores), anomalous.sum()
    return float((ranks[anomalous].sum() - n * (n + 1) / 2) / (n * (len(scores) - n)))


@pytest.mark.parametrize(
    ("scene", "bands", "gained"), [("lhdata", 186, 0.007), ("abu-beach-2", 193, 0.0)]
)
def test_anomalies_inside_frames_hide_no_longer(tmp_path, scene, bands, gained):
    """They are labelled, and among the pixels that the detector is fitted on."""
    run = statistical_trainrun(
        tmp_path,
        real_scene(scene, tmp_path),
        [
            ("data", "data.CU3SDataNode", {}),
            ("rx", "anomaly.rx_detector.RXGlobal", {"num_channels": bands}),
        ],
        [("data.outputs.cube", "rx.inputs.data")],
    )
    archive = open_archive(run.datamodule(), "train")
    frames = [archive.read(i) for i in range(len(archive))]
    pixels = torch.cat([frame["cube"].reshape(-1, bands) for frame in frames]).double()
    anomalous = torch.cat([frame["mask"].reshape(-1) for frame in frames]).numpy() > 0
    found = {}
    for robust in (None, 0.98):
        _, trainer = fit(load_trainrun(run.path), tmp_path, robust_pixels=robust)
        # As it was measured: what the node freezes in float32 moves the AUC as much.
        (moments,) = trainer.outcomes[0][1].statistics.values()
        apart = pixels - moments.mean
        scores = (apart * torch.linalg.solve(moments.covariance, apart.T).T).sum(dim=1)
        found[robust] = auc(scores.numpy(), anomalous)
    assert found[0.98] >= found[None] + gained
