"""Which passes over the archive does a pipeline need, and what does each one measure and fit?

A port can be measured once every statistical node before it is frozen. Behind affine nodes a
port's moments and extrema follow from those of the port before them, so a node is fitted from
the farthest port back that only affine nodes separate from it, and nodes that share such a port
share its measurement. Pure: no Ray, no data.

A node behind one that changes with every frame is streamed in order, since upstream runs that one
once more for each statistical node behind it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import ExecutionStage

from cuvis_dist.initialization.inside import Inside
from cuvis_dist.nodes.affine import Hop
from cuvis_dist.nodes.catalogue import affine_hop, recipe_for
from cuvis_dist.nodes.recipe import Recipe
from cuvis_dist.nodes.survey import evolving_nodes
from cuvis_dist.nodes.upstream import edges_into, nodes_before, topological_order
from cuvis_dist.statistics import Extrema, Moments


@dataclass(frozen=True)
class Measurement:
    """A statistic of what one node receives.

    Attributes
    ----------
    node : Node
        The node whose input is measured.
    recipe : Recipe
        Which port and statistic; only its measuring half is used.
    source : str
        Where the port's value comes from: ``<node>.<port>``, or ``batch.<port>``.
    """

    node: Node
    recipe: Recipe
    source: str

    @property
    def key(self) -> str:
        """Identifies the measurement in a pass: nodes fed from one port share it."""
        of = self.source if self.recipe.shareable else self.node.name
        return self.recipe.describe(of)


@dataclass(frozen=True)
class Fit:
    """How one node is fitted: from a measurement, through the affine nodes between.

    Attributes
    ----------
    node : Node
        The node.
    recipe : Recipe
        How it is fitted.
    source : Measurement
        What is measured for it.
    chain : tuple of Hop
        The affine nodes between the measured port and the node's own.
    again : str
        Why the archive is read again for it, where later levels are fitted from a sample.
    """

    node: Node
    recipe: Recipe
    source: Measurement
    chain: tuple[Hop, ...] = ()
    again: str = ""

    def __str__(self) -> str:
        if not self.chain:
            return str(self.recipe)
        names = ", ".join(hop.node.name for hop in self.chain)
        return f"{self.recipe} derived from {self.source.key} through {names}"


@dataclass(frozen=True)
class Pass:
    """One reading of the archive.

    Attributes
    ----------
    measurements : tuple of Measurement
        What is measured, each once.
    fits : tuple of Fit
        The nodes fitted from that, in topological order.
    streamed : Node or None
        Instead: the node that is fitted by its own code on all of its inputs.
    after : tuple of str
        The nodes before that one which change with every frame, so that the frames run through
        all nodes before it in order, in one process. None of them: side by side.
    later : tuple of Pass
        What is measured, and fitted, without another reading: on a sample of the pixels, level
        after level (see :mod:`~cuvis_dist.initialization.levels`).
    inside : Inside or None
        Which pixels count: those of the bulk; None for all that the settings say.
    """

    measurements: tuple[Measurement, ...] = ()
    fits: tuple[Fit, ...] = ()
    streamed: Node | None = None
    after: tuple[str, ...] = ()
    later: tuple[Pass, ...] = ()
    inside: Inside | None = None

    @property
    def nodes(self) -> list[Node]:
        """The nodes that this pass fits, in topological order, those on a sample last."""
        if self.streamed is not None:
            return [self.streamed]
        return [fit.node for fit in self.fits] + [n for level in self.later for n in level.nodes]

    @property
    def of_frames(self) -> list[str]:
        """The nodes that this pass fits frame by frame, where upstream does batch by batch."""
        return [fit.node.name for fit in self.fits if fit.recipe.statistic.whole_frame]

    def by_key(self) -> dict[str, tuple[str, Recipe]]:
        """Return the measurements by key: the name of the node, and its recipe."""
        return {m.key: (m.node.name, m.recipe) for m in self.measurements}

    def __str__(self) -> str:
        if self.streamed is not None:
            changing = f", in order: {', '.join(self.after)} changes with every frame"
            return f"fits {self.streamed.name} by streaming its inputs{changing * bool(self.after)}"
        measured = ", ".join(m.key for m in self.measurements)
        fitted = ", ".join(fit.node.name for fit in self.fits)
        sampled = ", ".join(node.name for level in self.later for node in level.nodes)
        also = f"; on a sample of its pixels fits {sampled}" if sampled else ""
        return f"measures {measured}; fits {fitted}{also}"


def statistical_nodes(pipeline: CuvisPipeline) -> list[Node]:
    """Return the nodes that need a statistical fit, in topological order."""
    return [node for node in topological_order(pipeline) if node.requires_initial_fit]


def make_plan(
    pipeline: CuvisPipeline,
    fold: bool = True,
    found: Collection[str] = (),
    fitted: Collection[Node] = (),
) -> list[Pass]:
    """Return the passes that fit every statistical node of ``pipeline``, in order.

    Parameters
    ----------
    fold : bool
        Derive what affine nodes separate; otherwise every node's own input is measured.
    found : collection of str
        Nodes that turned out to change with every frame, besides those that are known to.
    fitted : collection of Node
        Statistical nodes that are fitted already.
    """
    order = topological_order(pipeline)
    unfitted = [node for node in statistical_nodes(pipeline) if node not in fitted]
    evolving = {*found, *evolving_nodes(pipeline, None, ExecutionStage.INFERENCE, unfitted)}
    fits: dict[Node, Fit] = {}
    after: dict[Node, tuple[str, ...]] = {}
    number: dict[Node, int] = {}  # of the pass that fits a node
    for node in unfitted:
        before = nodes_before(pipeline, [node])
        after[node] = tuple(n.name for n in order if n in before and n.name in evolving)
        recipe, at = None if after[node] else recipe_for(node), node
        if recipe is not None:
            fits[node] = _fit(pipeline, node, recipe, {*fitted, *fits} if fold else ())
            at = fits[node].source.node
        before = nodes_before(pipeline, [at])
        between = [number[h.node] for h in (fits[node].chain if recipe else ()) if h.node in number]
        number[node] = max([0, *(number[n] + 1 for n in before if n in number), *between])
        if after[node]:  # whatever upstream fits before has left its mark on the nodes before
            number[node] = max(number.values())

    plan: list[Pass] = []
    for n in range(max(number.values(), default=-1) + 1):
        here = [node for node in unfitted if number[node] == n]
        shared = share([fits[node] for node in here if node in fits])
        if shared.fits:
            plan.append(shared)
        plan.extend(Pass(streamed=node, after=after[node]) for node in here if node not in fits)
    return plan


def share(fits: list[Fit]) -> Pass:
    """Return one pass for several fits, with each measurement made once.

    Where the full moments of a port are measured, its variances need no measurement of their own.
    """
    full = {
        fit.source.source: fit.source
        for fit in fits
        if fit.source.recipe.statistic is Moments and not fit.source.recipe.options
    }
    fits = [
        replace(fit, source=full[fit.source.source])
        if fit.source.recipe.statistic is Moments and fit.source.source in full
        else fit
        for fit in fits
    ]
    return Pass(tuple({fit.source.key: fit.source for fit in fits}.values()), tuple(fits))


def measured_directly(pipeline: CuvisPipeline, fit: Fit) -> Fit:
    """Return the fit of the same node from its own input."""
    return _fit(pipeline, fit.node, fit.recipe, ())


def _fit(pipeline: CuvisPipeline, node: Node, recipe: Recipe, fitted: Collection[Node]) -> Fit:
    """Walk back from the node's port over affine nodes to where it is to be measured.

    Only nodes that need no fit, or are in ``fitted``, are walked over: the map of a chain is known
    when its nodes are frozen.
    """
    chain: list[Hop] = []
    at, port = node, recipe.port
    while fitted and recipe.statistic in (Moments, Extrema):
        producer = _producer(pipeline, at, port)
        hop = affine_hop(*producer) if producer else None
        if hop is None or (hop.node.requires_initial_fit and hop.node not in fitted):
            break
        chain.insert(0, hop)
        at, port = hop.node, hop.input
    producer = _producer(pipeline, at, port)
    source = f"{producer[0].name}.{producer[1]}" if producer else f"batch.{port}"
    measured = Recipe(port, recipe.statistic) if chain else recipe
    return Fit(node, recipe, Measurement(at, measured, source), tuple(chain))


def _producer(pipeline: CuvisPipeline, node: Node, port: str) -> tuple[Node, str] | None:
    """Return ``(node, output port)`` that feeds a port, or None when the batch does."""
    return next(((n, out) for n, out, to in edges_into(pipeline, node) if to == port), None)
