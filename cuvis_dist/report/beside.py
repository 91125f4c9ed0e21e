"""How do the groups of an audit look beside each other? Curves, heat maps and bars."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cuvis_dist.report.plot import (
    BLUE,
    COLOURS,
    GREY,
    VERMILLION,
    Plot,
    drawing,
    literal,
    logarithmic,
    short,
)

#: Groups that are drawn in a colour and named, rows of a heat map, and bars of one plot.
NAMED, ROWS, BARS = 6, 40, 24
#: Letters of a name beside a row.
_LETTERS = 34
#: What is not known, and the band of those that do not stand out.
_UNKNOWN, _BAND = "#9A9A9A", "#C9C9CE"
#: Values that differ by more are drawn on a logarithmic axis.
_WIDE = 30.0


@dataclass(frozen=True)
class Along:
    """Where the bands stand on an axis.

    Attributes
    ----------
    x : ndarray
        ``[C]`` ascending.
    what : str
        What the axis is called.
    order : ndarray
        ``[C]`` int: the band at each place.
    """

    x: np.ndarray
    what: str
    order: np.ndarray


def along(channels: int, wavelengths: np.ndarray | None) -> Along:
    """Return the axis of some bands: wavelengths, or numbers where they are not known."""
    if wavelengths is None or len(wavelengths) != channels:
        return Along(np.arange(channels, dtype=float), "band", np.arange(channels))
    order = np.argsort(wavelengths, kind="stable")
    return Along(np.asarray(wavelengths, dtype=float)[order], "wavelength in nm", order)


# ---- curves ------------------------------------------------------------------------------


def curves(
    plot: Plot, axis: Along, values: Mapping[str, np.ndarray], unusual: Sequence[str], names: str
) -> None:
    """Draw a curve for each group that stands out, and a band that holds all the others.

    Parameters
    ----------
    plot : Plot
        Its image and its data are made.
    values : mapping of str to ndarray
        ``[C]`` by group, in the order of bands; NaN where it is not known.
    unusual : sequence of str
        Those that stand out, first the one that does most.
    names : str
        Title and label of the upward axis, apart by a line break; a third line ``log``
        where values may differ by orders of magnitude.
    """
    title, ylabel, *scale = names.split("\n")
    sorted_ = {name: np.asarray(v, dtype=float)[axis.order] for name, v in values.items()}
    plot.columns = {axis.what: axis.x} | sorted_
    rest = [v for name, v in sorted_.items() if name not in unusual]
    # A group has one colour on the whole page, whoever is missing in a plot.
    coloured = dict(zip(unusual[:NAMED], COLOURS, strict=False))
    grey = [name for name in unusual[NAMED:] if name in sorted_]
    marker = "o" if len(axis.x) == 1 else None
    with drawing(plot) as figure:
        axes = figure.subplots()
        floor = _floor(sorted_.values()) if scale else 0.0
        if floor:
            logarithmic(axes.yaxis)
            sorted_ = {name: np.maximum(v, floor) for name, v in sorted_.items()}
            rest = [np.maximum(v, floor) for v in rest]
        if rest:
            _band(axes, axis.x, np.stack(rest), len(rest), bool(unusual))
        for name in grey:
            axes.plot(axis.x, sorted_[name], color=GREY, lw=0.7, marker=marker)
        for name in filter(sorted_.__contains__, coloured):
            axes.plot(
                axis.x, sorted_[name], color=coloured[name], lw=1.3, marker=marker,
                label=literal(name),
            )  # fmt: skip
        if len(axis.x) == 1:
            axes.set_xticks(axis.x)
        axes.set(xlabel=axis.what, ylabel=ylabel, title=title)
    if grey:
        plot.caption += f" {len(grey)} more that stand out are thin grey lines."


def _floor(values: Iterable[np.ndarray]) -> float:
    """Return where zeros are drawn on a logarithmic axis; 0 where none is needed."""
    positive = np.concatenate([v[np.isfinite(v) & (v > 0)] for v in values])
    if not len(positive) or positive.max() <= _WIDE**2 * positive.min():
        return 0.0
    return float(positive.min() / 3)


def _band(axes: Axes, x: np.ndarray, rest: np.ndarray, count: int, others: bool) -> None:
    """Draw what holds these curves, and the one in their middle."""
    seen = np.isfinite(rest).any(axis=0)
    if not seen.any():
        return
    x, rest = x[seen], rest[:, seen]
    low, middle, high = (f(rest, axis=0) for f in (np.nanmin, np.nanmedian, np.nanmax))
    said = f"all {count}" + " others" * others
    if len(x) == 1:
        axes.vlines(x, low, high, color=_BAND, lw=12, label=said)
        axes.plot(x, middle, "_", color="#4A4A4A", ms=14)
        return
    axes.fill_between(x, low, high, color=_BAND, lw=0.8, label=said)
    axes.plot(x, middle, color="#4A4A4A", lw=0.9, ls=(0, (4, 2)), label="their median")


# ---- heat maps ---------------------------------------------------------------------------


def heat_map(plot: Plot, axis: Along, values: Mapping[str, np.ndarray], unit: str) -> None:
    """Draw a row of cells for each group: how far above or below zero each value is.

    Parameters
    ----------
    plot : Plot
        Its image and its data are made, and its caption says how many rows were left out.
    values : mapping of str to ndarray
        ``[C]`` by group, in the order in which they are drawn.
    unit : str
        What the colours stand for.
    """
    sorted_ = {name: np.asarray(v, dtype=float)[axis.order] for name, v in values.items()}
    plot.columns = {axis.what: axis.x} | sorted_
    names = list(sorted_)[:ROWS]
    matrix = np.stack([sorted_[name] for name in names])
    finite = np.abs(matrix[np.isfinite(matrix)])
    most = float(np.clip(np.quantile(finite, 0.995) if len(finite) else 3, 3, 10))
    with drawing(plot, (11.4, _height(len(names), 1.1)), fitted=True) as figure:
        axes = figure.subplots()
        axes.grid(False)
        axes.set_facecolor(_UNKNOWN)
        cells = axes.pcolormesh(
            _edges(axis.x), np.arange(len(names) + 1) - 0.5, np.ma.masked_invalid(matrix),
            cmap="PuOr_r", vmin=-most, vmax=most, rasterized=True,
        )  # fmt: skip
        bar = figure.colorbar(
            cells, ax=axes, label=unit, extend="both", pad=0.01, aspect=_aspect(len(names))
        )
        bar.outline.set_visible(False)
        _rows(axes, names)
        if len(axis.x) == 1:
            axes.set_xticks(axis.x)
        axes.set(xlabel=axis.what)
    plot.caption += left_out(len(values), ROWS)


def _edges(x: np.ndarray) -> np.ndarray:
    """Return ``[C + 1]``: where the cells of these places begin and end."""
    if len(x) < 2:
        return np.array([x[0] - 0.5, x[0] + 0.5])
    middle = (x[1:] + x[:-1]) / 2
    return np.array([1.5 * x[0] - 0.5 * x[1], *middle, 1.5 * x[-1] - 0.5 * x[-2]])


def _height(rows: int, more: float) -> float:
    return more + 0.2 * max(rows, 2)


def _aspect(rows: int) -> float:
    """Return the height of a colour bar in its widths, so that it is narrow at any height."""
    return 6 + 0.8 * rows


def _rows(axes: Axes, names: Sequence[str]) -> None:
    """Name rows, the first one above."""
    axes.set_yticks(range(len(names)), [literal(short(name, _LETTERS)) for name in names])
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)


def left_out(there: int, shown: int) -> str:
    """Return that some of the groups are not drawn, as the end of a caption."""
    return f" The first {shown} of {there} are drawn." if there > shown else ""


# ---- bars --------------------------------------------------------------------------------


def bars(
    plot: Plot, values: Mapping[str, float], unusual: Sequence[str], title: str, limit: float
) -> bool:
    """Draw a bar for each group, the longest above; return False where no value is known.

    Parameters
    ----------
    plot : Plot
        Its image and its data are made.
    values : mapping of str to float
        By group; those that are not finite are left out.
    unusual : sequence of str
        Those that stand out.
    title : str
        What is drawn.
    limit : float
        From here on a group stands out; NaN where there is no such limit.
    """
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    if not known:
        return False
    names = sorted(known, key=lambda name: -known[name])
    plot.columns = {"group": names, "value": [known[name] for name in names]}
    shown = names[:BARS]
    with drawing(plot, (5.6, _height(len(shown), 0.8)), fitted=True) as figure:
        axes = figure.subplots()
        draw_bars(axes, [known[name] for name in shown], [n in unusual for n in shown], limit)
        _rows(axes, shown)
        axes.set(title=title + " (dashed: the limit)" * math.isfinite(limit))
    plot.caption += left_out(len(names), BARS)
    return True


def draw_bars(axes: Axes, values: Sequence[float], marked: Sequence[bool], limit: float) -> None:
    """Draw bars, in another colour those that are marked; the limit as a line."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > _WIDE * float(np.median(positive)):
        logarithmic(axes.xaxis)
        axes.set_xlim(min(positive) / 2, max(max(positive), limit if limit > 0 else 0) * 1.4)
    colours = [VERMILLION if mark else BLUE for mark in marked]
    hatches = ["///" if mark else "" for mark in marked]  # what is printed in grey
    axes.barh(
        range(len(values)), values, 0.72, color=colours, hatch=hatches, edgecolor="white", lw=0
    )
    axes.grid(axis="y", visible=False)
    if math.isfinite(limit):
        axes.axvline(limit, color="black", lw=1.1, ls="--")


def standing_out(
    plot: Plot, values: Mapping[str, float], away: Mapping[str, Mapping[str, float]]
) -> None:
    """Draw how far groups stand out, and in what.

    Parameters
    ----------
    plot : Plot
        Its image and its data are made.
    values : mapping of str to float
        By group, in units of the limit, in the order in which they are drawn.
    away : mapping of str to mapping of str to float
        By group, the same of each thing that is looked at.
    """
    what = list(next(iter(away.values())))
    columns = {each: [away[name][each] for name in values] for each in what}
    plot.columns = {"group": list(values), "stands out": list(values.values()), **columns}
    shown = list(values)[:ROWS]
    with drawing(plot, (11.4, _height(len(shown), 1.7)), fitted=True) as figure:
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(2, 3))
        marked = [values[name] > 1 for name in shown]
        draw_bars(left, [values[name] for name in shown], marked, 1.0)
        _rows(left, shown)
        left.set(title="how far each stands out (dashed: the limit)")
        _cells(figure, right, np.array([[away[name][w] for w in what] for name in shown]), what)
    plot.caption += left_out(len(values), ROWS)


def _cells(figure: Figure, axes: Axes, matrix: np.ndarray, what: Sequence[str]) -> None:
    """Draw a cell for each thing that is looked at, with its number where it is above 1."""
    most = float(np.clip(matrix.max(initial=0), 1.5, 5))
    axes.grid(False)
    cells = axes.imshow(matrix, cmap="cividis", vmin=0, vmax=most, aspect="auto")
    for i, j in zip(*np.nonzero(matrix > 1), strict=True):
        dark = matrix[i, j] < 0.5 * most
        axes.text(
            j, i, f"{matrix[i, j]:.3g}", ha="center", va="center", fontsize=7.5,
            color="white" if dark else "black",
        )  # fmt: skip
    axes.set_xticks(range(len(what)), what, rotation=35, ha="right", rotation_mode="anchor")
    axes.tick_params(axis="both", length=0)
    axes.set(title="in what, in units of the limit")
    bar = figure.colorbar(cells, ax=axes, pad=0.01, extend="max", aspect=_aspect(len(matrix)))
    bar.outline.set_visible(False)
