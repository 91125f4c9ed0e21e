"""Which nodes can be fitted on a sample of pixels, so that the archive is read once?

A node behind others that have to be fitted first needs a reading of its own, or a sample of the
pixels that an earlier pass has kept, sent through the nodes that are fitted by then. A sample does
where the node is fitted by moments, whose standard errors can be given, and where every node before
it maps each pixel by itself. What extrema, quantiles or a sample of a sample say about all pixels
has no honest error: these are measured on all of them. Pure: no Ray, no data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.initialization.plan import Fit, Pass, make_plan, share
from cuvis_dist.nodes.catalogue import is_pixelwise
from cuvis_dist.nodes.upstream import nodes_before, topological_order
from cuvis_dist.scaling import Measuring
from cuvis_dist.statistics import Moments


def planned(
    pipeline: CuvisPipeline,
    measuring: Measuring,
    found: Collection[str] = (),
    fitted: Collection[Node] = (),
) -> list[Pass]:
    """Return the passes that fit every statistical node, as these settings say.

    Parameters
    ----------
    measuring : Measuring
        Whether to fold, and whether later levels are fitted on a sample.
    found, fitted
        As for :func:`~cuvis_dist.initialization.plan.make_plan`.
    """
    plan = make_plan(pipeline, measuring.fold, found, fitted)
    return on_samples(pipeline, plan, fitted) if measuring.later_levels == "sampled" else plan


def on_samples(
    pipeline: CuvisPipeline, plan: list[Pass], fitted: Collection[Node] = ()
) -> list[Pass]:
    """Return the plan with every fit for which a sample would do moved to the earliest pass.

    A fit that still needs a reading after the first says why (:attr:`Fit.again`).
    """
    known, left, passes = set(fitted), list(plan), list[Pass]()
    while left:
        step = left.pop(0)
        if step.streamed is None:
            known |= {*step.nodes}
            levels, later = list[Pass](), list[Pass]()
            for other in left:
                reasons = [(fit, _why_not(pipeline, fit, known)) for fit in other.fits]
                if able := [fit for fit, reason in reasons if not reason]:
                    levels.append(share(able))
                    known |= {fit.node for fit in able}
                if rest := [replace(fit, again=reason) for fit, reason in reasons if reason]:
                    later.append(share(rest))
                elif other.streamed is not None:
                    later.append(other)
            step, left = replace(step, later=tuple(levels)), later
        known |= {*step.nodes}
        passes.append(step)
    return passes


def _why_not(pipeline: CuvisPipeline, fit: Fit, known: set[Node]) -> str:
    """Return why a node cannot be fitted on a sample, given which nodes are fitted by then."""
    at, recipe = fit.source.node, fit.source.recipe
    if recipe.statistic is not Moments or not recipe.by_strips:
        return f"no standard error can be given for {recipe.statistic.name} of a sample"
    before = nodes_before(pipeline, [at])
    through = [n for n in topological_order(pipeline) if n in before]
    for node in [*through, *(hop.node for hop in fit.chain)]:
        if node.requires_initial_fit and node not in known:
            return f"{node.name} is fitted by a later reading"
    for node in through:
        if not is_pixelwise(node):
            return f"{node.name} does not map each pixel by itself"
    return ""
