"""Does the state of an initialization fit a pipeline? If not: the first reason, in words.

It fits where the pipeline's statistical nodes, and those before them, are the ones that were
fitted, and where every node takes its state. Nodes behind may be others: a loss, a threshold.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from torch import Tensor

from cuvis_dist.errors import one_line
from cuvis_dist.initialization.card import Initialization, built
from cuvis_dist.initialization.plan import statistical_nodes
from cuvis_dist.nodes.catalogue import annotation_port
from cuvis_dist.nodes.upstream import nodes_before

#: How torch says that a tensor has another shape.
_SIZES = re.compile(
    r"size mismatch for (\S+): .*?torch\.Size\(\[(.*?)\]\).*?torch\.Size\(\[(.*?)\]\)"
)


def measured_part(pipeline: CuvisPipeline) -> dict[str, Any]:
    """Return the part of a pipeline that its fit depends on, as its file has it.

    These are its statistical nodes and all before them; those with labels say which pixels count.
    """
    fitted = statistical_nodes(pipeline)
    labels = [node for node in pipeline.nodes() if annotation_port(node)]
    names = {node.name for node in {*labels, *nodes_before(pipeline, fitted), *fitted}}
    return _part(built(pipeline), names)


def _part(structure: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {
        "nodes": [node for node in structure["nodes"] if node["name"] in names],
        "connections": [
            edge for edge in structure["connections"] if edge["target"].split(".")[0] in names
        ],
    }


def why_not(pipeline: CuvisPipeline, found: Initialization) -> str:
    """Return the first reason why a state does not fit, as the end of a sentence; "" if it does.

    No node of the pipeline is changed.
    """
    if found.structure is not None:
        for reason in structural_changes(found.structure, measured_part(pipeline)):
            return reason
    for node in pipeline.nodes():
        if node.state_dict() or node.requires_initial_fit:
            for reason in _unlike(node, found.states.get(node.name)):
                return reason
    return ""


def structural_changes(theirs: Mapping[str, Any], part: Mapping[str, Any]) -> Iterator[str]:
    """Yield in what nodes and connections differ from those that were fitted.

    Parameters
    ----------
    theirs : dict
        The pipeline that was fitted.
    part : dict
        The part of another one that counts: see :func:`measured_part`.
    """
    known = {node["name"]: node for node in theirs["nodes"]}
    for node in part["nodes"]:
        name, other = node["name"], known.get(node["name"])
        if other is None:
            yield f"it has no node {name}; its nodes are {', '.join(known)}"
            continue
        if other["class_name"] != node["class_name"]:
            yield f"node {name} was a {other['class_name']}, and is a {node['class_name']}"
            continue
        was, now = other.get("hparams") or {}, node.get("hparams") or {}
        for key in sorted({*was, *now}):
            if was.get(key) != now.get(key):
                yield f"{key} of node {name} was {was.get(key)}, and is {now.get(key)}"
    names = {node["name"] for node in part["nodes"]}
    for target in sorted({edge["target"] for edge in part["connections"]}):
        was, now = (
            sorted(edge["source"] for edge in which["connections"] if edge["target"] == target)
            for which in (_part(theirs, names), part)
        )
        if was != now:
            before = ", ".join(was) or "nothing"
            yield f"{target} was fed by {before}, and is by {', '.join(now)}"


def take(node: Node, state: Mapping[str, Tensor]) -> None:
    """Give a node the state that another one of its kind was fitted to; it counts as fitted then.

    Raises
    ------
    RuntimeError
        If it does not fit; some of the node's tensors may have changed.
    """
    for name, value in state.items():
        # What a fit leaves empty, as the inverse that RXGlobal is told not to keep, upstream
        # cannot load.
        if name in node._buffers and not value.numel():
            node._buffers[name] = value.clone()
    node.load_state_dict(state)


def _unlike(node: Node, state: Mapping[str, Tensor] | None) -> Iterator[str]:
    """Yield why a node does not take a state."""
    if state is None:
        yield f"it has no state of node {node.name}"
        return
    if not state and node.requires_initial_fit:
        yield (
            f"node {node.name} has to be fitted, and its class keeps what it fits in no buffer, so "
            "that nothing of it is saved"
        )
        return
    trial = copy.deepcopy(node)
    try:
        take(trial, state)
    except Exception as error:
        yield _in_words(node, state, error)
        return
    for name, value in trial.state_dict().items():
        if name in state and state[name].dtype != value.dtype:
            yield f"{node.name}.{name} is {state[name].dtype} in it, and {value.dtype} in the node"


def _in_words(node: Node, state: Mapping[str, Tensor], error: Exception) -> str:
    mine = node.state_dict()
    if lost := sorted(set(mine) - set(state)):
        return f"it has no {node.name}.{lost[0]}; of this node it has {', '.join(state)}"
    if foreign := sorted(set(state) - set(mine)):
        return f"it has {node.name}.{foreign[0]}, and the node only {', '.join(mine)}"
    if sizes := _SIZES.search(" ".join(str(error).split())):
        name, theirs, ours = sizes.groups()
        return f"{node.name}.{name} has the shape [{theirs}] in it, and [{ours}] in the node"
    return f"node {node.name} does not take its state: {one_line(error)}"
