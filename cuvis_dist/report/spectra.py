"""What does phase 1 know of the spectra: their mean and spread, together and per recording?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from cuvis_dist.report.kept import Kept
from cuvis_dist.report.plot import (
    BLUE,
    COLOURS,
    GREY,
    LINES,
    VERMILLION,
    Plot,
    drawing,
    literal,
    number,
    several,
)
from cuvis_dist.report.section import Section, Table, label

#: So many recordings have colours and names of their own; of more, those that stand out most.
_NAMED = 6
#: With more curves than this a plot is made of pixels.
_MANY = 60
#: Constant bands that are marked by lines at most.
_LINES = 8
#: Means are drawn in one plot unless one is so many times the other.
_ALIKE = 20
#: A band whose deviation is this small a part of the largest value is constant.
_CONSTANT = 1e-7


def spectra(runs: Sequence[Kept]) -> Section:
    """Show mean and spread of the measured bands, and how the recordings differ."""
    section = Section("spectra", "Spectra of the train split")
    for kept in runs:
        port = band_port(kept)
        if port is None:
            section.missing = section.missing or (
                "No mean spectrum was kept: phase 1 measured none in this folder, or nothing but "
                "scores."
            )
            continue
        section.missing = ""
        section.plots.append(_mean(kept, port, runs))
        section.plots += _recordings(kept, port, runs)
        if constant := constant_bands(kept, port):
            section.said.append(
                f"Constant over the train split{label(kept, runs)}: {', '.join(constant)}."
            )
        section.tables += _ranges(kept, port, runs)
    return section


def band_port(kept: Kept) -> dict[str, Any] | None:
    """Return the measured port that says most about spectra: bands of the batch, with moments."""
    ports = [
        port
        for port in kept.measured.get("ports", [])
        if (channels := len(_any(port["values"]))) > 1 or (channels and port["bands"])
    ]
    ports.sort(key=lambda p: (not p["bands"], "mean" not in p["values"]))
    return ports[0] if ports else None


def _any(values: dict[str, Any]) -> np.ndarray:
    """Return one spectrum of a port."""
    return next((values[k] for k in ("mean", "minimum") if k in values), np.empty(0))


def constant_bands(kept: Kept, port: dict[str, Any]) -> list[str]:
    """Return the names of bands without variation, five at most."""
    names = [named(kept, port, index) for index in _constant(port["values"])]
    return names if len(names) <= 5 else [*names[:5], f"{len(names) - 5} more"]


def named(kept: Kept, port: dict[str, Any], index: int) -> str:
    """Return the name of a band, with its wavelength if it is known."""
    where, what = kept.axis(len(_any(port["values"])), port["bands"])
    return f"band {index} ({where[index]:g} nm)" if "nm" in what else f"band {index}"


def _constant(values: dict[str, Any]) -> list[int]:
    if "std" in values:
        scale = float(np.abs(values["mean"]).max()) or 1.0
        return [int(i) for i in np.flatnonzero(values["std"] <= _CONSTANT * scale)]
    return [int(i) for i in np.flatnonzero(values["maximum"] == values["minimum"])]


def _mean(kept: Kept, port: dict[str, Any], runs: Sequence[Kept]) -> Plot:
    values = port["values"]
    x, what = kept.axis(len(_any(values)), port["bands"])
    constant = _constant(values)
    plot = Plot(
        "spectrum" if kept is runs[0] else "spectrum-other",
        f"Mean spectrum of {port['source']} over {what}, with one standard deviation on either "
        f"side and the range of all pixels{label(kept, runs)}."
        + (f" {_are_constant(constant)}, marked." if constant else ""),
        f"All pixels of the train split together at {port['source']}{label(kept, runs)}.",
    )
    plot.columns = {what: x} | {
        name: values[name] for name in ("mean", "std", "minimum", "maximum") if name in values
    }
    with drawing(plot) as figure:
        axes = figure.subplots()
        mark: Any = {"marker": "."} if len(x) == 1 else {}  # a line needs two points
        if "minimum" in values:
            ends: Any = {"color": GREY, "lw": 0.9, "ls": ":", **mark}
            axes.plot(x, values["minimum"], **ends)
            axes.plot(x, values["maximum"], **ends, label="smallest, largest")
        if "mean" in values:
            mean, std = values["mean"], values["std"]
            if len(x) == 1:
                axes.errorbar(x, mean, std, color=BLUE, capsize=4)
            axes.fill_between(x, mean - std, mean + std, color=BLUE, alpha=0.2, lw=0)
            axes.plot(x, mean, color=BLUE, label="mean ± standard deviation", **mark)
        _mark(axes, x[constant])
        for other in runs:
            if other is not kept and kept is runs[0] and (theirs := band_port(other)):
                _overlay(axes, other, theirs, values, what)
        axes.set(xlabel=what, ylabel="value", title=f"mean spectrum{label(kept, runs)}")
    return plot


def _are_constant(constant: list[int]) -> str:
    return f"{several(len(constant), 'band')} {'is' if len(constant) == 1 else 'are'} constant"


def _mark(axes: Axes, x: np.ndarray) -> None:
    """Mark constant bands: by lines, or below where these would hide everything."""
    if len(x) > _LINES:
        below = axes.get_xaxis_transform()
        axes.plot(
            x, np.full(len(x), 0.02), "|", color=VERMILLION, label="constant", transform=below
        )
        return
    for i, each in enumerate(x):
        axes.axvline(each, color=VERMILLION, lw=1.2, ls="--", label="constant" if not i else None)


def _overlay(
    axes: Axes, other: Kept, port: dict[str, Any], values: dict[str, Any], what: str
) -> None:
    """Draw the mean of another run too, where axis and scale are alike."""
    if "mean" not in port["values"] or "mean" not in values:
        return
    mean = port["values"]["mean"]
    x, theirs = other.axis(len(mean), port["bands"])
    sizes = sorted(float(np.abs(each).max()) for each in (mean, values["mean"]))
    if theirs == what and sizes[1] <= _ALIKE * sizes[0]:
        axes.plot(x, mean, "k", ls=LINES[1], lw=1.2, label="mean of the other")


def _recordings(kept: Kept, port: dict[str, Any], runs: Sequence[Kept]) -> list[Plot]:
    """Return the recordings' means, and how far they are from all pixels' mean."""
    found = {name: r for name, r in port["recordings"].items() if "mean" in r}
    values, suffix = port["values"], "" if kept is runs[0] else "-other"
    if "mean" not in values or len(found) < 2:
        return []
    x, what = kept.axis(len(values["mean"]), port["bands"])
    names = list(found)
    means = np.stack([found[name]["mean"] for name in names])
    spread = np.where(values["std"] > 0, values["std"], np.inf)
    shifts = (means - values["mean"]) / spread
    order = np.argsort(-np.sqrt((shifts**2).mean(axis=1)))
    prominent = {int(i): c for c, i in enumerate(order[:_NAMED])}
    stands = names[int(order[0])]
    plots = []
    for name, curves, title, ylabel in (
        ("recordings", means, "mean spectrum of each recording", "value"),
        ("shifts", shifts, "shift of each recording's mean", "standard deviations of pixels"),
    ):
        plot = Plot(
            f"{name}{suffix}",
            f"{title} over {what}, {len(names)} curves{label(kept, runs)}. {stands} stands out "
            "most.",
            (
                "Recordings that are alike lie on top of each other"
                + f"; the {_NAMED} that stand out most are named" * (len(names) > _NAMED)
                if name == "recordings"
                else "The same, relative to all pixels' mean and spread: a gain or an offset is a "
                "curve away from zero, a broken band a spike"
            )
            + f"{label(kept, runs)}.",
            {what: x} | dict(zip(names, curves, strict=True)),
        )
        with drawing(plot, pixels=len(names) > _MANY) as figure:
            axes = figure.subplots()
            mark: Any = {"marker": "."} if len(x) == 1 else {}
            for i, curve in enumerate(curves):
                if i not in prominent:
                    axes.plot(x, curve, color="#B5B5B5", lw=0.7, **mark)
            for i, c in prominent.items():
                label_ = literal(names[i])
                axes.plot(x, curves[i], color=COLOURS[c], lw=1.1, label=label_, **mark)
            axes.set(xlabel=what, ylabel=ylabel, title=f"{title}{label(kept, runs)}")
            if name == "shifts":
                axes.axhline(0, color=GREY, lw=0.8)
        plots.append(plot)
    return plots


def _ranges(kept: Kept, port: dict[str, Any], runs: Sequence[Kept]) -> list[Table]:
    """Return a table of the recordings that stand out most; none for one recording."""
    values = port["values"]
    found = {name: r for name, r in port["recordings"].items() if "n" in r}
    if len(found) < 2 or "mean" not in values:
        return []
    spread = np.where(values["std"] > 0, values["std"], np.inf)
    rows = []
    for name, r in found.items():
        if "mean" not in r:
            continue
        shift = (r["mean"] - values["mean"]) / spread
        gain = float(r["mean"] @ values["mean"] / max(values["mean"] @ values["mean"], 1e-300))
        low = number(float(r["minimum"].min())) if "minimum" in r else "-"
        high = number(float(r["maximum"].max())) if "maximum" in r else "-"
        rows.append(
            (
                float(np.sqrt((shift**2).mean())),
                [
                    name,
                    number(int(r["n"])),
                    f"{float(np.sqrt((shift**2).mean())):.3f}",
                    f"{gain:.3f}",
                    low,
                    high,
                ],
            )
        )
    rows.sort(key=lambda row: -row[0])
    more = f", the first 12 of {len(rows)}" if len(rows) > 12 else ""
    table = Table(
        f"Recordings by how far their mean is from that of all pixels{more}{label(kept, runs)}",
        ("recording", "pixels", "shift in std", "gain", "smallest", "largest"),
        [row for _, row in rows[:12]],
        numbers=True,
    )
    return [table] if rows else []
