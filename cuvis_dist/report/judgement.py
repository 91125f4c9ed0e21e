"""How well are anomalies told from the rest: scores, ROC and precision-recall?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cuvis_dist.report.kept import SPLITS, Kept
from cuvis_dist.report.plot import (
    BLUE,
    GREY,
    LINES,
    ORANGE,
    VERMILLION,
    Plot,
    drawing,
    literal,
    logarithmic,
    number,
)
from cuvis_dist.report.section import Section, label

#: A curve in a plot has so many points at most.
_POINTS = 400
_BINS = 80


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
            trained = bool(kept.nodes.get("trained"))
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
    trained = bool(kept.nodes.get("trained"))
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
        {"score": centres, "not annotated": density, "annotated": marked, "chi squared": expected},
    )
    with drawing(plot) as figure:
        axes = figure.subplots()
        name = "not annotated" if found.anomalous.any() else "all pixels"
        axes.fill_between(centres, density, color=BLUE, alpha=0.25, step="mid", lw=0)
        axes.step(centres, density, color=BLUE, where="mid", label=name)
        if found.anomalous.any():
            axes.step(centres, marked, color=VERMILLION, where="mid", label="anomalies")
        axes.plot(centres, expected, "k--", lw=1.2, label=f"χ² with {bands} degrees")
        logarithmic(axes.xaxis, finely=True)
        axes.set(
            xlabel="squared distance",
            ylabel="density over the logarithm",
            title=f"RX scores, {split}{when}",
        )
        axes.set_ylim(bottom=0)
    return plot


def _log_edges(found: Scored, bands: int) -> np.ndarray:
    positive = found.scores > 0
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
    counts, _ = np.histogram(scores, edges, weights=weights)
    return counts / max(float(weights.sum()), 1.0) / np.log(edges[1:] / edges[:-1])


def _logits(kept: Kept, split: str, found: Scored, runs: Sequence[Kept]) -> Plot:
    weights = found.normal + found.anomalous
    share = weights.cumsum() / max(weights.sum(), 1.0)
    low, high = found.scores[np.searchsorted(share, [5e-4, 0.9995]).clip(max=len(share) - 1)]
    if found.anomalous.any():
        marked = found.anomalous.cumsum() / found.anomalous.sum()
        high = max(high, found.scores[np.searchsorted(marked, 0.98).clip(max=len(marked) - 1)])
    edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
    centres = (edges[1:] + edges[:-1]) / 2
    rows = {}
    for name, values in (("not annotated", found.normal), ("annotated", found.anomalous)):
        counts, _ = np.histogram(found.scores, edges, weights=values)
        rows[name] = counts / max(float(values.sum()), 1.0)
    plot = Plot(
        f"scores-{split}" + ("" if kept is runs[0] else "-other"),
        f"Shares of pixels by what the decider is given on {split}, on a logarithmic axis"
        f"{label(kept, runs)}.",
        f"What the decider is given on {split}; shares of the pixels of each kind"
        f"{label(kept, runs)}.",
        {"score": centres, **rows},
    )
    with drawing(plot) as figure:
        axes = figure.subplots()
        colours = {"not annotated": BLUE, "annotated": VERMILLION}
        for name, values in rows.items():
            if values.any():
                shown = np.where(values > 0, values, np.nan)
                axes.step(centres, shown, color=colours[name], where="mid", label=name)
        logarithmic(axes.yaxis)
        axes.set(xlabel="score", ylabel="share of pixels", title=f"scores of the decider, {split}")
    return plot


# ---- ROC and precision-recall ------------------------------------------------------------


def curves(found: Scored) -> dict[str, np.ndarray]:
    """Return the rates at every threshold, from the highest on.

    Returns
    -------
    dict of str to ndarray
        ``[K + 1]`` each: ``false`` and ``true`` positive rate, ``precision``.
    """
    true, false = found.anomalous[::-1].cumsum(), found.normal[::-1].cumsum()
    positive = np.maximum(true + false, 1e-300)
    precision = np.concatenate([[1.0], true / positive])
    return {
        "false": np.concatenate([[0.0], false / max(false[-1], 1e-300)]),
        "true": np.concatenate([[0.0], true / max(true[-1], 1e-300)]),
        "precision": precision,
    }


def areas(rates: dict[str, np.ndarray]) -> tuple[float, float]:
    """Return the area under the ROC curve and the average precision."""
    roc = float(np.trapezoid(rates["true"], rates["false"]))
    return roc, float((np.diff(rates["true"]) * rates["precision"][1:]).sum())


def rates(runs: Sequence[Kept]) -> Section:
    """Show ROC and precision-recall of each split, before and after training."""
    section = Section("rates", "ROC and precision-recall")
    for split in SPLITS:
        found = []
        for i, kept in enumerate(runs):
            part = kept.seen.get(split, {})
            trained = bool(kept.nodes.get("trained"))
            for when, scored in (
                ("after phase 1", before(part, "logits") if trained else after(part, "logits")),
                ("after training", after(part, "logits") if trained else None),
            ):
                if scored is not None and scored.anomalous.any() and scored.normal.any():
                    found.append((f"{when}{label(kept, runs)}", curves(scored), LINES[i]))
        if found:
            section.plots += [_roc(split, found), _precision(split, found)]
    if not section.plots:
        section.missing = "There is no split with annotated anomalies that was scored."
        return section
    section.said.append(
        "Of all scores; a metric of the pipeline may look at fewer thresholds, and so differ a "
        "little."
    )
    if any(kept.seen.get(s, {}).get("before") for kept in runs for s in SPLITS):
        section.said.append(
            "What was before training is computed on a sample of the pixels, weighted by how many "
            "each stands for."
        )
    return section


_Found = list[tuple[str, dict[str, np.ndarray], str]]


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return a curve with points where it moves, few enough to draw."""
    length = np.concatenate([[0.0], np.hypot(np.diff(x), np.diff(y)).cumsum()])
    wanted = np.linspace(0, length[-1], min(len(x), _POINTS))
    chosen = np.unique(np.searchsorted(length, wanted).clip(max=len(x) - 1))
    return x[chosen], y[chosen]


def _roc(split: str, found: _Found) -> Plot:
    said = [f"{name}: area {areas(r)[0]:.4f}" for name, r, _ in found]
    plot = Plot(
        f"roc-{split}",
        f"ROC curves on {split}. " + "; ".join(said) + ".",
        f"{split}: {'; '.join(said)}.",
    )
    thinned = [(name, _thin(r["false"], r["true"])) for name, r, _ in found]
    plot.columns = _padded(thinned, "false positive rate", "true positive rate")
    with drawing(plot) as figure:
        axes = figure.subplots()
        for (name, (x, y)), (_, _, line), colour in zip(thinned, found, _colours(), strict=False):
            axes.plot(np.maximum(x, 1e-5), y, line, color=colour, label=literal(name))
        logarithmic(axes.xaxis)
        axes.set(
            xlabel="false positive rate", ylabel="true positive rate", title=f"ROC, {split}",
            xlim=(1e-5, 1), ylim=(0, 1.02),
        )  # fmt: skip
    return plot


def _precision(split: str, found: _Found) -> Plot:
    said = [f"{name}: average precision {areas(r)[1]:.4f}" for name, r, _ in found]
    plot = Plot(
        f"precision-{split}",
        f"Precision over recall on {split}. " + "; ".join(said) + ".",
        f"{split}: {'; '.join(said)}.",
    )
    thinned = [(name, _thin(r["true"], r["precision"])) for name, r, _ in found]
    plot.columns = _padded(thinned, "recall", "precision")
    with drawing(plot) as figure:
        axes = figure.subplots()
        for (name, (x, y)), (_, _, line), colour in zip(thinned, found, _colours(), strict=False):
            axes.plot(x, y, line, color=colour, label=literal(name))
        title = f"precision and recall, {split}"
        axes.set(xlabel="recall", ylabel="precision", title=title, xlim=(0, 1), ylim=(0, 1.02))
    return plot


def _colours() -> tuple[str, ...]:
    return BLUE, VERMILLION, ORANGE, GREY


def _padded(
    thinned: list[tuple[str, tuple[np.ndarray, np.ndarray]]], x: str, y: str
) -> dict[str, np.ndarray]:
    longest = max(len(values[0]) for _, values in thinned)
    columns = {}
    for name, both in thinned:
        for what, values in zip((x, y), both, strict=True):
            filled = np.full(longest, np.nan)
            filled[: len(values)] = values
            columns[f"{what}, {name}"] = filled
    return columns
