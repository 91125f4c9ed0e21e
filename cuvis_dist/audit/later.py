"""How far are nodes of later passes from what they would be fitted to now?

The pixels that a store keeps go through the nodes before, as they were fitted then; a copy of each
node is fitted on what arrives, by its own code, and compared with what it froze. How much that
changes without each of some random groups of the pixels gives the standard error.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.audit.drift import NodeDrift, compared, state_of
from cuvis_dist.audit.stored import Stored
from cuvis_dist.errors import CuvisDistError
from cuvis_dist.initialization.passes import derived, freeze_fit
from cuvis_dist.initialization.plan import Fit, Pass
from cuvis_dist.initialization.sampling import (
    FEWEST,
    Fitter,
    merged,
    one_thread_each,
    without_each,
)
from cuvis_dist.statistics import Statistic
from cuvis_dist.statistics.drawn import DrawnSample, error_by_groups, joined

#: Pixels of the sample, at most: what more would add is small beside the drift that matters.
_MOST = 1 << 16


def later_drift(
    stored: Stored, initialized: CuvisPipeline
) -> tuple[list[NodeDrift], dict[str, str]]:
    """Compare the nodes that later passes fit with an initialization.

    Parameters
    ----------
    stored : Stored
        What the store knows of the archive.
    initialized : CuvisPipeline
        A pipeline that was fitted before, with nodes of the same names. It is not changed.

    Returns
    -------
    tuple of list of NodeDrift and dict of str to str
        The nodes that were compared; and the others, each with the reason.
    """
    why = dict(stored.why_not)
    names = {node.name for node in initialized.nodes()}
    step, archive, found = stored.step, stored.archive, list[NodeDrift]()
    if step is None or archive is None or not step.later:
        return found, why
    needed = {n.name for n in step.nodes} | {
        m.node.name for level in step.later for m in level.measurements
    }
    later = [fit.node.name for level in step.later for fit in level.fits]
    if lost := sorted(needed - names):
        return found, why | dict.fromkeys(later, f"the pipeline has no node {lost[0]}")
    sample, reason = _sample(stored)
    if sample is None:
        return found, why | dict.fromkeys(later, reason)
    with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
        theirs = of_pipeline(step, initialized)
        fitter = Fitter(initialized, archive, theirs, sample, stored.counted)
        for level in theirs.later:
            try:
                parts, probes = fitter.measure(level, pool)
            except CuvisDistError as error:
                why |= dict.fromkeys((fit.node.name for fit in level.fits), str(error))
                continue
            for fit in level.fits:
                each = _of_fit(fit, parts[fit.source.key], probes, sample)
                if isinstance(each, str):
                    why[fit.node.name] = each
                else:
                    found.append(each)
    return found, why


def of_pipeline(step: Pass, pipeline: CuvisPipeline) -> Pass:
    """Return a pass for the nodes of the same names of another pipeline."""
    nodes = {node.name: node for node in pipeline.nodes()}

    def moved(level: Pass) -> Pass:
        fits = tuple(of_nodes(fit, nodes) for fit in level.fits)
        sources = {fit.source.key: fit.source for fit in fits}
        measurements = tuple(sources[m.key] for m in level.measurements)
        return replace(level, fits=fits, measurements=measurements)

    return replace(moved(step), later=tuple(map(moved, step.later)))


def of_nodes(fit: Fit, nodes: Mapping[str, Node]) -> Fit:
    """Return the same fit of nodes of another pipeline, by name."""
    chain = tuple(replace(hop, node=nodes[hop.node.name]) for hop in fit.chain)
    source = replace(fit.source, node=nodes[fit.source.node.name])
    return replace(fit, node=nodes[fit.node.name], source=source, chain=chain)


def _sample(stored: Stored) -> tuple[DrawnSample | None, str]:
    """Return the pixels of all frames; or why there are none."""
    again = "measure again with the pipeline of today (cuvis-dist measure)"
    kept = [drawn for drawn in stored.drawn if drawn is not None]
    if len(kept) < len(stored.drawn) or not any(len(drawn.rank) for drawn in kept):
        return None, f"the store has no sample of the pixels of each frame: {again}"
    try:
        sample = DrawnSample([joined([drawn]) for drawn in kept], _MOST)
    except ValueError as error:
        return None, f"no sample can be made of the frames, since {error}"
    if sample.k < min(FEWEST, sample.n):
        return None, (
            f"the sample of {sample.k} pixels is too small: measure again with "
            "--set measuring.later_levels=sampled, which keeps more"
        )
    return sample, ""


def _of_fit(
    fit: Fit, parts: list[Statistic], probes: dict[str, Any], sample: DrawnSample
) -> NodeDrift | str:
    """Return how far a node is from a copy that is fitted now, with the standard error."""

    def again(some: Statistic) -> tuple[Statistic, Node]:
        node = copy.deepcopy(fit.node)
        now = derived(fit, {fit.source.key: some}, probes)
        freeze_fit(replace(fit, node=node), now)
        return now, node

    try:
        now, node = again(merged(parts))
        found = compared(fit, now, state_of(fit.node), state_of(node))
        if isinstance(found, str):
            return found
        error = torch.zeros(())
        if sample.fraction < 1 and len(parts) > 1:
            ratios = []
            for some in without_each(parts):
                now, node = again(some)
                each = compared(fit, now, state_of(fit.node), state_of(node), found.at)
                ratios.append(np.nan if isinstance(each, str) else each.ratio)
            error = error_by_groups(torch.tensor(ratios, dtype=torch.float64), sample.fraction)
    except (ValueError, KeyError, RuntimeError, CuvisDistError) as problem:
        return f"it cannot be fitted on the sample: {problem}"
    more = {"standard_error": float(error), "sample": float(merged(parts).n)}
    return replace(found, figures=found.figures | more)
