"""What does a pipeline need to train on many ranks as in one process? Node by node.

Two frames and one of them run through copies of the nodes, so that it is known which ports have
rows of frames, and how nodes treat frames that nobody described. The result is plain data that
one rank finds and all ranks follow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import ExecutionStage, NodeCategory
from cuvis_ai_schemas.execution import Context
from torch.nn.modules.batchnorm import _BatchNorm

from cuvis_dist.nodes import upstream
from cuvis_dist.nodes.batching import known
from cuvis_dist.nodes.catalogue import is_pixelwise
from cuvis_dist.nodes.probing import Seen, evolves_when_run, left_alone, probe
from cuvis_dist.nodes.rows import RAGGED, Rows, bytes_per_frame, has_frames, is_ragged, rows_of
from cuvis_dist.nodes.sinks import rank_zero_nodes
from cuvis_dist.nodes.treatment import Batching, Treatment, Use


@dataclass(frozen=True)
class NodePlan:
    """How one node runs in a training step on many ranks.

    Attributes
    ----------
    batching : Batching
        How it treats frames, in this pipeline.
    inputs, outputs : dict of str to Rows
        The rows per frame of each port of a joint node. Outputs of a loss stay whole.
    alike : bool
        Whether the gradients of its outputs are the same on all ranks.
    gathered : int
        Bytes per frame that come together for a joint node.
    """

    batching: Batching
    inputs: dict[str, Rows] = field(default_factory=dict)
    outputs: dict[str, Rows] = field(default_factory=dict)
    alike: bool = False
    gathered: int = 0

    def __str__(self) -> str:
        extra = f"; gathers {self.gathered:,} bytes per frame" if self.gathered else ""
        found = "found: " if self.batching.found else ""
        return f"{self.batching.treatment}: {found}{self.batching.why}{extra}"


def training_survey(
    pipeline: CuvisPipeline,
    two: Mapping[str, Any],
    one: Mapping[str, Any],
    loss_nodes: Collection[Node],
) -> dict[str, NodePlan]:
    """Return how each node runs in a training step, by name; nodes are left as they are.

    Parameters
    ----------
    two, one : mapping
        Batches of two frames, and of the first of them, on the pipeline's device.
    loss_nodes : collection of Node
        The nodes whose outputs are added up.
    """
    context = Context(stage=ExecutionStage.TRAIN)
    nodes = _running(pipeline, context.stage)
    with left_alone():
        return {
            node.name: _plan(node, seen, _Uses.of(pipeline, node, loss_nodes))
            for node, seen in _walk(pipeline, nodes, dict(two), dict(one), context)
        }


def evolving_nodes(
    pipeline: CuvisPipeline,
    frames: Callable[[], dict[str, Any]] | None,
    stage: ExecutionStage,
    fitting: Collection[Node] | None = None,
) -> list[str]:
    """Return the nodes for which the order of batches matters at ``stage``, by name.

    Parameters
    ----------
    frames : callable or None
        Returns a batch, on which nodes that nobody described are run, and is called where there
        are such; without it, they count as not evolving.
    fitting : collection of Node, optional
        Only the nodes before these count, in the mode that they are in, as upstream runs them to
        fit these; otherwise all nodes count, in evaluation mode.
    """
    running = _running(pipeline, stage)
    if fitting is not None:
        before = upstream.nodes_before(pipeline, fitting)
        running = [node for node in running if node in before]
    found, unknown = set(), []
    for node in running:
        fact = known(node, Use(frozenset(type(node).OUTPUT_SPECS)))
        if fact is None:
            if not is_pixelwise(node):
                unknown.append(node)
        elif stage in fact.evolves or (fitting is not None and _tracks(node, fact)):
            found.add(node)
    if unknown and frames is not None:
        batch = frames()
        with left_alone():
            for node, seen in _walk(pipeline, running, batch, batch, Context(stage=stage)):
                inputs = seen.two | seen.more
                if node in unknown and evolves_when_run(node, inputs, as_is=fitting is not None):
                    found.add(node)
    return [node.name for node in running if node in found]


def _tracks(node: Node, fact: Batching) -> bool:
    """Whether batch norms inside a node note the frames that pass through it now."""
    return fact.batch_norms and any(
        isinstance(module, _BatchNorm) and module.training for module in node.modules()
    )


def obvious_plans(
    pipeline: CuvisPipeline, loss_nodes: Collection[Node]
) -> dict[str, NodePlan] | None:
    """Return what :func:`training_survey` would find, where no frames are needed to know it.

    That is where all nodes are known to treat each frame by itself, and all losses, which no
    node reads, to be means; None otherwise.
    """
    plans = {}
    for node in _running(pipeline, ExecutionStage.TRAIN):
        uses = _Uses.of(pipeline, node, loss_nodes)
        fact = known(node, uses.use)
        expected = Treatment.MEAN if uses.is_loss else Treatment.PER_FRAME
        if fact is None or fact.treatment is not expected or fact.batch_norms or fact.random:
            return None
        if uses.is_loss and uses.by_nodes:
            return None
        plans[node.name] = NodePlan(fact)
    return plans


def outline(pipeline: CuvisPipeline, loss_nodes: Collection[Node]) -> dict[str, str]:
    """Return what can be said of every node's part in a training step without frames, by name."""
    found = {}
    running, shown = _running(pipeline, ExecutionStage.TRAIN), rank_zero_nodes(pipeline)
    for node in upstream.topological_order(pipeline):
        if node in running:
            fact = known(node, _Uses.of(pipeline, node, loss_nodes).use)
            found[node.name] = str(NodePlan(fact)) if fact else "tried on the first frames"
        elif node in shown:
            found[node.name] = "on rank 0: shows or writes its part of a batch"
        else:
            found[node.name] = "not in a training step"
    return found


def fit_on(pipeline: CuvisPipeline, batch: Mapping[str, Any]) -> None:
    """Fit the statistical nodes that are not fitted yet on one batch, by their own code."""
    for node in upstream.topological_order(pipeline):
        if node.requires_initial_fit and not node._statistically_initialized:
            inputs = upstream.node_inputs(pipeline, node, dict(batch))
            node.statistical_initialization(iter([inputs]))


# ---- one node --------------------------------------------------------------------------


@dataclass(frozen=True)
class _Uses:
    """Who reads a node's outputs: the loss, and other nodes."""

    use: Use
    is_loss: bool
    by_nodes: bool

    @classmethod
    def of(cls, pipeline: CuvisPipeline, node: Node, loss_nodes: Collection[Node]) -> _Uses:
        running = set(_running(pipeline, ExecutionStage.TRAIN))
        read = {
            port
            for reader in running
            for source, port, _ in upstream.edges_into(pipeline, reader)
            if source is node
        }
        is_loss = node in loss_nodes
        everything = frozenset(type(node).OUTPUT_SPECS) if is_loss else frozenset(read)
        return cls(Use(everything), is_loss, bool(read))


def _plan(node: Node, seen: _Seen, uses: _Uses) -> NodePlan:
    framed = frozenset(port for port, rows in seen.rows.items() if has_frames(rows))
    ragged = any(is_ragged(rows) for rows in seen.rows.values())
    use = replace(uses.use, framed=framed)
    batching = known(node, use) or probe(node, seen, use.read, uses.is_loss)
    joint = Treatment.JOINT
    if batching.treatment is not joint and _must_be_joint(batching, seen, uses, framed, ragged):
        batching = replace(batching, treatment=joint, why=_WHY_ANYWAY)
    elif batching.treatment is joint and not use.read and _only_shows(node):
        batching = replace(batching, treatment=Treatment.PER_FRAME, why="nothing reads it")
    if not framed:  # whatever it computes, all ranks compute from the same
        batching = replace(batching, batch_norms=False)
    if batching.treatment is not joint:
        return NodePlan(batching)
    return NodePlan(
        batching,
        {port: seen.rows[port] for port in framed},
        {} if uses.is_loss else seen.outputs,
        alike=uses.is_loss and not uses.by_nodes,
        gathered=sum(bytes_per_frame(seen.two[port], seen.rows[port]) for port in framed),
    )


_WHY_ANYWAY = "treats each frame by itself, but what it gives or gets is of the whole batch"


def _must_be_joint(
    batching: Batching, seen: _Seen, uses: _Uses, framed: Collection[str], ragged: bool
) -> bool:
    """Whether a node must run on the whole batch for what it is connected to.

    A value whose rows do not follow the frames stays whole on every rank, and so does what is
    computed from it. A loss that is added up, or read by a node too, must be the batch's.
    """
    outputs = seen.outputs.values()
    if any(is_ragged(rows) for rows in outputs) or (ragged and framed):
        return True
    if batching.treatment is Treatment.MEAN:
        return uses.by_nodes or not uses.is_loss or not framed
    return uses.is_loss and any(has_frames(rows) for rows in outputs)


def _only_shows(node: Node) -> bool:
    return node.get_category() in (
        NodeCategory.METRIC,
        NodeCategory.SINK,
        NodeCategory.VISUALIZER,
    )


# ---- all nodes -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen(Seen):
    """What a node receives, and what it gives."""

    outputs: dict[str, Rows] = field(default_factory=dict)


def _running(pipeline: CuvisPipeline, stage: ExecutionStage) -> list[Node]:
    """Return the nodes that every rank runs at ``stage``, in order."""
    shown = set(rank_zero_nodes(pipeline))
    order = upstream.topological_order(pipeline)
    return [node for node in order if node.should_execute(stage) and node not in shown]


def _walk(
    pipeline: CuvisPipeline,
    nodes: list[Node],
    two: dict[str, Any],
    one: dict[str, Any],
    context: Context,
) -> Iterator[tuple[Node, _Seen]]:
    """Run a copy of each of ``nodes``, and yield the node with what the copy got and gave.

    Ports are dropped when the last node that reads them has run.
    """
    last = {
        (source.name, port): index
        for index, node in enumerate(nodes)
        for source, port, _ in upstream.edges_into(pipeline, node)
    }
    values: tuple[dict, dict] = ({}, {})
    ragged: set[tuple[str, str]] = set()
    for index, node in enumerate(nodes):
        inputs = [
            upstream.inputs_of(pipeline, node, given, batch)
            for given, batch in zip(values, (two, one), strict=True)
        ]
        outputs = _run_copy(node, inputs, context)
        edges = upstream.edges_into(pipeline, node)
        whole = {to for source, port, to in edges if (source.name, port) in ragged}
        rows = _rows(inputs, whole)
        out = _rows(outputs, set(outputs[0]) if whole or _is_ragged(node) else set())
        ragged |= {(node.name, port) for port, each in out.items() if is_ragged(each)}
        yield node, _Seen(inputs[0], inputs[1], rows, {"context": context}, out)
        for given, produced in zip(values, outputs, strict=True):
            for port, value in produced.items():
                if last.get((node.name, port), -1) > index:
                    given[node.name, port] = value
            for key in [key for key in given if last[key] <= index]:
                del given[key]


def _rows(values: list[dict[str, Any]], whole: Collection[str]) -> dict[str, Rows]:
    """Return the rows of each port, given its values for two frames and for one.

    Ports in ``whole`` have rows that do not follow the frames, even if they do so here.
    """
    two, one = values
    found = {port: rows_of(two[port], one[port]) for port in two if port in one}
    return {
        port: RAGGED if port in whole and has_frames(rows) else rows for port, rows in found.items()
    }


def _is_ragged(node: Node) -> bool:
    fact = known(node, Use(frozenset()))
    return fact is not None and fact.ragged


def _run_copy(node: Node, inputs: list[dict[str, Any]], context: Context) -> list[dict[str, Any]]:
    """Return a node's outputs for two frames and for one.

    A node that cannot run on one frame is taken to give one frame's rows of its outputs; one
    that cannot run on two, to give twice the rows.
    """
    outputs: list[dict[str, Any] | None] = []
    errors = []
    subject = copy.deepcopy(node)
    for given in inputs:
        try:
            outputs.append(subject.forward(**given, context=context))
        except Exception as error:
            outputs.append(None)
            errors.append(error)
    two, one = outputs
    if two is None and one is None:
        raise errors[0]
    if one is None:
        one = {port: _resized(value, 2, 1) for port, value in (two or {}).items()}
    if two is None:
        two = {port: _resized(value, 1, 2) for port, value in one.items()}
    return [two, one]


def _resized(value: Any, frames: int, wanted: int) -> Any:
    if not isinstance(value, torch.Tensor) or not value.ndim or len(value) != frames:
        return value
    return value[:wanted] if wanted < frames else torch.cat([value] * wanted)
