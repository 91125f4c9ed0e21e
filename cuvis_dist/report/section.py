"""What is a page made of? Sections: a title, what is to be said, tables and plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cuvis_dist.report.kept import Kept
from cuvis_dist.report.plot import Plot


@dataclass
class Table:
    """A table: a heading, the names of the columns, rows of text; whether most are numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]] = field(default_factory=list)
    numbers: bool = False


@dataclass
class Section:
    """A section of the page.

    Attributes
    ----------
    anchor, title : str
        Its address on the page, and what stands above it.
    said : list of str
        Sentences, each a paragraph.
    missing : str
        Why there is nothing to show, in a sentence.
    findings : list of str
        What looks bad about what is shown here.
    tables, plots : list
        What is shown.
    """

    anchor: str
    title: str
    said: list[str] = field(default_factory=list)
    missing: str = ""
    findings: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)


def label(kept: Kept, runs: Sequence[Kept]) -> str:
    """Return which of two runs one is, as the end of a caption; nothing where there is one."""
    return f" ({which(kept, runs)})" if len(runs) > 1 else ""


def which(kept: Kept, runs: Sequence[Kept]) -> str:
    """Return what a run is called beside another one."""
    return "this run" if kept is runs[0] else "the other"
