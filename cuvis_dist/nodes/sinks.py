"""Which nodes run on rank 0 alone? Sinks, and visualizers that nothing else reads.

Every rank runs the pipeline; what a node writes in its forward would be written once per rank.
Rank 0 shows its own part of each training batch and its own validation batches; the values that
the trainer logs are those of all frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cuvis_ai.node.monitor import TensorBoardMonitorNode
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
    """Close what sinks have open, so that they can travel to another process and go on there."""
    for node in pipeline.nodes():
        if is_sink(node):
            node.cleanup()
    continue_boards(pipeline, boards_of(pipeline))


def boards_of(pipeline: CuvisPipeline) -> dict[str, Path]:
    """Return the folder of each TensorBoard node that has opened one, by the node's name."""
    return {
        node.name: node.log_dir
        for node in pipeline.nodes()
        if isinstance(node, TensorBoardMonitorNode) and node.log_dir is not None
    }


def continue_boards(pipeline: CuvisPipeline, folders: Mapping[str, Path]) -> None:
    """Let TensorBoard nodes go on in these folders, by node: one run has one folder.

    A node opens a folder of its own in every process, beside those that are there; in upstream's
    one process training and evaluation share it.
    """
    for node in pipeline.nodes():
        if node.name in folders:
            upstream.log_to(node, folders[node.name])


def _never(stage: object) -> bool:
    return False
