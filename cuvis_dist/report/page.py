"""How do sections become one page that opens anywhere?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from loguru import logger

from cuvis_dist.errors import one_line
from cuvis_dist.report import course, judgement, matrices, overview, pictures, rates, spectra
from cuvis_dist.report.kept import FOLDER, Kept
from cuvis_dist.report.plot import Plot
from cuvis_dist.report.section import Section

#: A larger page is one that nobody mails: plots are left out, those of frames first.
LARGEST = 5_000_000

#: Functions named as the anchors of what they make.
_SECTIONS: tuple[Callable[[Sequence[Kept]], Section], ...] = (
    overview.overview,
    spectra.spectra,
    matrices.correlation,
    matrices.selection,
    matrices.components,
    judgement.scores,
    rates.rates,
    pictures.frames,
    course.learning,
    course.time,
    course.trouble,
)


@dataclass
class Page:
    """What a page is made of.

    Attributes
    ----------
    title : str
        What stands above all.
    findings : list of tuple of str, str and str
        What to look at: of what, the message, and the anchor of the section that shows it.
    sections : list of Section
        From top to bottom.
    sound : str
        What is said where there are no findings.
    source : str
        What it is made from, as the end of a sentence.
    """

    title: str
    findings: list[tuple[str, str, str]]
    sections: list[Section]
    sound: str = ""
    source: str = "what the run left in its output folder"


def render(runs: Sequence[Kept], data: bool = False) -> tuple[str, list[Plot]]:
    """Return the page about a run, and the plots on it.

    Parameters
    ----------
    runs : sequence of Kept
        The run; and one that it is compared with.
    data : bool
        Say where the data of each plot lie.
    """
    title = f"{runs[0].record.get('name') or 'run'}: {runs[0].record.get('job', 'run')}"
    title += f", beside {runs[1].name}" if len(runs) > 1 else ""
    sections = [made(make, runs) for make in _SECTIONS]
    sound = "The fit looks sound" if runs[0].record.get("passes") else ""
    return written(Page(title, overview.findings(runs), sections, sound), FOLDER if data else "")


def written(page: Page, folder: str) -> tuple[str, list[Plot]]:
    """Return a page as HTML, and the plots on it.

    Parameters
    ----------
    page : Page
        Each finding is told once more in the section that shows it.
    folder : str
        Where the data of each plot lie, relative to the page; empty where they are not written.
    """
    anchors = {section.anchor: section for section in page.sections}
    for of, message, anchor in page.findings:
        anchors[anchor].findings.append(f"{of}: {message}")
    plots = [plot for section in page.sections for plot in section.plots]
    _fit(page.sections, plots)
    for plot in plots:
        plot.file = f"{folder}/{file_name(plot)}" if folder and plot.columns else ""
    return _environment().from_string(_source()).render(vars(page)), plots


def file_name(plot: Plot) -> str:
    """Return the name of a plot's CSV file."""
    safe = "".join(c if c.isalnum() or c in "-_." else "-" for c in plot.name)
    return f"{safe}.csv"


def made(make: Callable[[Any], Section], what: Any) -> Section:
    """Return a section about something; one that says why not where it cannot be made."""
    try:
        return make(what)
    except Exception as error:  # one broken section takes no other with it
        logger.opt(exception=True).debug(f"the report's section {make.__name__} failed")
        said = f"This section could not be made: {one_line(error)}."
        return Section(make.__name__, make.__name__.capitalize(), missing=said)


def _fit(sections: Sequence[Section], plots: list[Plot]) -> None:
    """Leave out plots, frames and then the largest, until the page is small enough."""
    room = LARGEST - 200_000
    order = sorted(plots, key=lambda p: (not p.name.startswith("frame-"), -len(p.image)))
    while order and sum(len(plot.image) for plot in plots) > room:
        dropped = order.pop(0)
        plots.remove(dropped)
        for section in sections:
            if dropped in section.plots:
                section.plots = [plot for plot in section.plots if plot is not dropped]
                said = "Some plots are left out, to keep the page small."
                section.said += [said] if said not in section.said else []


def _environment() -> Environment:
    return Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)


def _source() -> str:
    return files(__package__).joinpath("page.html").read_text(encoding="utf-8")
