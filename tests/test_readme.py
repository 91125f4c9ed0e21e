"""The node of docs/nodes.md is fitted on the cluster, and gets what it computes on all pixels."""

from __future__ import annotations

import re

import torch
from archives import ROOT, relative_difference
from cuvis_ai.node.data import CU3SDataNode
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from faults import FragileModule

from cuvis_dist import Scaling, StatisticalTrainer


def test_the_node_of_the_docs(tmp_path, ray_session):
    blocks = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "nodes.md").read_text(), flags=re.S
    )
    (example,) = [block for block in blocks if "class Whitening" in block]
    namespace = {"__name__": "readme"}
    exec(example, namespace)

    node, data = namespace["Whitening"](5, name="white"), CU3SDataNode(name="data")
    pipeline = CuvisPipeline("readme")
    pipeline.connect((data.outputs.cube, node.inputs.data))
    module = FragileModule(tmp_path)
    trainer = StatisticalTrainer(pipeline, module, scaling=Scaling(resources={"workers": 2}))
    trainer.fit()
    (record,) = trainer.records
    fitted = {"statistic": "Moments(data)", "pixels": 12 * 72, "exact": False}
    assert {name: record.nodes["white"][name] for name in fitted} == fitted

    alone = namespace["Whitening"](5, name="alone")
    cubes = [torch.as_tensor(module.cubes[i]["cube"])[None].double() for i in range(12)]
    alone.statistical_initialization({"data": cube} for cube in cubes)
    for name in ("mean", "factor"):
        assert relative_difference(getattr(node, name), getattr(alone, name)) <= 1e-6
