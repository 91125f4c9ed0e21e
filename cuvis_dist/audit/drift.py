"""How far is an archive from what a pipeline was fitted on?

A node is fitted once more, a copy of it, by its own code on what the archive gives now, and what it
freezes is compared with what it froze then. So any node can be asked, and the mean among its
buffers is the one that comes out as the mean of the pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.audit.compared import line_between
from cuvis_dist.audit.groups import Group
from cuvis_dist.audit.reference import RIDGE
from cuvis_dist.audit.stored import Stored
from cuvis_dist.errors import CuvisDistError, one_line
from cuvis_dist.initialization.passes import derived, freeze_fit
from cuvis_dist.initialization.plan import Fit
from cuvis_dist.nodes.catalogue import keeps_bands, yardsticks_of
from cuvis_dist.nodes.recipe import CollectedRecipe
from cuvis_dist.statistics import ExactMoments, Extrema, Moments, Statistic

#: Nodes freeze float32: a buffer is the mean if it is so close to it, relative to the largest.
_SAME = 1e-4
#: What float32 leaves of a covariance's smallest eigenvalues, by the largest, is noise below this.
_ROUNDED = 1e-7
#: So much of a ratio is that of float32: the same archive has no drift.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class NodeDrift:
    """How far one node's fitted state is from what the archive gives now.

    Attributes
    ----------
    node : str
        The node.
    ratio : float
        ``mean |m - m₀| / mean |m₀|``, the mean-drift ratio of the guide to two-phase training; of
        a node that is fitted by extrema, their mean shift by the mean range; of others, the same
        of what they freeze.
    of : str
        What the ratio is of: ``mean``, ``range``, or the name of a buffer or parameter: of several
        the one that has changed most.
    figures : dict of str to float
        What else is known: gain, offset, and the distances of the distributions; for a node of a
        later pass the ``standard_error`` of the ratio, and how many pixels the ``sample`` has.
    groups : dict of str to float
        The ratio of each group.
    spectra : dict of str to tuple of ndarray and ndarray
        ``mean``, or ``minimum`` and ``maximum``: what the node froze, and what it would now,
        ``[C]`` each.
    bands : bool
        Whether its channels are the bands of the port that is audited.
    at : str
        The buffer or parameter, where neither a mean nor a range was compared.
    """

    node: str
    ratio: float
    of: str
    figures: dict[str, float] = field(default_factory=dict)
    groups: dict[str, float] = field(default_factory=dict)
    spectra: dict[str, tuple[np.ndarray, np.ndarray]] = field(
        default_factory=dict, compare=False, repr=False
    )
    bands: bool = False
    at: str = ""

    @property
    def surely(self) -> float:
        """The ratio less rounding, and twice its standard error where it is of a sample."""
        return self.ratio - _ROUNDING - 2 * self.figures.get("standard_error", 0.0)


def drift(
    stored: Stored, initialized: CuvisPipeline, groups: Sequence[Group]
) -> tuple[list[NodeDrift], dict[str, str]]:
    """Compare an archive with an initialization, node by node of the first pass.

    Parameters
    ----------
    stored : Stored
        What the store knows of the archive.
    initialized : CuvisPipeline
        A pipeline that was fitted before, with nodes of the same names.
    groups : sequence of Group
        The groups that the stored frames form.

    Returns
    -------
    tuple of list of NodeDrift and dict of str to str
        The nodes that were compared; and the others of that pass, each with the reason.
    """
    nodes = {node.name: node for node in initialized.nodes()}
    merged = {key: reduce(lambda a, b: a.merge(b), each) for key, each in stored.statistics.items()}
    found, why = list[NodeDrift](), dict[str, str]()
    for fit in stored.fits:
        there = _in(fit, nodes)
        each = _of_node(there, stored, merged, groups) if there else "the pipeline has no such node"
        if isinstance(each, str):
            why[fit.node.name] = each
        else:
            found.append(each)
    return found, why


def _in(fit: Fit, nodes: Mapping[str, Node]) -> Fit | None:
    """Return the same fit of the nodes of another pipeline; None if they are not there."""
    names = [fit.node.name, *(hop.node.name for hop in fit.chain)]
    if any(name not in nodes for name in names):
        return None
    chain = tuple(replace(hop, node=nodes[hop.node.name]) for hop in fit.chain)
    return replace(fit, node=nodes[fit.node.name], chain=chain)


def _of_node(
    fit: Fit, stored: Stored, merged: dict[str, Statistic], groups: Sequence[Group]
) -> NodeDrift | str:
    if not getattr(fit.node, "_statistically_initialized", True):
        return "it was not fitted"
    again = copy.deepcopy(fit.node)
    try:
        now = derived(fit, merged, stored.probes)
        freeze_fit(replace(fit, node=again), now)
    except (ValueError, KeyError, RuntimeError, CuvisDistError) as error:
        return f"it cannot be fitted on what the store has: {one_line(error)}"
    found = compared(fit, now, state_of(fit.node), state_of(again))
    if isinstance(found, str):
        return found
    of_groups = {}
    if found.of == "mean":
        uids = {frame.uid: i for i, frame in enumerate(stored.frames)}
        (mean, _) = found.spectra["mean"]
        for group in groups:
            parts = [stored.statistics[fit.source.key][uids[frame.uid]] for frame in group.frames]
            whole = {fit.source.key: reduce(lambda a, b: a.merge(b), parts)}
            of: Any = derived(fit, whole, stored.probes)
            of_groups[group.name] = _ratio(of.mean.numpy(), mean)
    return replace(found, groups=of_groups, bands=_keeps_bands(fit, stored))


def compared(
    fit: Fit,
    now: Statistic,
    before: dict[str, np.ndarray],
    after: dict[str, np.ndarray],
    at: str = "",
) -> NodeDrift | str:
    """Return how far what a node froze is from what it would freeze now; or why nobody can say.

    Parameters
    ----------
    now : Statistic
        What it would be fitted from now.
    before, after : dict of str to ndarray
        Its :func:`state_of` then and now.
    at : str
        Which buffer or parameter is compared where it has no mean or range; by default the one
        that has changed most.
    """
    unlike = [n for n in before if n in after and before[n].shape != after[n].shape]
    if unlike:
        return f"its {unlike[0]} had the shape {[*before[unlike[0]].shape]}: it had other bands"
    for lost in sorted(before.keys() & after.keys()):
        if np.isfinite(after[lost]).all() and not np.isfinite(before[lost]).all():
            return NodeDrift(fit.node.name, math.inf, lost)  # what it froze is no number
    if isinstance(now, Extrema) and (of_extrema := _of_extrema(fit, now, before, after)):
        return of_extrema
    if isinstance(now, Moments | ExactMoments):
        name = _which(after, now.mean.numpy())
        if name is not None and name in before:
            mean = before[name].reshape(-1)
            figures = _figures(now, mean, _covariances(now, before, after))
            spectra = {"mean": (mean, now.mean.numpy())}
            ratio = _ratio(now.mean.numpy(), mean)
            return NodeDrift(fit.node.name, ratio, "mean", figures, spectra=spectra)
    if isinstance(fit.recipe, CollectedRecipe):
        return "what it finds (clusters, endmembers, vectors) has no order to be compared in"
    return _of_state(fit, before, after, at)


def _of_state(
    fit: Fit, before: dict[str, np.ndarray], after: dict[str, np.ndarray], at: str
) -> NodeDrift | str:
    """Return the drift of the buffer or parameter that has changed most, or of the one ``at``."""
    units, ratios = yardsticks_of(type(fit.node)), dict[str, tuple[float, str]]()
    wide = {name: torch.from_numpy(value) for name, value in before.items()}
    for name, was in before.items():
        if name not in after or not was.size or (at and name != at):
            continue
        change = after[name] - was
        if was.ndim > 1 and len(was) > 1:  # rows such as components have no sign
            rows = was.reshape(len(was), -1), after[name].reshape(len(was), -1)
            change = np.minimum(np.abs(rows[0] - rows[1]), np.abs(rows[0] + rows[1]))
        whole, of = float(np.abs(was).mean()), name
        if name in units:
            whole = float(units[name].of(wide).abs().mean())
            of = "range" if units[name].unit.endswith("range") else name
        ratios[name] = float(np.abs(change).mean()) / max(whole, 1e-30), of
    if not ratios:
        return "its class keeps what it freezes in no buffer"
    name = max(ratios, key=lambda each: ratios[each][0])
    return NodeDrift(fit.node.name, *ratios[name], at=name)


def _keeps_bands(fit: Fit, stored: Stored) -> bool:
    """Whether a node is fitted on the bands of the port that is audited."""
    return fit.source.source == stored.source and all(keeps_bands(hop.node) for hop in fit.chain)


def _ratio(mean: np.ndarray, before: np.ndarray) -> float:
    return float(np.abs(mean - before).mean() / max(float(np.abs(before).mean()), 1e-30))


def _of_extrema(
    fit: Fit, now: Extrema, before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> NodeDrift | None:
    low, high = (_which(after, each.numpy()) for each in (now.minimum, now.maximum))
    if low is None or high is None:
        # A node that has one range for all bands.
        ends = now.minimum.min().reshape(1).numpy(), now.maximum.max().reshape(1).numpy()
        low, high = (_which(after, each) for each in ends)
    if low is None or high is None or before[low].shape != after[low].shape:
        return None
    width = float(np.abs(before[high] - before[low]).mean())
    shift = sum(float(np.abs(after[name] - before[name]).mean()) for name in (low, high)) / 2
    figures = {
        "minimum": float((after[low] - before[low]).mean()),
        "maximum": float((after[high] - before[high]).mean()),
    }
    spectra = {
        name: (before[key].reshape(-1), after[key].reshape(-1))
        for name, key in (("minimum", low), ("maximum", high))
    }
    return NodeDrift(fit.node.name, shift / max(width, 1e-30), "range", figures, spectra=spectra)


def state_of(node: Any) -> dict[str, np.ndarray]:
    """Return what of a node is saved and is no whole number, as float64, by name."""
    saved = {name: value for name, value in node.state_dict().items() if torch.is_tensor(value)}
    wide = {n: v.detach().to(torch.float64) for n, v in saved.items() if v.is_floating_point()}
    return {name: value.numpy(force=True).copy() for name, value in wide.items()}


def _which(state: Mapping[str, np.ndarray], wanted: np.ndarray) -> str | None:
    """Return the name of the tensor that is this one, but for float32 and axes of length 1."""
    size = float(np.abs(wanted).max()) or 1.0
    for name, value in state.items():
        if value.size == wanted.size and value.squeeze().shape == wanted.squeeze().shape:
            apart = np.abs(value.reshape(wanted.shape) - wanted).max()
            if np.isfinite(apart) and apart <= _SAME * size:
                return name
    return None


def _covariances(
    now: Moments | ExactMoments, before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the covariance that a node froze, and the one that it would now, if it freezes one."""
    if now.diagonal or now.n < 2:
        return None
    wanted = now.covariance.numpy()
    added = {  # nodes add a small number to the diagonal
        name: value - np.eye(len(wanted)) * np.mean(value.diagonal() - wanted.diagonal())
        for name, value in after.items()
        if value.shape == wanted.shape
    }
    name = _which(added, wanted)
    return None if name is None else (before[name], after[name])


def _figures(
    now: Moments | ExactMoments,
    mean: np.ndarray,
    covariances: tuple[np.ndarray, np.ndarray] | None,
) -> dict[str, float]:
    """Return what else is known about a mean, and about the covariances, of then and of now."""
    gain, offset, left = line_between(mean, now.mean.numpy())
    figures = {"gain": gain, "offset": offset, "left": left}
    if covariances is None:
        return figures
    scale = np.sqrt(np.maximum(covariances[0].diagonal(), np.finfo(float).tiny))
    was, is_now = (covariance / np.outer(scale, scale) for covariance in covariances)
    # Both were frozen in float32, whose rounding is all that there is of eigenvalues below about
    # 1e-7 of the largest: so much on both diagonals makes these equal.
    ridge = _ROUNDED * float(np.linalg.eigvalsh(was)[-1]) * np.eye(len(mean))
    values, vectors = np.linalg.eigh(was + ridge)
    whiten = vectors / np.sqrt(np.maximum(values, np.finfo(float).tiny))
    relative, axes = np.linalg.eigh(whiten.T @ (is_now + ridge) @ whiten)
    relative = np.maximum(relative, RIDGE)
    shift = ((now.mean.numpy() - mean) / scale) @ whiten @ axes
    figures["mahalanobis"] = float(np.sqrt((shift**2).sum()))
    figures["affine_invariant"] = float(np.sqrt((np.log(relative) ** 2).sum()))
    figures["bhattacharyya"] = float(
        (shift**2 / (1 + relative)).sum() / 4
        + np.log((1 + relative) / 2 / np.sqrt(relative)).sum() / 2
    )
    return figures
