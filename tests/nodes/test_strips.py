"""How is a frame cut into strips?"""

from __future__ import annotations

import pytest
import torch

from cuvis_dist.nodes import strips as module
from cuvis_dist.nodes.strips import strips

C = 6


def batch(height=37, width=11, channels=C):
    generator = torch.Generator().manual_seed(5)
    return {
        "cube": torch.rand(1, height, width, channels, generator=generator),
        "mask": torch.randint(0, 3, (1, height, width), generator=generator, dtype=torch.int32),
        "wavelengths": torch.arange(channels, dtype=torch.int32)[None],
        "name": ["a frame"],
    }


def test_strips_are_views_that_cover_the_frame_once(monkeypatch):
    monkeypatch.setattr(module, "_STRIP_VALUES", 5 * 11 * C)
    whole = batch()
    parts = list(strips(whole, nodes=4))
    assert [part["cube"].shape[1] for part in parts] == [5, 5, 5, 5, 5, 5, 5, 2]
    for name in ("cube", "mask"):
        assert torch.equal(torch.cat([part[name] for part in parts], dim=1), whole[name])
        assert parts[0][name].data_ptr() == whole[name].data_ptr()
    assert parts[3]["name"] is whole["name"]


def test_images_of_different_sizes_stay_whole():
    odd = batch() | {"preview": torch.zeros(1, 4, 4, 3)}
    (only,) = strips(odd, nodes=4)
    assert only is odd


@pytest.mark.parametrize(("nodes", "rows"), [(0, 20), (1, 20), (2, 10), (3, 5), (4, 5), (40, 5)])
def test_few_nodes_get_large_strips(monkeypatch, nodes, rows):
    monkeypatch.setattr(module, "_STRIP_VALUES", 5 * 11 * C)
    assert next(strips(batch(), nodes))["cube"].shape[1] == rows
