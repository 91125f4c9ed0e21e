"""How is the state of a node written to a file that runs no code, and read into a new node?

A node that is built again from the same pipeline has the same class and settings. So written are
its tensors and those of its attributes that are plain values (:mod:`cuvis_dist.plain`), its inner
modules likewise. An attribute that is none, such as a function, is left out as long as it is what
it was before the fit; a node in which one has changed cannot be written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from cuvis_ai_core.node.node import Node
from torch import nn

from cuvis_dist.nodes.probing import digest
from cuvis_dist.nodes.state import IDENTITY
from cuvis_dist.plain import NotPlainError, decode, encode

#: What every module has; of these attributes only the mode is a state.
_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training", "_non_persistent_buffers_set"}


class Unwritten:
    """What of some nodes is not written, as it is now.

    Parameters
    ----------
    nodes : iterable of Node
        Nodes as they were built, or as they were before their fit.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._found = {place: mark for node in nodes for place, mark in _unwritten(node, node.name)}

    def write(self, node: Node) -> dict[str, Any]:
        """Return the state of one of these nodes as it is now, as plain values.

        Raises
        ------
        NotPlainError
            If something changed that cannot be written; the message names node and attribute.
        """
        for place, mark in _unwritten(node, node.name):
            if self._found.get(place) != mark:
                raise NotPlainError(f"{place} is no plain value, and has changed")
        return _written(node)

    def write_all(self, nodes: Iterable[Node]) -> dict[str, dict[str, Any]]:
        """Return :meth:`write` of several nodes, by name."""
        return {node.name: self.write(node) for node in nodes}


def read_all(nodes: Iterable[Node], states: Mapping[str, Any]) -> None:
    """Give nodes the states that :meth:`Unwritten.write_all` returned, by name.

    All of them are checked before the first one is changed.

    Raises
    ------
    NotPlainError
        If one is not the state of such a node, or of none of these nodes.
    """
    by_name = {node.name: node for node in nodes}
    try:
        decoded = [
            (by_name[name], _decoded(by_name[name], state)) for name, state in states.items()
        ]
    except NotPlainError:
        raise
    except Exception as error:
        raise NotPlainError(f"it is no state of these nodes: {error!r}") from error
    for node, state in decoded:
        _read(node, state)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if name not in _EVERY_MODULE and not (isinstance(module, Node) and name in IDENTITY):
            yield name, value


def _unwritten(module: nn.Module, place: str) -> Iterator[tuple[str, object]]:
    """Yield inner modules and attributes that are no plain values, each with what marks it."""
    for name, value in _attributes(module):
        try:
            encode(value)
        except NotPlainError:
            yield f"{place}.{name}", _mark(value)
    for name, inner in module._modules.items():
        if inner is not None:
            yield f"{place}.{name}", type(inner).__qualname__
            yield from _unwritten(inner, f"{place}.{name}")


def _mark(value: Any) -> object:
    if isinstance(value, FunctionType | BuiltinFunctionType | MethodType):
        return value.__qualname__
    return digest(value)


def _written(module: nn.Module) -> dict[str, Any]:
    attributes = {}
    for name, value in _attributes(module):
        try:
            attributes[name] = encode(value)
        except NotPlainError:
            continue
    return {
        "parameters": {
            name: None if value is None else [encode(value.detach()), value.requires_grad]
            for name, value in module._parameters.items()
        },
        "buffers": {name: encode(value) for name, value in module._buffers.items()},
        "attributes": attributes,
        "modules": {n: None if m is None else _written(m) for n, m in module._modules.items()},
    }


def _decoded(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state with its attributes decoded, once it is known to be one of this module."""
    tensors = [pair and pair[0] for pair in state["parameters"].values()]
    for tensor in (*tensors, *state["buffers"].values()):
        if not (tensor is None or isinstance(tensor, torch.Tensor)):
            raise NotPlainError("it is no state of a node")
    inner = {}
    for name, each in state["modules"].items():
        mine = module._modules.get(name)
        if each is not None and mine is None:
            raise NotPlainError(f"the node has no module {name}")
        inner[name] = None if each is None or mine is None else _decoded(mine, each)
    names = {*state["parameters"], *state["buffers"], *state["attributes"]}
    if names & {*_EVERY_MODULE, *IDENTITY} or not all(isinstance(name, str) for name in names):
        raise NotPlainError("it is no state of a node")
    return {
        "parameters": dict(state["parameters"]),
        "buffers": dict(state["buffers"]),
        "attributes": {name: decode(value) for name, value in state["attributes"].items()},
        "modules": inner,
    }


def _read(module: nn.Module, state: dict[str, Any]) -> None:
    """Take over a decoded state; tensors that are there stay the same objects where they can."""
    before = {**module._buffers, **module._parameters}
    module._parameters.clear()
    module._buffers.clear()
    for name in (*state["parameters"], *state["buffers"]):
        vars(module).pop(name, None)
    for name, pair in state["parameters"].items():
        module._parameters[name] = pair and _parameter(before.get(name), *pair)
    for name, value in state["buffers"].items():
        module._buffers[name] = value if value is None else _buffer(before.get(name), value)
    vars(module).update(state["attributes"])
    for name, inner in state["modules"].items():
        mine = module._modules[name]
        if inner is None:
            module._modules[name] = None
        elif mine is not None:
            _read(mine, inner)


def _parameter(there: Any, value: torch.Tensor, requires_grad: bool) -> nn.Parameter:
    if type(there) is nn.Parameter and there.dtype == value.dtype:
        there.data = value.to(there.device)
        there.requires_grad_(requires_grad)
        return there
    return nn.Parameter(value, requires_grad)


def _buffer(there: Any, value: torch.Tensor) -> torch.Tensor:
    if type(there) is torch.Tensor and there.dtype == value.dtype:
        there.data = value.to(there.device)
        return there
    return value
