"""What a measurement is known by: everything that changes it, and nothing that does not."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.channel_selector import HighContrastSelector
from cuvis_ai.node.data import CU3SDataNode, LentilsAnomalyDataNode
from cuvis_ai.node.normalization import MinMaxNormalizer, SigmoidTransform
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_dataloader.data.datamodule_cu3s import Cu3sDataModule
from cuvis_ai_dataloader.data.datamodule_cu3s_multi import MultiCu3sDataModule
from cuvis_ai_dataloader.data.datamodule_npz_multi import MultiNpzDataModule
from cuvis_ai_dataloader.data.datamodule_tiff_paired import TiffPairedDataModule

from cuvis_dist.nodes.catalogue import recipe_for
from cuvis_dist.store.identity import Keys, described_module


class Module:
    """A data module of somebody's own."""

    def __init__(self, gain=1.0, wavelengths=None, splits=None, batch_size=1, table=None):
        self.gain, self._wavelengths, self.table_values = gain, wavelengths, table
        self.splits, self.batch_size = splits, batch_size
        self.cache = object()


def digest(module=None, pixels="all", name="data", node=MinMaxNormalizer, data=CU3SDataNode, **of):
    """The digest of what the second node of a small pipeline is fitted by."""
    first, last, pipeline = data(name=name, **of), node(), CuvisPipeline("p")
    port = recipe_for(last).port
    pipeline.connect((first.outputs.cube, getattr(last.inputs, port)))
    keys = Keys(pipeline, module or Module(), pixels)
    return keys.of_statistic("", last, recipe_for(last)).digest


def test_a_parameter_that_changes_frames_makes_another_key():
    others = [
        Module(gain=2),
        Module(wavelengths=[500]),
        Module(table=np.ones(3)),
        Module(table=np.zeros(3)),
    ]
    assert len({digest(module) for module in [Module(), *others]}) == 5


def test_which_frames_there_are_makes_no_other_key():
    assert digest(Module(splits=["a"], batch_size=4)) == digest()


def test_pixels_statistics_options_and_nodes_make_another_key():
    labels = {"data": LentilsAnomalyDataNode, "normal_class_ids": [0]}
    keys = [
        digest(),
        digest(pixels="finite"),
        digest(node=lambda: RXGlobal(4)),
        digest(**labels),
        digest(**labels, pixels="unlabelled"),
        digest(**labels | {"normal_class_ids": [1]}, pixels="unlabelled"),
        digest(node=lambda: HighContrastSelector(norm_mode="statistical")),
    ]
    assert len({*keys}) == len(keys)


def test_names_and_the_node_that_asks_make_no_other_key():
    assert digest(name="camera") == digest()
    assert digest(node=lambda: MinMaxNormalizer(name="other", eps=1)) == digest()


def test_the_state_of_the_nodes_before_makes_another_key():
    found = set()
    for value in (0.0, 0.0, 1.0):
        data, middle, last = CU3SDataNode(), SigmoidTransform(), MinMaxNormalizer()
        middle.register_buffer("table", torch.tensor([value]))
        pipeline = CuvisPipeline("p")
        pipeline.connect(
            (data.outputs.cube, middle.inputs.data),
            (middle.outputs.transformed, last.inputs.data),
        )
        keys = Keys(pipeline, Module(), "all")
        found.add(keys.of_statistic("", last, recipe_for(last)).digest)
    assert len(found) == 2


def test_pixels_are_known_by_their_ports_and_seed():
    data = CU3SDataNode(name="data")
    pipeline = CuvisPipeline("p")
    pipeline.connect((data.outputs.cube, MinMaxNormalizer().inputs.data))
    keys = Keys(pipeline, Module(), "all")
    asked = [([("data", "cube")], 0), ([("data", "cube")], 1), ([("", "wavelengths")], 0)]
    assert len({keys.of_pixels(ports, seed).digest for ports, seed in asked}) == 3


@pytest.mark.parametrize(
    "cls", [Cu3sDataModule, MultiCu3sDataModule, MultiNpzDataModule, TiffPairedDataModule]
)
def test_every_parameter_of_upstreams_modules_is_looked_at_or_left_out_on_purpose(cls):
    """Each one that changes what a frame contains is kept under a name that is looked for."""
    source, kept = inspect.getsource(cls.__init__), object.__new__(cls)
    names = inspect.signature(cls.__init__).parameters
    for name in names:
        for attribute in (name, f"_{name}", f"{name}_override"):
            if f"self.{attribute} " in source or f"self.{attribute}:" in source:
                vars(kept)[attribute] = "x"
    content = {"annotation_json_path", "cuda_cubes", "label_mode", "label_output_key",
               "processing_mode", "sdk_cuda", "wavelengths"} & {*names}  # fmt: skip
    told = {key.strip("_").removesuffix("_override") for key in described(kept)}
    assert told == content


def described(module):
    return described_module(module)["parameters"]
