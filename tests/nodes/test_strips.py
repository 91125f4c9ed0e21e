"""A frame that goes through its nodes strip by strip is the frame that goes through as a whole."""

from __future__ import annotations

import pytest
import torch
from cuvis_ai.node.anomaly.deep_svdd import DeepSVDDProjection, ZScoreNormalizerGlobal
from cuvis_ai.node.anomaly.lad_detector import LADGlobal
from cuvis_ai.node.anomaly.rx_detector import RXGlobal, RXPerBatch
from cuvis_ai.node.channel_selector import SoftChannelSelector
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.data import AnomalyDataNode
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai.node.normalization import IdentityNormalizer, MinMaxNormalizer, PerPixelUnitNorm
from cuvis_ai.node.pretreatments.scaling import MeanCenter, UnitVarianceScaling

from cuvis_dist.nodes import strips as module
from cuvis_dist.nodes.strips import is_pixelwise, strips

C = 6
NODES = [
    AnomalyDataNode(normal_class_ids=[0]),
    DeepSVDDProjection(in_channels=C, rep_dim=4, hidden=8),
    IdentityNormalizer(),
    LADGlobal(C),
    MeanCenter(),
    MinMaxNormalizer(),
    PerPixelUnitNorm(),
    RXGlobal(C),
    ScoreToLogit(),
    SoftChannelSelector(3, C),
    TrainablePCA(C, 2),
    UnitVarianceScaling(),
    ZScoreNormalizerGlobal(num_channels=C),
]


def batch(height=37, width=11, channels=C):
    generator = torch.Generator().manual_seed(5)
    return {
        "cube": torch.rand(1, height, width, channels, generator=generator),
        "mask": torch.randint(0, 3, (1, height, width), generator=generator, dtype=torch.int32),
        "wavelengths": torch.arange(channels, dtype=torch.int32)[None],
        "name": ["a frame"],
    }


@pytest.mark.parametrize("node", NODES, ids=lambda node: type(node).__name__)
def test_pixelwise_nodes_give_the_same_for_strips(node, monkeypatch):
    """Every class of the list: a class that looks at a pixel's neighbours must not be on it."""
    assert is_pixelwise(node)
    whole = batch(channels=1 if isinstance(node, ScoreToLogit) else C)
    monkeypatch.setattr(module, "_STRIP_VALUES", 5 * 11 * whole["cube"].shape[-1])
    port = next(p for p in node.INPUT_SPECS if p in ("cube", "data", "scores"))
    if node.requires_initial_fit:
        node.statistical_initialization(iter([{port: whole["cube"]}]))
    if isinstance(node, AnomalyDataNode):
        run = lambda b: node.forward(cube=b["cube"], mask=b["mask"])  # noqa: E731
    else:
        run = lambda b: node.forward(**{port: b["cube"]})  # noqa: E731
    with torch.no_grad():
        expected, parts = run(whole), [run(part) for part in strips(whole)]
    assert len(parts) > 2
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and value.ndim == 4:
            got = torch.cat([part[name] for part in parts], dim=1)
            torch.testing.assert_close(got, value, rtol=1e-6, atol=1e-7)


def test_every_class_of_the_list_is_tested():
    assert {type(n) for n in NODES} >= set(module._PIXELWISE) - {
        module.BandpassByWavelength,  # needs wavelengths; the Deep SVDD pipeline has it
        module.CU3SDataNode,
        module.DeepSVDDScores,
    }


def test_nodes_that_look_at_the_frame_are_given_whole_frames():
    class Mine(RXGlobal):
        def forward(self, data, **_):
            return {"scores": data - data.mean(dim=(1, 2), keepdim=True)}

    assert not is_pixelwise(Mine(C))
    assert not is_pixelwise(RXPerBatch())
    assert not is_pixelwise(MinMaxNormalizer(use_running_stats=False))


def test_strips_are_views_that_cover_the_frame_once(monkeypatch):
    monkeypatch.setattr(module, "_STRIP_VALUES", 5 * 11 * C)
    whole = batch()
    parts = list(strips(whole))
    assert [part["cube"].shape[1] for part in parts] == [5, 5, 5, 5, 5, 5, 5, 2]
    for name in ("cube", "mask"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), whole[name])
        assert parts[0][name].data_ptr() == whole[name].data_ptr()
    assert parts[3]["name"] is whole["name"]


def test_images_of_different_sizes_stay_whole():
    odd = batch() | {"preview": torch.zeros(1, 4, 4, 3)}
    (only,) = strips(odd)
    assert only is odd
