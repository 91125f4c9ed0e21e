"""How does a plot look, and how does it get into a page?

Colours are those of Okabe and Ito (2008) and the map ``cividis`` (Nuñez, Anderton, Renslow 2018),
which people with any kind of colour vision tell apart; runs also differ by the style of the line.
"""

from __future__ import annotations

import base64
import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
#: In this order for what is drawn beside each other.
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, "#000000", "#8A8A8A")
#: Of this run, and of another one beside it.
LINES = ("-", "--")
GREY = "#767676"

_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "grid.color": "#E3E3E3",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "cuvis-dist",
    "path.simplify": True,
}


@dataclass
class Plot:
    """One image of the page.

    Attributes
    ----------
    name : str
        Name of its CSV file, without the suffix.
    alt : str
        What it shows, in words, for those who do not see it.
    caption : str
        What a reader should look for.
    columns : dict of str to sequence
        Its data, for ``--data``; all of one length.
    image : str
        The image as a ``data:`` address.
    wide : bool
        Whether it takes the whole width of the page.
    file : str
        Where its data lie, relative to the page; empty where they are not written.
    """

    name: str
    alt: str
    caption: str = ""
    columns: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)
    image: str = ""
    wide: bool = False
    file: str = ""

    def csv(self) -> bytes:
        """Return the data as CSV."""
        buffer = io.StringIO(newline="")
        table = csv.writer(buffer, lineterminator="\n")
        table.writerow(self.columns)
        columns = [np.asarray(column).tolist() for column in self.columns.values()]
        table.writerows(zip(*columns, strict=True))
        return buffer.getvalue().encode()


@contextmanager
def drawing(
    plot: Plot, size: tuple[float, float] = (5.6, 3.2), pixels: bool = False
) -> Iterator[Figure]:
    """Give a figure to draw on, and make the image of a plot of it in the end.

    Parameters
    ----------
    size : tuple of float
        In inches, of which a page is about eleven wide.
    pixels : bool
        Make it of pixels: smaller where there are many shapes, or photographs.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        buffer = io.BytesIO()
        if pixels:
            FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
            kind = "png"
        else:
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
            kind = "svg+xml"
        content = base64.b64encode(buffer.getvalue()).decode()
        plot.image = f"data:image/{kind};base64,{content}"


def photographs(size: tuple[float, float] = (3.4, 1.5)) -> Figure:
    """Return a figure for a row of pictures."""
    return Figure(figsize=size, layout="constrained", dpi=120)


def legend(axes: Axes) -> None:
    """Add a legend where something has a name."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="best", handlelength=2.2)


def short(text: str, length: int = 28) -> str:
    """Return a name that fits into a plot, shortened in its middle."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def literal(text: str) -> str:
    """Return a name as matplotlib draws it: a dollar sign begins no formula."""
    return short(text).replace("$", r"\$").lstrip("_")


def number(value: Any) -> str:
    """Return a number in four digits, as people write it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    return f"{value:.4g}"
