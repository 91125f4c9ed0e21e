"""Which nodes run on rank 0 alone? Sinks, and visualizers that nothing else reads.

Every rank runs the pipeline; what a node writes in its forward would be written once per rank.
Rank 0 shows its own part of each training batch and its own validation batches; the values that
the trainer logs are those of all frames.
"""

from __future__ import annotations

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import NodeCategory

from cuvis_dist.nodes import upstream


def is_sink(node: Node) -> bool:
    """Whether the node's class says that it only takes in: files, monitors, streams."""
    return node.get_category() is NodeCategory.SINK


def rank_zero_nodes(pipeline: CuvisPipeline) -> list[Node]:
    """Return the sinks and visualizers whose outputs no other node reads."""
    order = upstream.topological_order(pipeline)
    read_by_others: set[Node] = set()
    found = []
    for node in reversed(order):
        shows = node.get_category() in (NodeCategory.SINK, NodeCategory.VISUALIZER)
        if shows and node not in read_by_others:
            found.append(node)
        else:
            read_by_others |= {source for source, _, _ in upstream.edges_into(pipeline, node)}
    return found


def silence_sinks(pipeline: CuvisPipeline) -> None:
    """Let the nodes that belong to rank 0 not run in this process."""
    for node in rank_zero_nodes(pipeline):
        node.should_execute = _never


def close_sinks(pipeline: CuvisPipeline) -> None:
    """Close what sinks have open, so that they can travel back to the driver."""
    for node in pipeline.nodes():
        if is_sink(node):
            node.cleanup()


def _never(stage: object) -> bool:
    return False
