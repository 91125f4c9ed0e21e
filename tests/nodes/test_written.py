"""The state of a fitted node is written without code, and read into a node that was just built."""

from __future__ import annotations

import pytest
import torch
from cuvis_ai_core.node.node import Node
from torch import nn

from cuvis_dist.nodes.probing import digest
from cuvis_dist.nodes.written import Unwritten, read_all
from cuvis_dist.plain import NotPlainError, from_bytes, to_bytes


class Own(Node):
    """Keeps what nodes keep: tensors of both kinds, inner modules, values, and a function."""

    INPUT_SPECS = {}  # noqa: RUF012
    OUTPUT_SPECS = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(name="own")
        self.register_buffer("mean", None)
        self.register_buffer("scale", torch.ones(2))
        self.inner = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.fitted, self.later, self.key = False, None, print

    def forward(self):
        return {}

    def fit(self) -> None:
        self.mean = torch.arange(3.0)
        del self.scale
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        with torch.no_grad():
            self.inner[0].weight.fill_(3)
        self.inner[1].running_mean.fill_(4)
        self.inner.eval()
        self.inner[0].weight.requires_grad_(False)
        self.fitted, self.later = True, {"history": [(1, 2.0)]}


def test_a_state_is_taken_over():
    node, fresh = Own(), Own()
    weight = fresh.inner[0].weight
    before = Unwritten([node])
    node.fit()
    read_all([fresh], from_bytes(to_bytes(before.write_all([node]))))
    assert digest(fresh) == digest(node)
    assert [n for n, _ in fresh.named_parameters()] == [n for n, _ in node.named_parameters()]
    assert fresh.inner[0].weight is weight, "whoever had a parameter still has it"
    assert not weight.requires_grad
    assert not fresh.inner.training


@pytest.mark.parametrize("value", [len, Own(), object()])
def test_what_changed_and_cannot_be_written_is_named(value):
    node = Own()
    before = Unwritten([node])
    before.write(node)
    object.__setattr__(node, "key", value)
    with pytest.raises(NotPlainError, match=r"own\.key is no plain value, and has changed"):
        before.write(node)
    node.key, node.inner = print, nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    with pytest.raises(NotPlainError, match=r"own\.inner\.1 is no plain value, and has changed"):
        before.write(node)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("buffers"),
        lambda state: state["modules"].update(other=state["modules"]["inner"]),
        lambda state: state["parameters"].update(scale=["text", True]),
        lambda state: state["attributes"].update(_forward_hooks={"kind": "dict", "value": []}),
    ],
)
def test_a_state_of_something_else_changes_nothing(change):
    node, fresh = Own(), Own()
    earlier = digest(fresh)
    state = Unwritten([node]).write_all([node])
    change(state["own"])
    with pytest.raises(NotPlainError):
        read_all([fresh], state)
    with pytest.raises(NotPlainError):
        read_all([fresh], {"another": state["own"]})
    assert digest(fresh) == earlier
