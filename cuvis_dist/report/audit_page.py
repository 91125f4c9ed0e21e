"""What does the page about an audit show? What stands out, beside the plots that show it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import PurePosixPath

from cuvis_dist.audit.audit import Row
from cuvis_dist.audit.table import COLUMNS, cells_of, verdict
from cuvis_dist.errors import InputError
from cuvis_dist.report import differences
from cuvis_dist.report.audited import Audited
from cuvis_dist.report.beside import standing_out
from cuvis_dist.report.drifted import drift_findings, drifts
from cuvis_dist.report.page import Page, file_name, made, written
from cuvis_dist.report.plot import Plot
from cuvis_dist.report.section import Section, Table
from cuvis_dist.storage import Location, OutputFolder

#: Findings that are listed, and rows of the table.
_FINDINGS, _ROWS = 20, 1000
#: The section that shows what a cause is seen by; every other one is seen in the spectra.
_SHOWN_IN = {
    "constant": "ranges",
    "saturated": "ranges",
    "swapped": "distances",
    "spectral shift": "distances",
    "covariance": "distances",
    "noisy": "noise",
    "noise": "noise",
    "foreign": "pixels",
    "varying": "pixels",
    "empty": "pixels",
    "extreme": "ranges",
    "coarse": "ranges",
    "twice": "table",
    "copied": "distances",
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
#: Causes that are facts about bands, pixels or frames, whatever the other groups are like.
_FACTS = (
    "constant", "saturated", "swapped", "spectral shift", "empty", "coarse", "twice", "copied",
    "bytes",
)  # fmt: skip


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
    makers = [*_SECTIONS[:-1], *[drift] * bool(audited.drifts), _SECTIONS[-1]]
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


def overview(audited: Audited) -> Section:
    """Show what was audited."""
    section = Section("overview", "What was audited")
    rows = [[key, value] for key, value in audited.facts.items() if key != "name"]
    nm = audited.wavelengths
    bands = f"{len(audited.axis.x)}, "
    if nm is None:
        bands += "their wavelengths are not known"
    else:
        bands += " to ".join(f"{each:g}" for each in dict.fromkeys((nm[0], nm[-1]))) + " nm"
    section.tables.append(Table("The archive", ("", ""), [*rows, ["bands", bands]]))
    section.said += [f"{said[0].upper()}{said[1:]}." for said in audited.found.remarks]
    section.said += audited.remarks
    return section


def standing(audited: Audited) -> Section:
    """Show how far each group stands out, and in what."""
    section = Section("standing", "What stands out")
    if not audited.judged and not audited.unusual:
        section.missing = (
            f"{audited.size} cannot say what is usual, and no band of theirs is broken in a "
            "way that shows without others."
        )
        return section
    section.said.append(verdict(audited.found).capitalize() + ".")
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


def drift(audited: Audited) -> Section:
    """Show what has changed since a pipeline was fitted."""
    return drifts(audited.drifts, audited.wavelengths, audited.facts.get("against", ""))


def table(audited: Audited) -> Section:
    """Show the figures of all groups, and likely causes."""
    section = Section("table", "All groups")
    shown = audited.rows[:_ROWS]
    rows, causes = [], []
    for row in shown:
        stands, name, *figures, cause = cells_of(row)
        rows.append([name, stands, *figures])
        causes += [[name, stands, cause]] * bool(row.causes)
    caption = f"{audited.size}, sorted by how far they stand out"
    if len(shown) < len(audited.rows):
        caption += f"; the first {len(shown)} (audit --json has all)"
    columns = (audited.found.by, "stands out", "frames", "pixels", *COLUMNS)
    section.tables.append(Table(caption, columns, rows, numbers=True))
    if causes:
        columns = (audited.found.by, "stands out", "likely cause")
        section.tables.append(Table("Likely causes; above 1 it is no guess", columns, causes))
    return section


#: Functions named as the anchors of what they make.
_SECTIONS: tuple[Callable[[Audited], Section], ...] = (
    overview,
    standing,
    differences.spectra,
    differences.ranges,
    differences.noise,
    differences.pixels,
    differences.distances,
    table,
)
