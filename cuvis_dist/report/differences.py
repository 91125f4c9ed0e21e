"""In what do the groups of an audit differ? Spectra, range, noise, foreign pixels, distances."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cuvis_dist.report.audited import Audited
from cuvis_dist.report.beside import along, bars, curves, heat_map
from cuvis_dist.report.plot import Plot
from cuvis_dist.report.section import Section
from cuvis_dist.statistics.spread import LEAST_OTHERS


def spectra(audited: Audited) -> Section:
    """Show mean spectra, and how far each is from the usual one."""
    section = Section("spectra", "Mean spectra")
    means = {row.name: audited.groups[row.name].mean for row in audited.rows}
    plot = Plot(
        "means",
        f"Mean spectrum of each of {len(means)} groups over {audited.axis.what}. {audited.said}",
        "Those that stand out are in colour; all others lie in the grey band."
        if audited.judged
        else "Too few to say which stand out: each is in colour.",
    )
    curves(plot, audited.axis, means, audited.coloured, "mean spectrum\nvalue")
    section.plots.append(plot)
    rest = [means[row.name] for row in audited.rows if not row.unusual]
    if len(rest) < LEAST_OTHERS:
        section.said.append("Too few groups are usual to say how far each is from them.")
        return section
    centre, spread = np.median(rest, axis=0), np.std(rest, axis=0, ddof=1)
    units = np.where(spread > 0, spread, np.nan)
    shifts = {name: (mean - centre) / units for name, mean in means.items()}
    relative = Plot(
        "shift-curves",
        f"The same, as shift from the usual mean spectrum over {audited.axis.what}, in spreads "
        f"between groups. {audited.said}",
        "A gain or an offset is a curve away from zero, a broken band a spike.",
    )
    curves(
        relative, audited.axis, shifts, audited.coloured,
        "shift from the usual mean\nspreads between groups",
    )  # fmt: skip
    section.plots.append(relative)
    section.plots.append(_shifts(audited, shifts))
    if any(row.directions is not None for row in audited.rows):
        section.plots.append(_directions(audited))
    return section


def _shifts(audited: Audited, shifts: Mapping[str, np.ndarray]) -> Plot:
    plot = Plot(
        "shifts",
        f"Heat map of {len(shifts)} groups and {audited.axis.what}: shift of each mean from the "
        f"usual one. {audited.said}",
        "Shift of each group's mean, band by band, in standard deviations between the groups that "
        "do not stand out; sorted as in the table. Grey: a band without such a deviation.",
        wide=True,
    )
    heat_map(plot, audited.axis, shifts, "spreads")
    return plot


def _directions(audited: Audited) -> Plot:
    known = {row.name: row.directions for row in audited.rows if row.directions is not None}
    most = max(map(len, known.values()))
    padded = {
        name: np.pad(each, (0, most - len(each)), constant_values=np.nan)
        for name, each in known.items()
    }
    axis = replace(along(most, None), what="direction, from where pixels differ most to least")
    plot = Plot(
        "directions",
        f"Heat map of {len(known)} groups and {most} directions in which pixels differ: shift of "
        f"each mean, in spreads between groups. {audited.said}",
        "The same along the directions in which pixels differ, which is how a mean is judged. "
        "Content moves it on the left; what moves it on the right is seldom content.",
        wide=True,
    )
    heat_map(plot, axis, padded, "spreads")
    return plot


def ranges(audited: Audited) -> Section:
    """Show how far pixels of each band spread and reach."""
    section = Section("ranges", "Spread and range of the bands")
    groups = {row.name: audited.groups[row.name] for row in audited.rows}
    deviations = {name: np.sqrt(group.variance) for name, group in groups.items()}
    plot = Plot(
        "deviations",
        f"Standard deviation of the pixels of each group over {audited.axis.what}. {audited.said}",
        "A band that is constant in a group has a deviation of zero, or near it.",
    )
    names = "standard deviation of pixels\nvalue\nlog"
    curves(plot, audited.axis, deviations, audited.coloured, names)
    section.plots.append(plot)
    largest = {name: g.maximum for name, g in groups.items() if g.maximum is not None}
    if largest:
        plot = Plot(
            "maxima",
            f"Largest value of each group over {audited.axis.what}. {audited.said}",
            "Where a sensor is full, the largest value is the same in many bands.",
        )
        curves(plot, audited.axis, largest, audited.coloured, "largest value\nvalue")
        section.plots.append(plot)
    else:
        section.said.append("No range is kept: no node is fitted on one.")
    return section


def noise(audited: Audited) -> Section:
    """Show each band's noise."""
    section = Section("noise", "Noise")
    known = {
        row.name: row.noise
        for row in audited.rows
        if row.noise is not None and np.isfinite(row.noise).any()
    }
    if not known:
        section.missing = "Noise is not known: pixels or groups are too few for these bands."
        return section
    plot = Plot(
        "noise",
        f"Noise of each group over {audited.axis.what}, in that of the others. {audited.said}",
        "What other bands do not predict of a band, in the usual noise: a gain multiplies it in "
        "all bands, and content hardly does.",
    )
    curves(plot, audited.axis, known, audited.coloured, "noise per band\ntimes the usual\nlog")
    section.plots.append(plot)
    return section


def _figures(audited: Audited, section: Section, wanted: Sequence[tuple[str, str, str]]) -> None:
    """Add bars of some figures: the name, the title and the caption of each."""
    for name, title, caption in wanted:
        values = {row.name: row.figures.get(name, np.nan) for row in audited.rows}
        plot = Plot(name.replace("_", "-"), f"{title}, by group. {audited.said}", caption)
        limit = audited.found.limits.get(name, np.nan)
        if bars(plot, values, audited.unusual, title, limit):
            section.plots.append(plot)


def pixels(audited: Audited) -> Section:
    """Show how many pixels are unlike the others."""
    section = Section("pixels", "Pixels outside of the bulk")
    _figures(audited, section, [
        ("outside", "share of pixels outside of the bulk", "Of the others' pixels one in a hundred "
         "lies outside, by definition; longer bars are foreign pixels, or a fault of all pixels."),
    ])  # fmt: skip
    if not section.plots:
        section.missing = "No sample of pixels is kept, or there are too few groups to compare."
    return section


def distances(audited: Audited) -> Section:
    """Show how far the distributions are from the usual one."""
    section = Section("distances", "Distances and condition")
    _figures(audited, section, [
        ("bhattacharyya", "Bhattacharyya distance", "Of means and covariances, from the usual."),
        ("affine_invariant", "affine-invariant distance", "Of covariances alone: exchanged bands, "
         "other noise, other content."),
        ("condition", "condition of the correlations", "A group with a large number has bands that "
         "say the same."),
    ])  # fmt: skip
    if not section.plots:
        section.missing = "There are too few groups, or bands that vary, to tell distances."
    return section
