"""Which frames does a person look at, and what was decided about them?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from cuvis_dist.report.kept import SPLITS, Kept
from cuvis_dist.report.plot import BLUE, ORANGE, VERMILLION, Plot, drawing, number
from cuvis_dist.report.section import Section


def frames(runs: Sequence[Kept]) -> Section:
    """Show some frames, with their scores and decisions."""
    section = Section("frames", "Frames")
    for kept in runs[:1]:
        for split in SPLITS:
            pictures = kept.seen.get(split, {}).get("pictures", [])
            for i, picture in enumerate(pictures):
                section.plots.append(_frame(kept, split, i, picture))
    if not section.plots:
        section.missing = (
            "No frame was kept: there is no val or test split, or it was evaluated in order, on "
            "one worker."
        )
        return section
    section.said.append(
        "Three bands as red, green and blue; the scores; and where decisions and annotation agree. "
        "Bright scores are high. A picture stands for blocks of pixels, with the largest of each."
    )
    return section


def _frame(kept: Kept, split: str, index: int, picture: dict[str, Any]) -> Plot:
    why, uid = picture["why"], picture["uid"]
    judged = picture["decided"] is not None and picture["annotated"] is not None
    said = f"{picture['wrong']:.2%} of its pixels decided wrongly" if judged else (
        f"largest score {number(float(picture['wrong']))}"
    )  # fmt: skip
    marked = f", {number(picture['anomalies'])} annotated pixels" if picture["anomalies"] else ""
    plot = Plot(
        f"frame-{split}-{index}",
        f"Frame {uid} of {split} ({why}): false colours, scores"
        + (", decisions and annotation" if judged else "")
        + f"; {said}{marked}.",
        f"{split}, {why}: {uid}; {said}{marked}.",
    )
    shown = [
        (title, values)
        for title, values in (
            (_bands(kept, picture), picture["colours"]),
            ("scores", picture["scores"]),
            ("decisions", picture["decided"]),
        )
        if values is not None
    ]
    if not shown:
        return plot
    height, width = np.asarray(shown[0][1]).shape[:2]
    tall = float(np.clip(2.1 * height / width, 0.9, 3.6)) + 0.35
    with drawing(plot, (2.2 * len(shown), tall), pixels=True) as figure:
        _draw(figure, shown, picture)
    if picture["scores"] is not None:
        rows, columns = np.indices(picture["scores"].shape)
        plot.columns = {
            "row": rows.ravel(), "column": columns.ravel(), "score": picture["scores"].ravel(),
        }  # fmt: skip
    return plot


def _bands(kept: Kept, picture: dict[str, Any]) -> str:
    known = kept.wavelengths
    bands = picture["bands"]
    if known is not None and bands and max(bands) < len(known):
        return "/".join(f"{known[b]:.0f}" for b in bands) + " nm"
    return "bands " + "/".join(map(str, bands))


def _draw(figure: Figure, shown: list[tuple[str, Any]], picture: dict[str, Any]) -> None:
    for axes, (title, values) in zip(
        np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True
    ):
        axes.set_axis_off()
        axes.set_title(title, fontsize=8)
        if title == "scores":
            low, high = np.nanpercentile(values, [2, 99.8])
            axes.imshow(values, cmap="cividis", vmin=low, vmax=max(high, low + 1e-9))
        elif title == "decisions":
            _agreement(axes, np.asarray(values, bool), picture["annotated"])
        else:
            low, high = np.nanpercentile(values, [2, 98], axis=(0, 1))
            stretched = (np.nan_to_num(values) - low) / np.maximum(high - low, 1e-9)
            axes.imshow(np.clip(stretched, 0, 1))


def _agreement(axes: Axes, decided: np.ndarray, annotated: np.ndarray | None) -> None:
    """Draw decisions: found, missed and false alarms where there is an annotation."""
    marked = decided if annotated is None else np.asarray(annotated, bool)
    colours = np.full((*decided.shape, 3), 0.93)
    for where, colour in (
        (decided & marked, BLUE),
        (decided & ~marked, ORANGE),
        (~decided & marked, VERMILLION),
    ):
        colours[where] = to_rgb(colour)
    axes.imshow(colours)
    if annotated is not None:
        for name, colour in (("found", BLUE), ("false", ORANGE), ("missed", VERMILLION)):
            axes.plot([], [], "s", color=colour, ms=4, label=name)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=3, fontsize=6.5,
            handletextpad=0.1, columnspacing=0.7, borderpad=0, frameon=False,
        )  # fmt: skip
