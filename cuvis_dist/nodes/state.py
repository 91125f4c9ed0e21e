"""What is the state of a node, when did it change, and how does a copy hand it over?

Buffers, parameters and plain attributes: many of the latter (fitted flags, temperatures) are in no
state dict.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.errors import CuvisDistError


class StatefulNodesError(CuvisDistError):
    """Nodes change their state with every frame, where each frame must stand for itself.

    Parameters
    ----------
    *names : str
        The names of the nodes.
    """

    def __init__(self, *names: str) -> None:
        super().__init__(*names)
        self.names = names

    def __str__(self) -> str:
        return ", ".join(self.names)


class StateWatch:
    """Notices which nodes change their tensors in this process from now on.

    Parameters
    ----------
    nodes : iterable of Node
        The nodes to watch.
    """

    def __init__(self, nodes: Iterable[Node]) -> None:
        self._before = {node: _mark(node) for node in nodes}

    def changed(self) -> list[Node]:
        """Return the nodes that have changed, by name."""
        nodes = [node for node, mark in self._before.items() if _mark(node) != mark]
        return sorted(nodes, key=lambda node: node.name)

    def require_unchanged(self) -> None:
        """Raise StatefulNodesError, which names the nodes, if one has changed."""
        if changed := self.changed():
            raise StatefulNodesError(*(node.name for node in changed))


def _mark(node: Node) -> tuple:
    return tuple((id(t), t._version) for t in (*node.buffers(), *node.parameters()))


#: What stays a node's own when it takes over another's state: its place in the pipeline.
IDENTITY = frozenset({"_name", "_pipeline_counter", "_input_ports", "_output_ports"})


def adopt(node: Node, fitted: Node) -> None:
    """Give ``node`` the state of ``fitted``, a copy of it that was changed elsewhere.

    Buffers, parameters, hyperparameters and plain attributes (fitted flags, temperatures,
    calibrated thresholds): many of these are in no state dict.
    """
    node.__dict__.update({k: v for k, v in fitted.__dict__.items() if k not in IDENTITY})


def adopt_all(pipeline: CuvisPipeline, fitted: list[Node]) -> None:
    """:func:`adopt` for the nodes of a pipeline that came back from a worker."""
    by_name = {node.name: node for node in pipeline.nodes()}
    for node in fitted:
        adopt(by_name[node.name], node)


def hash_state(nodes: Iterable[Node]) -> str:
    """Return one hash of every buffer and parameter, by node and name."""
    return hash_states({node.name: node.state_dict() for node in nodes})


def hash_states(states: Mapping[str, Mapping[str, torch.Tensor]]) -> str:
    """Return :func:`hash_state` of the nodes that have these states, by name and in order."""
    digest = hashlib.sha256()
    for node, state in states.items():
        for name, value in sorted(state.items()):
            digest.update(_content(f"{node}.{name}", value))
    return digest.hexdigest()


def hash_tensors(nodes: Iterable[Node]) -> dict[str, str]:
    """Return the hash of each buffer and parameter, by node and name."""
    return {
        f"{node.name}.{name}": hashlib.sha256(_content(name, value)).hexdigest()
        for node in nodes
        for name, value in node.state_dict().items()
    }


def _content(name: str, value: torch.Tensor) -> bytes:
    flat = value.detach().cpu().reshape(-1).contiguous()
    shape = f"{name}{tuple(value.shape)}{value.dtype}".encode()
    return shape + flat.view(torch.uint8).numpy().tobytes()
