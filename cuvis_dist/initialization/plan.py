"""Which passes over the archive does a pipeline need, and what does each one fit?

A node can be measured once every statistical node before it is frozen, so nodes are grouped
by how many statistical nodes lie before them on the longest way from the data: one pass per
group. A node without a recipe gets a pass of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.initialization.recipes import Recipe, recipe_for
from cuvis_dist.upstream import edges_into, topological_order


@dataclass(frozen=True)
class Pass:
    """One reading of the archive.

    Attributes
    ----------
    recipes : dict of Node to Recipe
        What is measured for which node, in topological order. Empty for a streamed node.
    streamed : Node or None
        The node that is fitted by its own code on all of its inputs.
    """

    recipes: dict[Node, Recipe]
    streamed: Node | None = None

    @property
    def nodes(self) -> list[Node]:
        """The nodes that this pass fits, in topological order."""
        return [self.streamed] if self.streamed is not None else list(self.recipes)

    def __str__(self) -> str:
        if self.streamed is not None:
            return f"{self.streamed.name} (streamed to its own fit)"
        return ", ".join(f"{node.name} by {recipe}" for node, recipe in self.recipes.items())


def statistical_nodes(pipeline: CuvisPipeline) -> list[Node]:
    """Return the nodes that need a statistical fit, in topological order."""
    return [node for node in topological_order(pipeline) if node.requires_initial_fit]


def make_plan(pipeline: CuvisPipeline) -> list[Pass]:
    """Return the passes that fit every statistical node of ``pipeline``, in order."""
    depth: dict[Node, int] = {}
    levels: dict[int, list[Node]] = {}
    for node in topological_order(pipeline):
        depth[node] = max(
            (
                depth[source] + source.requires_initial_fit
                for source, _, _ in edges_into(pipeline, node)
            ),
            default=0,
        )
        if node.requires_initial_fit:
            levels.setdefault(depth[node], []).append(node)

    passes: list[Pass] = []
    for _, nodes in sorted(levels.items()):
        recipes = {node: recipe for node in nodes if (recipe := recipe_for(node)) is not None}
        if recipes:
            passes.append(Pass(recipes))
        passes.extend(Pass({}, node) for node in nodes if node not in recipes)
    return passes
