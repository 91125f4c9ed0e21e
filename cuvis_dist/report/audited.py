"""What does the page about an audit show? What stands out, beside the plots that show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath

import numpy as np

from cuvis_dist.audit.audit import Audit, Row
from cuvis_dist.audit.drift import NodeDrift
from cuvis_dist.audit.groups import Group
from cuvis_dist.audit.table import COLUMNS, cells_of, verdict
from cuvis_dist.errors import InputError
from cuvis_dist.report.beside import Along, along, bars, curves, heat_map, standing_out
from cuvis_dist.report.drifted import drift_findings, drifts
from cuvis_dist.report.page import Page, file_name, made, written
from cuvis_dist.report.plot import Plot
from cuvis_dist.report.section import Section, Table
from cuvis_dist.statistics.spread import LEAST_OTHERS, centre_and_spread
from cuvis_dist.storage import Location, OutputFolder

#: Findings that are listed, and rows of the table.
_FINDINGS, _ROWS = 20, 1000
#: The section that shows what a cause is seen by; every other one is seen in the spectra.
_SHOWN_IN = {
    "constant": "range",
    "saturated": "range",
    "swapped": "distances",
    "spectral shift": "distances",
    "covariance": "distances",
    "noisy": "noise",
    "noise": "noise",
    "foreign": "pixels",
    "varying": "pixels",
}
#: What is looked at, as people call it.
_MEASURES = {
    "gain": "gain",
    "offset": "offset",
    "slope": "slope",
    "level": "level of noise",
    "mean": "mean spectrum",
    "noise": "noise of a band",
    "pixels": "spread of pixels",
    "covariance": "covariance",
    "stripes": "stripes",
    "foreign": "foreign pixels",
}
#: Causes that are facts about bands, whatever the other groups are like.
_FACTS = ("constant", "saturated", "swapped", "spectral shift")


@dataclass(frozen=True)
class Audited:
    """An audit, and what it was made of.

    Attributes
    ----------
    found : Audit
        What it says.
    groups : mapping of str to Group
        By name.
    wavelengths : ndarray or None
        ``[C]`` in nm.
    facts : dict of str to str
        What was audited.
    remarks : list of str
        What else is to be said of that.
    drifts : sequence of NodeDrift
        How far each node is from an initialization.
    most : float or None
        How far it may be.
    """

    found: Audit
    groups: Mapping[str, Group]
    wavelengths: np.ndarray | None
    facts: dict[str, str]
    remarks: list[str] = field(default_factory=list)
    drifts: Sequence[NodeDrift] = ()
    most: float | None = None

    @property
    def rows(self) -> tuple[Row, ...]:
        """The groups, those that stand out most first."""
        return self.found.rows

    @property
    def unusual(self) -> list[str]:
        """The names of those that stand out."""
        return [row.name for row in self.rows if row.unusual]

    @property
    def axis(self) -> Along:
        """Where the bands stand."""
        return along(len(self.groups[self.rows[0].name].mean), self.wavelengths)

    @property
    def judged(self) -> bool:
        """Whether there are enough groups to say what is usual."""
        return len(self.rows) > LEAST_OTHERS


def write_audit(audited: Audited, place: str, data: bool = False) -> Location:
    """Write the page about an audit; return where it lies.

    Parameters
    ----------
    audited : Audited
        The audit.
    place : str
        ``....html``, a local path or a URI.
    data : bool
        Write the data of each plot as CSV, to a folder beside the page that is called like it.

    Raises
    ------
    InputError
        If the name is another one, or nothing can be written there.
    ClusterError
        If a store does not answer.
    """
    output, name = page_at(place)
    folder = PurePosixPath(name).stem if data else ""
    page, plots = render(audited, folder)
    for plot in plots:
        if plot.file:
            output.write(f"{folder}/{file_name(plot)}", plot.csv())
    return output.write(name, page.encode())


def page_at(place: str) -> tuple[OutputFolder, str]:
    """Return the folder of a page, and its name in there; raises InputError if it has none."""
    folder, slash, name = place.replace("\\", "/").rpartition("/")
    if not name.endswith(".html") or name == ".html":
        raise InputError(f"the report is a page: --report {place} has no name that ends in .html")
    return OutputFolder((folder or slash) if slash else "."), name


def render(audited: Audited, folder: str = "") -> tuple[str, list[Plot]]:
    """Return the page about an audit, and the plots on it.

    Parameters
    ----------
    folder : str
        Where the data of each plot lie, relative to the page; empty where they are not written.
    """
    makers = [*_SECTIONS[:-1], *[_drifts] * bool(audited.drifts), _SECTIONS[-1]]
    sections = [made(make, audited) for make in makers]
    sound = verdict(audited.found).capitalize() if audited.judged else ""
    page = Page(
        f"{audited.facts.get('name') or 'archive'}: audit by {audited.found.by}",
        findings(audited),
        sections,
        sound,
        "what a store knows of the archive",
    )
    return written(page, folder)


def findings(audited: Audited) -> list[tuple[str, str, str]]:
    """Return what stands out: the group, the likely cause, and the section that shows it."""
    there = [row for row in audited.rows if row.unusual]
    found = []
    for row in there[:_FINDINGS]:
        cause = "; ".join(map(str, row.causes)) or "no cause is known"
        kind = row.causes[0].kind if row.causes else ""
        message = f"{cause}, {row.standing_out:.3g} times the limit"
        found.append((row.name, message, _SHOWN_IN.get(kind, "spectra")))
    if len(there) > _FINDINGS:
        found.append((f"{len(there) - _FINDINGS} more", "stand out less", "table"))
    return found + drift_findings(audited.drifts, audited.most)


# ---- sections ----------------------------------------------------------------------------


def _overview(audited: Audited) -> Section:
    section = Section("overview", "What was audited")
    rows = [[key, value] for key, value in audited.facts.items() if key != "name"]
    nm = audited.wavelengths
    bands = f"{len(audited.axis.x)}, "
    bands += "their wavelengths are not known" if nm is None else f"{nm[0]:g} to {nm[-1]:g} nm"
    section.tables.append(Table("The archive", ("", ""), [*rows, ["bands", bands]]))
    section.said += [f"{said[0].upper()}{said[1:]}." for said in audited.found.remarks]
    section.said += audited.remarks
    return section


def _standing(audited: Audited) -> Section:
    section = Section("standing", "What stands out")
    section.said.append(verdict(audited.found).capitalize() + ".")
    if not audited.judged and not audited.unusual:
        section.missing = (
            f"{len(audited.rows)} of them are too few to say what is usual: there is nothing to "
            "compare each with."
        )
        return section
    first = audited.rows[0]
    plot = Plot(
        "standing-out",
        f"How far each of {len(audited.rows)} groups stands out, and in what. Most does "
        f"{first.name}, {first.standing_out:.2f} times the limit.",
        "A group is judged by the spread of the others. Beyond the dashed line it is farther from "
        "them than their own differences explain; the cells on the right say in what.",
        wide=True,
    )
    away = {row.name: {words: row.away.get(m, 0.0) for m, words in _MEASURES.items()}
            | {"single bands": _of_bands(row)} for row in audited.rows}  # fmt: skip
    standing_out(plot, {row.name: row.standing_out for row in audited.rows}, away)
    section.plots.append(plot)
    return section


def _of_bands(row: Row) -> float:
    return max((cause.weight for cause in row.causes if cause.kind in _FACTS), default=0.0)


def _spectra(audited: Audited) -> Section:
    section = Section("spectra", "Mean spectra")
    means = {row.name: audited.groups[row.name].mean for row in audited.rows}
    plot = Plot(
        "means",
        f"Mean spectrum of each of {len(means)} groups over {audited.axis.what}. {_named(audited)}",
        "Those that stand out are in colour; all others lie in the grey band.",
    )
    curves(plot, audited.axis, means, audited.unusual, "mean spectrum\nvalue")
    section.plots.append(plot)
    rest = [means[row.name] for row in audited.rows if not row.unusual]
    if len(rest) < LEAST_OTHERS:
        section.said.append("Too few groups are usual to say how far the others are from them.")
        return section
    centre, spread = centre_and_spread(np.stack(rest))
    units = np.where(spread > 0, spread, np.nan)
    shifts = {name: (mean - centre) / units for name, mean in means.items()}
    relative = Plot(
        "shift-curves",
        f"The same, as shift from the usual mean spectrum over {audited.axis.what}, in spreads "
        f"between groups. {_named(audited)}",
        "A gain or an offset is a curve away from zero, a broken band a spike.",
    )
    curves(
        relative, audited.axis, shifts, audited.unusual,
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
        f"usual one. {_named(audited)}",
        "Shift of each group's mean, band by band, in spreads between the groups that do not stand "
        "out, which are sorted as in the table. Grey: they have no spread.",
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
        f"each mean, in spreads between groups. {_named(audited)}",
        "The same along the directions in which pixels differ, which is how a mean is judged. "
        "Content moves it on the left; what moves it on the right is seldom content.",
        wide=True,
    )
    heat_map(plot, axis, padded, "spreads")
    return plot


def _range(audited: Audited) -> Section:
    section = Section("range", "Spread and range of the bands")
    groups = {row.name: audited.groups[row.name] for row in audited.rows}
    deviations = {name: np.sqrt(group.variance) for name, group in groups.items()}
    plot = Plot(
        "deviations",
        f"Standard deviation of the pixels of each group over {audited.axis.what}. "
        f"{_named(audited)}",
        "A band that is constant in a group has a deviation near zero, or a gap where it is zero.",
    )
    names = "standard deviation of pixels\nvalue\nlog"
    curves(plot, audited.axis, deviations, audited.unusual, names)
    section.plots.append(plot)
    largest = {name: g.maximum for name, g in groups.items() if g.maximum is not None}
    if largest:
        plot = Plot(
            "maxima",
            f"Largest value of each group over {audited.axis.what}. {_named(audited)}",
            "Where a sensor is full, the largest value is the same in many bands.",
        )
        curves(plot, audited.axis, largest, audited.unusual, "largest value\nvalue")
        section.plots.append(plot)
    else:
        section.said.append("No range is kept: no node is fitted on one.")
    return section


def _noise(audited: Audited) -> Section:
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
        f"Noise of each group over {audited.axis.what}, in that of the others. {_named(audited)}",
        "What other bands do not predict of a band, in the usual noise: a gain multiplies it in "
        "all bands, and content hardly does.",
    )
    curves(plot, audited.axis, known, audited.unusual, "noise per band\ntimes the usual\nlog")
    section.plots.append(plot)
    return section


def _figures(audited: Audited, section: Section, wanted: Sequence[tuple[str, str, str]]) -> None:
    """Add bars of some figures: the name, the title and the caption of each."""
    for name, title, caption in wanted:
        values = {row.name: row.figures.get(name, np.nan) for row in audited.rows}
        plot = Plot(name.replace("_", "-"), f"{title}, by group. {_named(audited)}", caption)
        limit = audited.found.limits.get(name, np.nan)
        if bars(plot, values, audited.unusual, title, limit):
            section.plots.append(plot)


def _pixels(audited: Audited) -> Section:
    section = Section("pixels", "Pixels outside of the bulk")
    _figures(audited, section, [
        ("outside", "share of pixels outside of the bulk", "Of the others' pixels one in a hundred "
         "lies outside, by definition; longer bars are foreign pixels, or a fault of all pixels."),
    ])  # fmt: skip
    if not section.plots:
        section.missing = "No sample of pixels is kept, or there are too few groups to compare."
    return section


def _distances(audited: Audited) -> Section:
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


def _drifts(audited: Audited) -> Section:
    return drifts(audited.drifts, audited.wavelengths, audited.facts.get("against", ""))


def _table(audited: Audited) -> Section:
    section = Section("table", "All groups")
    shown = audited.rows[:_ROWS]
    rows = []
    for row in shown:
        stands, name, *figures, cause = cells_of(row)
        rows.append([name, stands, *figures, cause])
    columns = (audited.found.by, "stands out", "frames", "pixels", *COLUMNS, "likely cause")
    caption = f"{len(audited.rows)} groups, those that stand out most first"
    if len(shown) < len(audited.rows):
        caption += f"; the first {len(shown)} (audit --json has all)"
    section.tables.append(Table(caption, columns, rows, numbers=True))
    return section


def _named(audited: Audited) -> str:
    """Return which groups stand out, as the end of an alternative text."""
    names = audited.unusual
    if not names:
        return "None stands out."
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"Standing out: {', '.join(names[:3])}{more}."


_SECTIONS: tuple[Callable[[Audited], Section], ...] = (
    _overview,
    _standing,
    _spectra,
    _range,
    _noise,
    _pixels,
    _distances,
    _table,
)
