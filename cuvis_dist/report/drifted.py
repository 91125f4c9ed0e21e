"""What has changed since a pipeline was fitted, node by node: then and now, band by band?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cuvis_dist.audit.drift import NodeDrift
from cuvis_dist.audit.table import SAID
from cuvis_dist.report.beside import Along, along, bars
from cuvis_dist.report.plot import BLUE, GREY, VERMILLION, Plot, drawing, literal
from cuvis_dist.report.section import Section, Table


def drifts(found: Sequence[NodeDrift], wavelengths: np.ndarray | None, against: str) -> Section:
    """Show how far each node is from what it froze.

    Parameters
    ----------
    found : sequence of NodeDrift
        The nodes.
    wavelengths : ndarray or None
        ``[C]`` in nm, of the bands that are audited.
    against : str
        The pipeline that was fitted then.
    """
    section = Section("drift", "Drift")
    section.said.append(
        f"Each node of {against} beside what the same node would freeze now: by the mean shift, "
        "relative to the mean that it froze; or to the range, where it is fitted by extrema."
    )
    for each in found:
        size = max(len(then) for then, _ in each.spectra.values()) if each.spectra else 0
        axis = along(size, wavelengths if each.bands else None)
        if not each.bands:
            axis = Along(axis.x, "channel", axis.order)
        if size > 1:
            section.plots += _spectra(each, axis)
        plot = Plot(
            f"drift-groups-{each.node}",
            f"How far each group is from the mean of {each.node}, relative to it.",
            f"Groups by how far they are from the mean that {each.node} froze.",
        )
        if bars(plot, each.groups, (), literal(f"drift of each group from {each.node}"), np.nan):
            section.plots.append(plot)
    rows = [list(row) for each in found for row in _figures(each)]
    section.tables.append(Table("Drift of each node", ("node", "figure", "value"), rows))
    return section


def drift_findings(found: Sequence[NodeDrift], most: float | None) -> list[tuple[str, str, str]]:
    """Return the nodes that have drifted by more than is allowed, as findings of a page."""
    return [
        (
            each.node,
            f"its {each.of} has drifted by {each.ratio:.4g} of itself, and {most:g} is allowed",
            "drift",
        )
        for each in found
        if most is not None and each.surely > most
    ]


def _figures(each: NodeDrift) -> Iterator[tuple[str, str, str]]:
    yield each.node, f"drift, in parts of its {each.of}", f"{each.ratio:.4g}"
    for name, value in each.figures.items():
        yield each.node, SAID[name], f"{value:.4g}"


def _spectra(each: NodeDrift, axis: Along) -> Iterator[Plot]:
    """Yield a node's spectra then and now, and how far one is above the other."""
    both = {
        name: (then[axis.order], now[axis.order])
        for name, (then, now) in each.spectra.items()
        if len(then) == len(axis.x)
    }
    if not both:
        return
    named = " and ".join(both)
    plot = Plot(
        f"drift-{each.node}",
        f"The {named} of {each.node} over {axis.what}, then and now.",
        f"Dashed: the {named} that {each.node} froze. Solid: what it would freeze now.",
        {axis.what: axis.x}
        | {
            f"{name} {when}": values
            for name, pair in both.items()
            for when, values in zip(("then", "now"), pair, strict=True)
        },
    )
    with drawing(plot) as figure:
        axes = figure.subplots()
        for i, (then, now) in enumerate(both.values()):
            axes.plot(axis.x, now, color=VERMILLION, lw=1.2, label="now" if not i else None)
            axes.plot(axis.x, then, color=BLUE, ls="--", label="then" if not i else None)
        axes.set(xlabel=axis.what, ylabel="value", title=literal(f"{named} of {each.node}"))
    yield plot
    first = [then for then, _ in both.values()]
    whole = float(np.abs(first[-1] - first[0] if len(first) > 1 else first[0]).mean())
    parts = {name: 100 * (now - then) / (whole or 1.0) for name, (then, now) in both.items()}
    plot = Plot(
        f"drift-bands-{each.node}",
        f"How far the {named} of {each.node} has moved, over {axis.what}.",
        f"Now minus then, in percent of the mean {'range' if each.of == 'range' else 'value'} of "
        "all bands then.",
        {axis.what: axis.x} | parts,
    )
    with drawing(plot) as figure:
        axes = figure.subplots()
        axes.axhline(0, color=GREY, lw=0.8)
        for (name, values), colour in zip(parts.items(), (VERMILLION, BLUE), strict=False):
            axes.plot(axis.x, values, color=colour, label=name, marker=".", ms=4, lw=1.1)
        axes.set(
            xlabel=axis.what, ylabel="percent", title=literal(f"drift of {each.node}, per band")
        )
    yield plot
