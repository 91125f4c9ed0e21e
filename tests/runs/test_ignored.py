"""Is what somebody has written without effect told, and nothing else?"""

from __future__ import annotations

from pathlib import Path

import cuvis_ai
import yaml
from archives import edit
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.utils.node_registry import NodeRegistry

from cuvis_dist.cli import main
from cuvis_dist.runs.ignored import misspelt


def test_a_misspelt_setting_of_a_node_is_told_with_what_is_meant(demo, capsys):
    """And so is a plugin."""
    pipeline = demo.parent / "pipeline.yaml"
    edit(pipeline, lambda p: p["nodes"][2]["hparams"].update(temprature_min=1))
    edit(pipeline, lambda p: p.update(plugins=["cuvis_ai_bultin", "of_our_own"]))
    assert main(["info", str(demo)]) == 0
    said = capsys.readouterr().err
    assert (
        "node selector of pipeline Channel_Selector: hparams.temprature_min is no setting" in said
    )
    assert "did you mean temperature_min?" in said
    assert (
        "names the plugin cuvis_ai_bultin, which no manifest declares; did you mean cuvis_ai_b"
        in said
    )
    assert "of_our_own" not in said


def test_what_a_constructor_takes_from_its_kwargs_is_known():
    class Asks(Node):
        def __init__(self, weight=1.0, **kwargs):
            self.weights = kwargs.pop("weights", None)
            super().__init__(weight=weight, **kwargs)

    class Below(Asks):
        def __init__(self, depth=1, **kwargs):
            super().__init__(**kwargs)

    given = ["weight", "weights", "wieght", "depht", "unlike", "name"]
    assert misspelt(Below, given) == {"wieght": "weight", "depht": "depth"}


def test_nothing_that_cuvis_ai_ships_counts_as_misspelt():
    checked = 0
    for path in sorted(Path(cuvis_ai.__file__).parent.rglob("configs/pipeline/**/*.yaml")):
        for node in yaml.safe_load(path.read_text())["nodes"]:
            if node["class_name"].startswith("cuvis_ai."):
                node_class = NodeRegistry.get(node["class_name"])
                assert misspelt(node_class, node.get("hparams") or {}) == {}, (path, node)
                checked += 1
    assert checked > 100
