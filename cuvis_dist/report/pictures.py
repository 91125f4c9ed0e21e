"""Which frames does a person look at, and what was decided about them?"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_rgb
from matplotlib.image import imsave

from cuvis_dist.report.kept import SPLITS, Kept
from cuvis_dist.report.plot import BLUE, ORANGE, VERMILLION, Plot, as_address, number, several
from cuvis_dist.report.section import Section

#: A panel has about so many pixels at its longer side, and so many are between two of them.
_SIDE, _GAP = 256, 12
#: Frames that are so many times as wide as high are shown below each other.
_WIDE = 2.5


def frames(runs: Sequence[Kept]) -> Section:
    """Show some frames, with their scores and decisions."""
    section = Section("frames", "Frames")
    kept = runs[0]
    for split in SPLITS:
        pictures = kept.seen.get(split, {}).get("pictures", [])
        scale = _scale([p["scores"] for p in pictures if p["scores"] is not None])
        if scale is not None:
            section.said.append(
                f"Scores of {split} are dark at {number(scale[0], 3)} and bright from "
                f"{number(scale[1], 3)} on, in all of its frames."
            )
        found = (_frame(kept, split, i, each, scale) for i, each in enumerate(pictures))
        section.plots += [plot for plot in found if plot is not None]
    if not section.plots:
        section.missing, section.said = _missing(kept), []
        return section
    parts = [p for split in SPLITS for p in kept.seen.get(split, {}).get("pictures", [])]
    section.said.insert(0, _legend(kept, parts) + (" Those of this run." if len(runs) > 1 else ""))
    return section


def _missing(kept: Kept) -> str:
    if any(kept.record.get("metrics", {}).values()):
        return "No frame was kept while val and test were evaluated."
    return "No frame was kept: there is no val or test split that could be evaluated."


def _legend(kept: Kept, pictures: Sequence[dict[str, Any]]) -> str:
    """Return what is seen on the frames, from left to right."""
    said = ["three bands as red, green and blue, each from its darkest to its brightest pixels"]
    if any(p["scores"] is not None for p in pictures):
        said.append("the scores, bright where they are high and white where there is none")
    if any(p["decided"] is not None for p in pictures):
        shown = [split for split in SPLITS if kept.seen.get(split, {}).get("pictures")]
        judged = [split for split in shown if kept.has_anomalies(split)]
        if judged:
            said.append(
                "the decisions: blue where an annotated anomaly was found, orange at false "
                "alarms, and reddish where one was missed"
            )
        if other := [split for split in shown if split not in judged]:
            where = f" on {', '.join(other)}" if judged else ""
            said.append(f"the decisions{where}: blue where an anomaly was seen")
    block = max(int(p["block"]) for p in pictures)
    cell = (
        f" A pixel here stands for up to {block} \u00d7 {block} pixels of the frame: for the "
        "colours of one, the largest score and any decision of all."
        if block > 1
        else ""
    )
    return f"One after another: {'; '.join(said)}.{cell}"


def _scale(scores: list[np.ndarray]) -> tuple[float, float] | None:
    """Return which scores are dark and bright in all frames of a split."""
    if not scores:
        return None
    every = np.concatenate([np.ravel(each) for each in scores])
    known = every[np.isfinite(every)]
    if not len(known):
        return None
    low, high = np.percentile(known, [2, 99.8])
    return float(low), float(high if high > low else low + 1)


def _frame(
    kept: Kept,
    split: str,
    index: int,
    picture: dict[str, Any],
    scale: tuple[float, float] | None,
) -> Plot | None:
    uid, judged = picture["uid"], kept.has_anomalies(split)
    why, said = _why(picture, judged)
    plot = Plot(
        f"frame-{split}-{index}",
        f"Frame {uid} of {split} ({why}): false colours"
        + (", scores" if picture["scores"] is not None else "")
        + (", decisions" if picture["decided"] is not None else "")
        + (" and annotation" if picture["decided"] is not None and judged else "")
        + f"; {said}.",
        f"{split}, {why}: {uid} ({_bands(kept, picture)}); {said}.",
    )
    panels = []
    if picture["colours"] is not None:
        panels.append(_colours(picture["colours"]))
    if picture["scores"] is not None:
        panels.append(_scores(np.asarray(picture["scores"], dtype=float), scale))
    if picture["decided"] is not None:
        decided, annotated = np.asarray(picture["decided"], bool), picture["annotated"]
        known = judged and annotated is not None and np.shape(annotated) == decided.shape
        panels.append(_agreement(decided, annotated if known else None))
    if not panels:
        return None
    plot.frame, plot.image = True, _together(panels)
    if picture["scores"] is not None:
        rows, columns = np.indices(picture["scores"].shape)
        plot.columns = {
            "row": rows.ravel(), "column": columns.ravel(), "score": picture["scores"].ravel(),
        }  # fmt: skip
    return plot


def _why(picture: dict[str, Any], judged: bool) -> tuple[str, str]:
    """Return why a frame is shown, and what is to be said of it."""
    wrong, why = float(picture["wrong"]), str(picture["why"])
    if picture["decided"] is None or picture["annotated"] is None:
        return why.replace("worst", "highest scores"), f"largest score {number(wrong)}"
    if not judged:
        return why.replace("worst", "most anomalies seen"), f"anomalies seen in {_percent(wrong)}"
    marked = picture["anomalies"]
    annotated = f", {several(marked, 'annotated pixel')}" if marked else ""
    return why, f"{_percent(wrong)} decided wrongly{annotated}"


def _percent(share: float) -> str:
    return f"{number(100 * share, 2)} % of its pixels"


def _bands(kept: Kept, picture: dict[str, Any]) -> str:
    known = kept.wavelengths
    bands = picture["bands"]
    if known is not None and bands and max(bands) < len(known):
        return "/".join(f"{known[b]:.0f}" for b in bands) + " nm"
    return "bands " + "/".join(map(str, bands))


def _colours(values: np.ndarray) -> np.ndarray:
    """Return three bands as colours ``[h, w, 3]`` between 0 and 1."""
    finite = np.where(np.isfinite(values), values, np.nan)
    with warnings.catch_warnings():  # a band without any value
        warnings.simplefilter("ignore", RuntimeWarning)
        low, high = np.nan_to_num(np.nanpercentile(finite, [2, 98], axis=(0, 1)))
    spread = np.maximum(high - low, 1e-6 * np.abs(high)) + 1e-300
    return np.clip((np.nan_to_num(finite) - low) / spread, 0, 1)


def _scores(values: np.ndarray, scale: tuple[float, float] | None) -> np.ndarray:
    """Return scores as colours; white where they are no finite numbers."""
    low, high = scale or (0.0, 1.0)
    known = np.isfinite(values)
    shown = (np.where(known, values, low) - low) / (high - low)
    colours = np.asarray(colormaps["cividis"](shown))[..., :3]
    return np.where(known[..., None], colours, 1.0)


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
    height, width = (max(panel.shape[axis] for panel in panels) for axis in (0, 1))
    panels = [_sized(panel, height, width) for panel in panels]
    times = max(1, round(_SIDE / max(height, width)))
    below = width > _WIDE * height
    apart = max(1, _GAP // times)
    gap = np.ones((apart, width, 3) if below else (height, apart, 3))
    row = [part for panel in panels for part in (panel, gap)][:-1]
    pixels = (np.concatenate(row, axis=0 if below else 1) * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    imsave(buffer, pixels.repeat(times, axis=0).repeat(times, axis=1), format="png")
    return as_address(buffer.getvalue(), "png")


def _sized(panel: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a panel with so many rows and columns: a pipeline may judge smaller frames."""
    rows = np.arange(height) * panel.shape[0] // height
    columns = np.arange(width) * panel.shape[1] // width
    return panel[rows[:, None], columns]
