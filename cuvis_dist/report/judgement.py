"""How are the scores distributed, and how would they be if pixels were Gaussian?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuvis_dist.report.kept import SPLITS, Kept
from cuvis_dist.report.plot import (
    BLUE,
    VERMILLION,
    Plot,
    drawing,
    logarithmic,
    number,
    several,
)
from cuvis_dist.report.section import Section, label

_BINS = 80
#: A bin of a histogram has about so many pixels, if they are few: bins are joined until it has.
_IN_A_BIN = 3
#: Distances below are none: zeros are counted as numbers of about 1e-41.
_ZERO = 1e-30
_NORMAL, _ANOMALOUS = "not annotated", "annotated as anomalies"


@dataclass(frozen=True)
class Scored:
    """Scores in ascending order, and how many pixels of each kind have each.

    Attributes
    ----------
    scores : ndarray
        ``[K]``.
    normal, anomalous : ndarray
        ``[K]`` float64: pixels.
    """

    scores: np.ndarray
    normal: np.ndarray
    anomalous: np.ndarray


def after(part: dict[str, Any], name: str) -> Scored | None:
    """Return the scores of what the run ended with: all pixels of a split."""
    if (found := part.get("counts", {}).get(name)) is None or not len(found["scores"]):
        return None
    counts = np.asarray(found["counts"], dtype=float)
    return Scored(np.asarray(found["scores"], dtype=float), counts[:, 0], counts[:, 1])


def before(part: dict[str, Any], name: str) -> Scored | None:
    """Return the scores before training: of a sample of the same pixels."""
    found = part.get("before", {})
    if name not in found:
        return None
    order = np.argsort(found[name])
    weights, marked = found["weights"][order], found["anomalous"][order]
    scores = np.asarray(found[name], dtype=float)[order]
    return Scored(scores, weights * ~marked, weights * marked)


# ---- scores ------------------------------------------------------------------------------


def scores(runs: Sequence[Kept]) -> Section:
    """Show how the scores are distributed, beside what they would follow."""
    section = Section("scores", "Scores")
    for kept in runs:
        for split in SPLITS:
            part = kept.seen.get(split, {})
            trained = kept.trained
            distances = (before if trained else after)(part, "scores")
            if distances is not None and part["bands"]:
                section.plots.append(_distances(kept, split, distances, runs))
            if (logits := after(part, "logits")) is not None:
                section.plots.append(_logits(kept, split, logits, runs))
    if not section.plots:
        section.missing = "No scores were seen: there is no val or test split, or no node scores."
    elif any(plot.name.startswith("distances") for plot in section.plots):
        section.said.append(
            "Squared distances of Gaussian pixels follow a χ² distribution with as many degrees of "
            "freedom as there are bands. Over train their mean is that of χ², so that a heavier "
            "tail moves the bulk below it; a bulk above it says that a split is unlike train."
        )
    return section


def chi_squared(x: np.ndarray, freedom: int) -> np.ndarray:
    """Return the density of χ² with so many degrees of freedom at ``x > 0``."""
    half = freedom / 2
    return np.exp((half - 1) * np.log(x) - x / 2 - half * math.log(2) - math.lgamma(half))


def _distances(kept: Kept, split: str, found: Scored, runs: Sequence[Kept]) -> Plot:
    bands = int(kept.seen[split]["bands"])
    trained = kept.trained
    edges = _log_edges(found, bands)
    density = _density(found.scores, found.normal, edges)
    marked = _density(found.scores, found.anomalous, edges)
    centres = np.sqrt(edges[1:] * edges[:-1])
    expected = chi_squared(centres, bands) * centres
    total = max(found.normal.sum(), 1.0)
    median = float(found.scores[np.searchsorted(found.normal.cumsum(), total / 2)])
    when = ", after phase 1" if trained else ""
    plot = Plot(
        f"distances-{split}" + ("" if kept is runs[0] else "-other"),
        f"Distribution of the squared distances on {split}{when}, beside that of χ² with {bands} "
        f"degrees of freedom{label(kept, runs)}. The median is {number(median)}, that of χ² about "
        f"{number(bands * (1 - 2 / (9 * bands)) ** 3)}.",
        f"RX scores on {split}{when}, of a sample of its pixels{label(kept, runs)}.",
        {"score": centres, _NORMAL: density, _ANOMALOUS: marked, "chi squared": expected},
    )
    with drawing(plot) as figure:
        axes = figure.subplots()
        name = _NORMAL if found.anomalous.any() else "all pixels"
        axes.stairs(density, edges, color=BLUE, alpha=0.25, fill=True, lw=0)
        axes.stairs(density, edges, color=BLUE, lw=1.5, label=name)
        if found.anomalous.any():
            axes.stairs(marked, edges, color=VERMILLION, lw=1.5, label=_ANOMALOUS)
        degrees = several(bands, "degree")
        axes.plot(centres, expected, "k--", lw=1.2, label=f"χ² with {degrees} of freedom")
        logarithmic(axes.xaxis, finely=True)
        axes.set(
            xlabel="squared distance",
            ylabel="density per unit of ln(distance)",
            title=f"RX scores, {split}{when}{label(kept, runs)}",
        )
        axes.set_ylim(bottom=0)
    return plot


def _log_edges(found: Scored, bands: int) -> np.ndarray:
    positive = (found.scores > _ZERO) & np.isfinite(found.scores)
    weights = (found.normal + found.anomalous)[positive]
    if not weights.sum():
        return np.geomspace(bands / 10, bands * 10, _BINS + 1)
    share = weights.cumsum() / weights.sum()
    low, high = found.scores[positive][
        np.searchsorted(share, [1e-4, 0.9999]).clip(max=len(share) - 1)
    ]
    return np.geomspace(min(low, bands / 3), max(high, bands * 3), _BINS + 1)


def _density(scores: np.ndarray, weights: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return a density per factor of e, of which a bin of a logarithmic axis is a part."""
    return _shares(scores, weights, edges) / np.log(edges[1:] / edges[:-1])


def _shares(scores: np.ndarray, weights: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the share of pixels in each bin; of few pixels evened out over some bins."""
    counts, _ = np.histogram(scores, edges, weights=weights)
    shares = counts / max(float(weights.sum()), 1.0)
    pixels = np.count_nonzero(weights)
    joined = next((n for n in (1, 2, 4, 8) if pixels * n >= _IN_A_BIN * len(counts)), 8)
    return np.asarray(shares.reshape(-1, joined).mean(axis=1).repeat(joined))


def _logits(kept: Kept, split: str, found: Scored, runs: Sequence[Kept]) -> Plot:
    edges = _edges(found)
    centres = (edges[1:] + edges[:-1]) / 2
    known = [(_NORMAL if found.anomalous.any() else "all pixels", found.normal, BLUE)]
    known += [(_ANOMALOUS, found.anomalous, VERMILLION)] if found.anomalous.any() else []
    rows = {name: _shares(found.scores, values, edges) for name, values, _ in known}
    pictures = kept.seen[split].get("pictures", [])
    decided = any(picture["decided"] is not None for picture in pictures)
    what = "what the decider is given" if decided else "scores"
    plot = Plot(
        f"scores-{split}" + ("" if kept is runs[0] else "-other"),
        f"Shares of pixels by their score ({what}) on {split}, on a logarithmic axis"
        f"{label(kept, runs)}.",
        f"{what.capitalize()} on {split}: shares of the pixels of each kind{label(kept, runs)}.",
        {"score": centres, **rows},
    )
    with drawing(plot) as figure:
        axes = figure.subplots()
        for name, values, colour in known:
            if values.any():
                axes.stairs(rows[name], edges, color=colour, lw=1.5, label=name)
        logarithmic(axes.yaxis)
        smallest = min((float(r[r > 0].min()) for r in rows.values() if r.any()), default=1e-3)
        axes.set_ylim(bottom=smallest / 2)
        axes.set(
            xlabel="score",
            ylabel="share of pixels per bin",
            title=f"{what}, {split}{label(kept, runs)}",
        )
    return plot


def _edges(found: Scored) -> np.ndarray:
    """Return bins that hold nearly all pixels, and nearly all anomalies."""
    finite = np.isfinite(found.scores)
    if not finite.any():
        return np.linspace(0, 1, _BINS + 1)
    scores, marked = found.scores[finite], found.anomalous[finite].cumsum()
    share = (found.normal + found.anomalous)[finite].cumsum()
    low, high = scores[np.searchsorted(share, np.array([5e-4, 0.9995]) * share[-1])]
    if marked[-1]:
        high = max(high, scores[np.searchsorted(marked, 0.98 * marked[-1])])
    return np.linspace(low, high if high > low else low + 1, _BINS + 1)
