"""Is every node that is fitted compared with an initialization, or is it said why not? No Ray."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.data import AnomalyDataNode, CU3SDataNode
from cuvis_ai.node.pretreatments.scaling import UnitVarianceScaling
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from node_rows import NODES
from settings import scaling_of

from cuvis_dist import StatisticalTrainer
from cuvis_dist.archive import open_archive
from cuvis_dist.audit.audit import Audit
from cuvis_dist.audit.drift import drift
from cuvis_dist.audit.groups import grouped
from cuvis_dist.audit.later import later_drift
from cuvis_dist.audit.stored import read_store
from cuvis_dist.audit.table import as_json, drift_text
from cuvis_dist.initialization.matching import take
from cuvis_dist.nodes.catalogue import recipe_for
from cuvis_dist.nodes.state import hash_state
from cuvis_dist.runs.trainrun import load_trainrun

FITTED = [name for name, make in NODES.items() if make().requires_initial_fit]
#: What cannot be compared, by the words of the reason: at the data, and behind a fitted node.
NEVER = {
    "gaussian mixture": "has no order",
    "k-means": "has no order",
    "nmf": "has no order",
    "one-class svm": "has no order",
    "supervised selector": "on whole frames",
}
NOT_LATER = {
    "gaussian mixture": "no standard error can be given for PixelSample of a sample",
    "k-means": "no standard error can be given for PixelSample of a sample",
    "nmf": "no standard error can be given for PixelSample of a sample",
    "one-class svm": "no standard error can be given for PixelSample of a sample",
    "band selector": "no standard error can be given for FrameQuantiles of a sample",
    "index selector": "no standard error can be given for FrameQuantiles of a sample",
    "min-max": "no standard error can be given for Extrema of a sample",
    "min-max of each frame": "no standard error can be given for Extrema of a sample",
    "percentile": "no standard error can be given for FrameQuantiles of a sample",
    "percentile, inverted": "no standard error can be given for FrameQuantiles of a sample",
    "supervised selector": "on whole frames",
}


def port_of(node) -> str:
    recipe = recipe_for(node)
    return recipe.port if recipe else "cube"


def pipeline_of(name, behind):
    """data -> the node, or with a fitted node between; RXGlobal makes it one that is audited."""
    torch.manual_seed(0)
    pipeline, data, node = CuvisPipeline("p"), CU3SDataNode(name="data"), NODES[name]()
    values = data.outputs.cube
    rx = RXGlobal(12, name="rx")
    edges = [(data.outputs.cube, rx.inputs.data)]
    if behind:
        scaling = UnitVarianceScaling(name="scaling")
        edges.append((values, scaling.inputs.cube))
        values = scaling.outputs.cube
    if name == "score to logit":
        values = rx.outputs.scores
    edges.append((values, getattr(node.inputs, port_of(node))))
    if "wavelengths" in node.INPUT_SPECS:
        edges.append((data.outputs.wavelengths, node.inputs.wavelengths))
    if name == "supervised selector":
        labels = AnomalyDataNode(normal_class_ids=[0], name="labels")
        edges.append((labels.outputs.mask, node.inputs.mask))
    pipeline.connect(*edges)
    return pipeline


def initialized(demo, make, store, **settings):
    """Fit a pipeline with a store, and return one that has its state, as if it was loaded."""
    pipeline, scaling = make(), scaling_of(workers=0, store=str(store), **settings)
    StatisticalTrainer(pipeline, load_trainrun(demo).datamodule(), scaling=scaling).fit()
    loaded, states = make(), {node.name: node.state_dict() for node in pipeline.nodes()}
    for node in loaded.nodes():
        take(node, states[node.name])
    return loaded


def drifted(demo, make, store, fitted, **settings):
    """Return how far what a store has is from a fitted pipeline, and why not, by node."""
    module = load_trainrun(demo).datamodule()
    measuring = scaling_of(workers=0, store=str(store), **settings).measuring
    stored = read_store(make(), module, open_archive(module, "train"), measuring, {})
    before = hash_state(fitted.nodes())
    found, why = drift(stored, fitted, grouped(stored.frames))
    later, more = later_drift(stored, fitted)
    assert hash_state(fitted.nodes()) == before
    return {each.node: each for each in found + later}, why | more


def brighter(demo, gain):
    """Multiply the cubes of the archive."""
    for path in (demo.parent / "archive").glob("*.npz"):
        with np.load(path) as known:
            content = dict(known)
        np.savez(path, **content | {"cube": np.float32(gain) * content["cube"]})


@pytest.mark.parametrize("behind", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("name", FITTED)
def test_every_node_is_compared_or_it_is_said_why_not(demo, tmp_path, name, behind):
    asked = type(NODES[name]()).__name__
    make = lambda: pipeline_of(name, behind)  # noqa: E731
    fitted = initialized(demo, make, tmp_path / "store", fold=False)
    found, why = drifted(demo, make, tmp_path / "store", fitted, fold=False)
    assert "rx" in found
    words = (NOT_LATER if behind else NEVER).get(name)
    if words is not None:
        assert words in why[asked]
        assert asked not in found
        return
    assert why == {}
    # The same frames, all of whose pixels are kept.
    assert found[asked].ratio < 1e-4
    assert found["rx"].surely <= 0
    assert behind or found["rx"].figures["affine_invariant"] < 1e-3
    if behind or name == "score to logit":
        assert found[asked].figures["standard_error"] == 0
        assert found[asked].figures["sample"] > 0


def heads():
    """data -> rx -> head"""
    pipeline, data = CuvisPipeline("p"), CU3SDataNode(name="data")
    rx, head = RXGlobal(12, name="rx"), ScoreToLogit(name="head")
    pipeline.connect(
        (data.outputs.cube, rx.inputs.data),
        (rx.outputs.scores, head.inputs.scores),
    )
    return pipeline


def test_an_archive_is_no_distance_from_itself(demo, tmp_path):
    """What float32 and a small number on the diagonal do to a covariance is no drift."""
    make = lambda: load_trainrun(demo).pipeline  # noqa: E731
    fitted = initialized(demo, make, tmp_path / "store")
    found, _ = drifted(demo, make, tmp_path / "store", fitted)
    figures = found["rx_detector"].figures
    assert figures["affine_invariant"] < 1e-3
    assert figures["bhattacharyya"] < 1e-6
    assert figures["mahalanobis"] < 1e-3
    brighter(demo, 1.05)
    initialized(demo, make, tmp_path / "store")
    figures = drifted(demo, make, tmp_path / "store", fitted)[0]["rx_detector"].figures
    # All variances are larger by the square of the gain.
    assert figures["affine_invariant"] > 0.5 * np.sqrt(12) * np.log(1.05**2)


def test_a_later_node_has_drifted_by_what_all_pixels_say(demo, tmp_path):
    """The head behind the rx of then, on a part of the pixels of now, and on all of them."""
    store = tmp_path / "store"
    fitted = initialized(demo, heads, store)
    brighter(demo, 1.05)
    initialized(demo, heads, store)
    all_of_it, _ = drifted(demo, heads, store, fitted)
    some = {"later_levels": "sampled", "sample_pixels": 1024}
    few, _ = drifted(demo, heads, store, fitted, **some)
    exact, sampled = all_of_it["head"], few["head"]
    assert exact.figures["standard_error"] == 0
    assert exact.ratio > 0.01
    assert sampled.of == exact.of
    assert sampled.figures["sample"] < exact.figures["sample"] / 2
    assert 0 < sampled.figures["standard_error"] < exact.ratio / 2
    assert abs(sampled.ratio - exact.ratio) < 4 * sampled.figures["standard_error"]


def test_without_pixels_it_is_said_how_to_get_them(demo, tmp_path, monkeypatch):
    from cuvis_dist.initialization.drawing import Drawing

    monkeypatch.setattr(Drawing, "frame", lambda *arguments: None)
    fitted = initialized(demo, heads, tmp_path / "store")
    found, why = drifted(demo, heads, tmp_path / "store", fitted)
    assert found.keys() == {"rx"}
    assert "cuvis-dist measure" in why["head"]


def test_what_is_no_number_has_drifted_beyond_any_limit(demo, tmp_path):
    """Before: `nan > limit` is false, and so was the exit code of a cron job."""
    fitted = initialized(demo, heads, tmp_path / "store")
    (rx,) = (node for node in fitted.nodes() if node.name == "rx")
    rx.mu.data[2] = float("nan")
    found, why = drifted(demo, heads, tmp_path / "store", fitted)
    assert found["rx"].surely == float("inf")
    (line, other) = drift_text([found["rx"]], why)
    assert line == "drift    rx: inf of its mu"
    assert other.startswith("drift    head: not compared: ")
    assert as_json(Audit("recording", (), ()), [found["rx"]])["drift"][0]["ratio"] is None
