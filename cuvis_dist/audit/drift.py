"""How far is an archive from what a pipeline was fitted on?

A node is fitted once more, a copy of it, by its own code on what the archive gives now, and what it
freezes is compared with what it froze then. So any node can be asked, and the mean among its
buffers is the one that comes out as the mean of the pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import numpy as np
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from torch import Tensor

from cuvis_dist.audit.compared import line_between
from cuvis_dist.audit.groups import Group
from cuvis_dist.audit.reference import RIDGE
from cuvis_dist.audit.stored import Stored
from cuvis_dist.errors import InputError
from cuvis_dist.initialization.passes import derived, freeze_fit
from cuvis_dist.initialization.plan import Fit
from cuvis_dist.nodes.catalogue import keeps_bands
from cuvis_dist.statistics import ExactMoments, Extrema, Moments, Statistic

#: Nodes freeze float32: a buffer is the mean if it is so close to it, relative to the largest.
_SAME = 1e-4


@dataclass(frozen=True)
class NodeDrift:
    """How far one node's fitted state is from what the archive gives now.

    Attributes
    ----------
    node : str
        The node.
    ratio : float
        ``mean |m - m₀| / mean |m₀|``, the mean-drift ratio of the guide to two-phase training; of
        a node that is fitted by extrema, their mean shift by the mean range.
    of : str
        What the ratio is of: ``mean`` or ``range``.
    figures : dict of str to float
        What else is known: gain, offset, and the distances of the distributions.
    groups : dict of str to float
        The ratio of each group.
    spectra : dict of str to tuple of ndarray and ndarray
        ``mean``, or ``minimum`` and ``maximum``: what the node froze, and what it would now,
        ``[C]`` each.
    bands : bool
        Whether its channels are the bands of the port that is audited.
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


def drift(stored: Stored, initialized: CuvisPipeline, groups: Sequence[Group]) -> list[NodeDrift]:
    """Compare an archive with an initialization, node by node.

    Parameters
    ----------
    stored : Stored
        What the store knows of the archive.
    initialized : CuvisPipeline
        A pipeline that was fitted before, with nodes of the same names.
    groups : sequence of Group
        The groups that the stored frames form.

    Raises
    ------
    InputError
        If none of its nodes can be compared.
    """
    nodes = {node.name: node for node in initialized.nodes()}
    merged = {key: reduce(lambda a, b: a.merge(b), each) for key, each in stored.statistics.items()}
    found = [
        each
        for fit in stored.fits
        if (each := _of_node(_in(fit, nodes), stored, merged, groups)) is not None
    ]
    if not found:
        there = ", ".join(fit.node.name for fit in stored.fits)
        raise InputError(
            f"the initialization {initialized.name} has no fitted node that can be compared: the "
            f"store has what {there} is fitted on"
        )
    return found


def _in(fit: Fit, nodes: Mapping[str, Node]) -> Fit | None:
    """Return the same fit of the nodes of another pipeline; None if they are not there."""
    names = [fit.node.name, *(hop.node.name for hop in fit.chain)]
    if any(name not in nodes for name in names):
        return None
    chain = tuple(replace(hop, node=nodes[hop.node.name]) for hop in fit.chain)
    return replace(fit, node=nodes[fit.node.name], chain=chain)


def _of_node(
    fit: Fit | None,
    stored: Stored,
    merged: dict[str, Statistic],
    groups: Sequence[Group],
) -> NodeDrift | None:
    if fit is None or not getattr(fit.node, "_statistically_initialized", True):
        return None
    try:
        now = derived(fit, merged, stored.probes)
    except (ValueError, KeyError, RuntimeError):  # nodes of the same name, and of other bands
        return None
    before = {name: _array(value) for name, value in _state(fit.node).items()}
    again = copy.deepcopy(fit.node)
    freeze_fit(replace(fit, node=again), now)
    after = {name: _array(value) for name, value in _state(again).items()}
    if isinstance(now, Extrema):
        found = _of_extrema(fit, now, before, after)
        return found and replace(found, bands=_keeps_bands(fit, stored))
    if not isinstance(now, Moments | ExactMoments):
        return None
    name = _which(after, now.mean.numpy())
    if name is None or before[name].shape != after[name].shape:
        return None
    mean = before[name].reshape(-1)
    covariance = _covariance(now, before, after)
    figures = _figures(now, mean, covariance)
    uids = {frame.uid: i for i, frame in enumerate(stored.frames)}
    of_groups = {}
    for group in groups:
        parts = [stored.statistics[fit.source.key][uids[frame.uid]] for frame in group.frames]
        of = derived(fit, {fit.source.key: reduce(lambda a, b: a.merge(b), parts)}, stored.probes)
        assert isinstance(of, Moments | ExactMoments)
        of_groups[group.name] = _ratio(of.mean.numpy(), mean)
    return NodeDrift(
        fit.node.name,
        _ratio(now.mean.numpy(), mean),
        "mean",
        figures,
        of_groups,
        {"mean": (mean, now.mean.numpy())},
        _keeps_bands(fit, stored),
    )


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


def _state(node: Any) -> dict[str, Tensor]:
    named = {**dict(node.named_buffers()), **dict(node.named_parameters())}
    return {name: value for name, value in named.items() if value.is_floating_point()}


def _array(value: Tensor) -> np.ndarray:
    return value.detach().to(torch.float64).cpu().numpy()


def _which(state: Mapping[str, np.ndarray], wanted: np.ndarray) -> str | None:
    """Return the name of the tensor that is this one, but for float32 and axes of length 1."""
    size = float(np.abs(wanted).max()) or 1.0
    for name, value in state.items():
        if value.size == wanted.size and value.squeeze().shape == wanted.squeeze().shape:
            apart = np.abs(value.reshape(wanted.shape) - wanted).max()
            if np.isfinite(apart) and apart <= _SAME * size:
                return name
    return None


def _covariance(
    now: Moments | ExactMoments, before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> np.ndarray | None:
    """Return the covariance that a node froze, if it froze one."""
    if now.diagonal or now.n < 2:
        return None
    wanted = now.covariance.numpy()
    added = {  # nodes add a small number to the diagonal
        name: value - np.eye(len(wanted)) * np.mean(value.diagonal() - wanted.diagonal())
        for name, value in after.items()
        if value.shape == wanted.shape
    }
    name = _which(added, wanted)
    return None if name is None else before[name]


def _figures(
    now: Moments | ExactMoments, mean: np.ndarray, covariance: np.ndarray | None
) -> dict[str, float]:
    gain, offset, left = line_between(mean, now.mean.numpy())
    figures = {"gain": gain, "offset": offset, "left": left}
    if covariance is None:
        return figures
    scale = np.sqrt(np.maximum(covariance.diagonal(), np.finfo(float).tiny))
    both = np.outer(scale, scale)
    ridge = RIDGE * np.eye(len(mean))
    values, vectors = np.linalg.eigh(covariance / both)
    # A covariance of float32 has eigenvalues that are noise below about 1e-7 of the largest.
    whiten = vectors / np.sqrt(np.maximum(values, 1e-7 * values[-1]))
    relative, axes = np.linalg.eigh(whiten.T @ (now.covariance.numpy() / both + ridge) @ whiten)
    relative = np.maximum(relative, RIDGE)
    shift = ((now.mean.numpy() - mean) / scale) @ whiten @ axes
    figures["mahalanobis"] = float(np.sqrt((shift**2).sum()))
    figures["affine_invariant"] = float(np.sqrt((np.log(relative) ** 2).sum()))
    figures["bhattacharyya"] = float(
        (shift**2 / (1 + relative)).sum() / 4
        + np.log((1 + relative) / 2 / np.sqrt(relative)).sum() / 2
    )
    return figures
