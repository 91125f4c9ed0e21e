"""What is there to show of an audit? Its groups, and who of them stands out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cuvis_dist.audit.audit import Audit, Row
from cuvis_dist.audit.drift import NodeDrift
from cuvis_dist.audit.groups import Group
from cuvis_dist.report.beside import Along, along
from cuvis_dist.statistics.spread import LEAST_OTHERS


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
    def coloured(self) -> list[str]:
        """The names of those that are drawn in colour: all, where nobody can say who is usual."""
        return self.unusual if self.judged else [row.name for row in self.rows]

    @property
    def axis(self) -> Along:
        """Where the bands stand."""
        return along(len(self.groups[self.rows[0].name].mean), self.wavelengths)

    @property
    def judged(self) -> bool:
        """Whether there are enough groups to say what is usual."""
        return len(self.rows) > LEAST_OTHERS

    @property
    def size(self) -> str:
        """How many groups there are, in words."""
        return f"{len(self.rows):,} group{'s' * (len(self.rows) != 1)}"

    @property
    def said(self) -> str:
        """Which groups stand out, as the end of an alternative text."""
        names = self.unusual
        if not names:
            return "None stands out."
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"Standing out: {', '.join(names[:3])}{more}."
