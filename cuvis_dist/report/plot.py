"""How does a plot look, and how does it get into a page?

Colours are those of Okabe and Ito (2008) and the map ``cividis`` (Nuñez, Anderton, Renslow 2018),
which people with any kind of colour vision tell apart; runs also differ by the style of the line.
"""

from __future__ import annotations

import base64
import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from warnings import catch_warnings, filterwarnings

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
)  # fmt: skip
#: In this order for what is drawn beside each other.
COLOURS = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, "#000000", "#8A8A8A")
#: Of this run, and of another one beside it.
LINES = ("-", "--")
GREY = "#767676"

_STYLE: Any = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.formatter.limits": (-3, 5),  # longer numbers reach out of the plot
    "axes.formatter.use_mathtext": True,
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
    frame : bool
        Whether its pixels are those of a frame, and may be seen.
    file : str
        Where its data lie, relative to the page; empty where they are not written.
    """

    name: str
    alt: str
    caption: str = ""
    columns: Mapping[str, Sequence[Any] | np.ndarray] = field(default_factory=dict)
    image: str = ""
    wide: bool = False
    frame: bool = False
    file: str = ""

    def csv(self) -> bytes:
        """Return the data as CSV."""
        buffer = io.StringIO(newline="")
        table = csv.writer(buffer, lineterminator="\n")
        table.writerow(self.columns)
        columns = [np.asarray(column).tolist() for column in self.columns.values()]
        table.writerows(zip(*columns, strict=True))
        return buffer.getvalue().encode()


#: An axis that is longer has names at powers of ten alone.
_DECADES = 300
#: Points of a curve that are marked at most.
_MARKED = 70
#: For names in other scripts, on machines that have one of these.
_FURTHER = ("Noto Sans CJK JP", "Noto Sans", "WenQuanYi Zen Hei", "Unifont", "FreeSans")
#: Names of at most so many letters stand in three columns, or in two.
_THREE, _TWO = 22, 36


@cache
def _fonts() -> list[str]:
    """Return the font of plots, which comes with matplotlib, and those of other scripts."""
    return ["DejaVu Sans", *sorted({*_FURTHER} & {*fontManager.get_font_names()})]


@contextmanager
def drawing(
    plot: Plot, size: tuple[float, float] = (5.6, 3.4), pixels: bool = False, fitted: bool = False
) -> Iterator[Figure]:
    """Give a figure to draw on, and make the image of a plot of it in the end.

    What has a label is named below the axes, where it hides nothing.

    Parameters
    ----------
    size : tuple of float
        In inches, of which a page is about eleven wide.
    pixels : bool
        Make it of pixels: smaller where there are many shapes.
    fitted : bool
        Look for room for each label: slow, for what is not one pair of axes.
    """
    with matplotlib.rc_context(_STYLE | {"font.family": _fonts()}), catch_warnings():
        filterwarnings("ignore", "Glyph .* missing")  # what no font has is a box, and in the table
        figure = Figure(figsize=size, layout="constrained" if fitted else None, dpi=110)
        yield figure
        below = _legend(figure)
        if not fitted:
            height = size[1] + 0.19 * max(0, below - 2)  # many names take nothing from the axes
            figure.set_figheight(height)
            figure.subplots_adjust(0.13, (0.5 + 0.19 * below) / height, 0.97, 1 - 0.28 / height)
        buffer = io.BytesIO()
        if pixels:
            FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        else:
            FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
        plot.image = as_address(buffer.getvalue(), "png" if pixels else "svg+xml")


def _legend(figure: Figure) -> int:
    """Name what has a label below the axes; return how many lines that takes."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, text in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(text, handle)
    if not named:
        return 0
    longest = max(map(len, named))
    columns = 3 if longest <= _THREE else 2 if longest <= _TWO else 1
    figure.legend(
        named.values(), named.keys(), loc="lower center", ncols=min(columns, len(named)),
        handlelength=2.0, columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip
    return -(-len(named) // columns)


def as_address(content: bytes, kind: str) -> str:
    """Return an image as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def logarithmic(axis: Axis, finely: bool = False) -> None:
    """Make an axis logarithmic, with numbers as people write them.

    Parameters
    ----------
    finely : bool
        Also name 2 and 5 times the powers of ten, where what is drawn has room for that.
    """
    axes = axis.axes
    axes.set_xscale("log") if axis is axes.xaxis else axes.set_yscale("log")
    low, high = axis.get_data_interval()
    finely = finely and 0 < low <= high <= _DECADES * low
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if finely else (1,)))
    axis.set_major_formatter(FuncFormatter(_tick))
    axis.set_minor_locator(NullLocator())


def _tick(value: float, _: Any) -> str:
    """Return the number at a tick of a logarithmic axis; a power of ten where it is long."""
    exponent = math.floor(math.log10(value) + 1e-9)
    if -3 <= exponent <= 4:
        return f"{value:g}"
    times = value / 10.0**exponent
    return (f"{times:.0f}·" if times > 1.5 else "") + f"$10^{{{exponent}}}$"


def short(text: str, length: int = 60) -> str:
    """Return a name that fits into a plot, shortened in its middle."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def literal(text: str) -> str:
    """Return a name as matplotlib draws it: a dollar sign begins no formula."""
    return short(text).replace("$", r"\$").lstrip("_")


def number(value: Any, digits: int = 4) -> str:
    """Return a number as people write it: rounded to some digits, never as ``1e-05``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f") if abs(value) >= 10_000 else str(value)
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    if value and not -4 <= int(exponent) <= 5:
        times = float(mantissa)
        return (
            ("" if times == 1 else f"{times:g}\u00a0\u00d7\u00a0")
            + "10"
            + exponent_of(int(exponent))
        )
    rounded = float(f"{value:.{digits}g}")
    if abs(rounded) >= 10_000:
        return f"{rounded:,.0f}".replace(",", "\u202f")
    return f"{rounded:g}" if digits <= 6 else f"{rounded:.{digits}g}"


def exponent_of(power: int) -> str:
    """Return a power as it stands above a ten."""
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def several(count: int, what: str) -> str:
    """Return how many there are of something, as in ``1 pass`` and ``2 passes``."""
    many = "" if count == 1 else "es" if what.endswith("s") else "s"
    return f"{number(count)} {what}{many}"


def marker_of(points: int) -> dict[str, Any]:
    """Return how points of a curve are marked: not where they would touch each other."""
    return {"marker": ".", "ms": 3} if points <= _MARKED else {}
