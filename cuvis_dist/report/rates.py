"""How well are anomalies told from the rest, before and after training: ROC, precision, recall?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cuvis_dist.report.judgement import Scored, after, before
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
)
from cuvis_dist.report.section import Section, label

#: A curve in a plot has so many points at most.
_POINTS = 400
#: Average precisions that differ by less are taken for the same.
_NEAR = 0.005


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
            trained = kept.trained
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
    for kept in runs:
        section.said += [f"{said}{label(kept, runs)}." for said in _unlike(kept)]
    if any(kept.seen.get(s, {}).get("before") for kept in runs for s in SPLITS):
        section.said.append(
            "What was before training is computed on a sample of the pixels, weighted by how many "
            "each stands for."
        )
    return section


def _unlike(kept: Kept) -> Iterator[str]:
    """Yield which metrics of a pipeline are not what all scores say, and why."""
    for split in SPLITS:
        scored = after(kept.seen.get(split, {}), "logits")
        if scored is None or not scored.anomalous.any():
            continue
        area = areas(curves(scored))[1]
        for name, value in kept.record.get("metrics", {}).get(split, {}).items():
            if name.endswith("/average_precision") and abs(value - area) > _NEAR:
                yield (
                    f"All scores of {split} have an average precision of {area:.4f}; {name} is "
                    f"{value:.4f}, since it looks at fewer thresholds and takes high scores for "
                    "equal"
                )


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
