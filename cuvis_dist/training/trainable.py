"""Is there anything to train, and a loss that depends on it? Told before phase 1."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence

import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import ExecutionStage

from cuvis_dist.errors import InputError
from cuvis_dist.nodes.upstream import nodes_before

#: So many axes have only the values of pixels: batch, height and width.
_PIXELS = 3


def check_trainable(
    pipeline: CuvisPipeline, unfreeze_nodes: Collection[str], loss_nodes: Sequence[Node]
) -> None:
    """Refuse a training that surely fails in its first step; the nodes stay as they are.

    Upstream trains every parameter that requires a gradient once ``unfreeze_nodes`` are unfrozen,
    and adds up all outputs of the loss nodes.

    Parameters
    ----------
    pipeline : CuvisPipeline
        The pipeline before phase 1. A class that is not of ``cuvis_ai`` may make parameters when it
        is fitted, and counts as trainable until then.
    unfreeze_nodes : collection of str
        The names of the nodes that are unfrozen after phase 1.
    loss_nodes : sequence of Node
        The nodes whose outputs are added up.

    Raises
    ------
    InputError
        Naming the node that gives no loss, or the nodes of which one must be unfrozen.
    """
    for node in loss_nodes:
        if problem := _no_loss(node):
            raise InputError(f"loss_nodes names {node.name}, which is no loss: {problem}")
    running = [node for node in loss_nodes if node.should_execute(ExecutionStage.TRAIN)]
    names = ", ".join(node.name for node in loss_nodes)
    if not running:
        raise InputError(
            f"loss_nodes names {names}, which do not run in training: nothing to train"
        )
    used = [*{*running, *nodes_before(pipeline, running)}]
    if any(_is_trained(node, unfreeze_nodes) for node in used):
        return
    may = sorted(node.name for node in used if _can_be_trained(node))
    raise InputError(
        f"nothing to train: unfreeze_nodes ({', '.join(unfreeze_nodes) or 'none'}) leaves no "
        f"parameter to train of what the losses ({names}) depend on. "
        + (
            f"It can name {', '.join(may)}"
            if may
            else "No node there has any: run phase 1 alone (cuvis-dist init)"
        )
    )


def _no_loss(node: Node) -> str | None:
    """Return why the outputs of a node cannot be added up to one number, or None."""
    for port, spec in type(node).OUTPUT_SPECS.items():
        if spec.optional:
            continue
        if spec.dtype is not torch.Tensor and not isinstance(spec.dtype, torch.dtype):
            return f"its output {port} is no tensor"
        if len(spec.shape) >= _PIXELS or any(isinstance(n, int) and n > 1 for n in spec.shape):
            return f"its output {port} is not one number"
    return None


def _is_trained(node: Node, unfreeze_nodes: Collection[str]) -> bool:
    """Whether a parameter of the node requires a gradient in phase 2, as far as is known now."""
    if any(parameter.requires_grad for parameter in node.parameters()) or _may_gain(node):
        return True
    return node.name in unfreeze_nodes and _can_be_trained(node)


def _can_be_trained(node: Node) -> bool:
    """Whether unfreezing the node gives it a parameter to train."""
    if type(node).unfreeze is Node.unfreeze:
        return bool(type(node).TRAINABLE_BUFFERS) or any(True for _ in node.parameters())
    unfrozen = copy.deepcopy(node)
    try:
        unfrozen.unfreeze()
    except Exception:  # it may need its fit first
        return True
    return any(parameter.requires_grad for parameter in unfrozen.parameters())


def _may_gain(node: Node) -> bool:
    """Whether the node is fitted by code that may make parameters: none of ``cuvis_ai`` does."""
    fit = type(node).statistical_initialization
    return node.requires_initial_fit and not fit.__module__.startswith("cuvis_ai.")
