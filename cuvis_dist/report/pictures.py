"""Which frames does a person look at, and what was decided about them?"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.image import imsave

from cuvis_dist.report.kept import SPLITS, Kept
from cuvis_dist.report.plot import BLUE, ORANGE, VERMILLION, Plot, as_address, number
from cuvis_dist.report.section import Section

#: A panel has about so many pixels at its longer side, and so many are between two of them.
_SIDE, _GAP = 256, 12
#: Frames that are so many times as wide as high are shown below each other.
_WIDE = 2.5


def frames(runs: Sequence[Kept]) -> Section:
    """Show some frames, with their scores and decisions."""
    section = Section("frames", "Frames")
    for kept in runs[:1]:
        for split in SPLITS:
            pictures = kept.seen.get(split, {}).get("pictures", [])
            found = (_frame(kept, split, i, picture) for i, picture in enumerate(pictures))
            section.plots += [plot for plot in found if plot is not None]
    if not section.plots:
        section.missing = (
            "No frame was kept: there is no val or test split, or it was evaluated in order, on "
            "one worker."
        )
        return section
    section.said.append(
        "One after another: three bands as red, green and blue; the scores, bright where they are "
        "high; the decisions: blue where an annotated anomaly was found, orange at false alarms, "
        "and reddish where one was missed. A pixel here stands for a block of pixels of a large "
        "frame, with the largest of each."
    )
    return section


def _frame(kept: Kept, split: str, index: int, picture: dict[str, Any]) -> Plot | None:
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
        f"{split}, {why}: {uid} ({_bands(kept, picture)}); {said}{marked}.",
    )
    shown = [
        (what, values)
        for what, values in (
            ("colours", picture["colours"]),
            ("scores", picture["scores"]),
            ("decisions", picture["decided"]),
        )
        if values is not None
    ]
    if not shown:
        return None
    plot.frame, plot.image = True, _together([_coloured(*each, picture) for each in shown])
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


def _coloured(what: str, values: Any, picture: dict[str, Any]) -> np.ndarray:
    """Return a panel, ``[h, w, 3]`` between 0 and 1."""
    if what == "scores":
        finite = np.nan_to_num(values)
        low, high = np.percentile(finite, [2, 99.8])
        return np.asarray(colormaps["cividis"]((finite - low) / max(high - low, 1e-9)))[..., :3]
    if what == "decisions":
        return _agreement(np.asarray(values, bool), picture["annotated"])
    low, high = np.nanpercentile(values, [2, 98], axis=(0, 1))
    return np.clip((np.nan_to_num(values) - low) / np.maximum(high - low, 1e-9), 0, 1)


def _agreement(decided: np.ndarray, annotated: np.ndarray | None) -> np.ndarray:
    """Return decisions in colours: found, missed and false alarms where there is an annotation."""
    marked = decided if annotated is None else np.asarray(annotated, bool)
    colours = np.full((*decided.shape, 3), 0.93)
    for where, colour in (
        (decided & marked, BLUE),
        (decided & ~marked, ORANGE),
        (~decided & marked, VERMILLION),
    ):
        colours[where] = to_rgb(colour)
    return colours


def _together(panels: list[np.ndarray]) -> str:
    """Return panels as one image, beside or below each other, small ones enlarged by pixels."""
    height, width = panels[0].shape[:2]
    times = max(1, round(_SIDE / max(height, width)))
    below = width > _WIDE * height
    apart = max(1, _GAP // times)
    gap = np.ones((apart, width, 3) if below else (height, apart, 3))
    row = [part for panel in panels for part in (panel, gap)][:-1]
    pixels = (np.concatenate(row, axis=0 if below else 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    imsave(buffer, pixels.repeat(times, axis=0).repeat(times, axis=1), format="png")
    return as_address(buffer.getvalue(), "png")
