"""Which recordings stand out from the rest of the archive, how far, and why?

Each group is compared with all the others; those that stand out are left out of what is usual, and
the rest is judged again, so that one fault does not hide another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cuvis_dist.audit.compared import Cause
from cuvis_dist.audit.comparison import Comparison
from cuvis_dist.audit.facts import named
from cuvis_dist.audit.groups import FrameStatistics, Group, grouped
from cuvis_dist.audit.judging import Judge
from cuvis_dist.audit.kinds import kind_of
from cuvis_dist.audit.visible import said
from cuvis_dist.statistics.spread import LEAST_OTHERS

#: How often the usual groups are chosen again.
_ROUNDS = 4
#: With fewer groups, their spread is hardly known, and the limit is high.
_FEW = 8


@dataclass(frozen=True)
class Row:
    """What the audit says of one group.

    Attributes
    ----------
    name : str
        The group.
    frames, pixels : int
        How many it has.
    standing_out : float
        The largest of its deviations, in units of the limit: above 1 it is unusual.
    causes : tuple of Cause
        Likely causes, the first one first; empty for a usual group, a guess near the limit.
    figures : dict of str to float
        What was measured, by name.
    away : dict of str to float
        By measure, how far it is off in units of the limit; all 0 where there are too few others.
    noise : ndarray or None
        ``[C]`` the noise of each band in that of the others; NaN where it is not known.
    directions : ndarray or None
        ``[B]`` the shift of the mean along the directions in which pixels differ, the widest
        first, in spreads between groups.
    """

    name: str
    frames: int
    pixels: int
    standing_out: float
    causes: tuple[Cause, ...]
    figures: dict[str, float] = field(default_factory=dict)
    away: dict[str, float] = field(default_factory=dict)
    noise: np.ndarray | None = field(default=None, compare=False, repr=False)
    directions: np.ndarray | None = field(default=None, compare=False, repr=False)

    @property
    def unusual(self) -> bool:
        """Whether somebody should look at it."""
        return self.standing_out > 1


@dataclass(frozen=True)
class Audit:
    """What the audit says of an archive.

    Attributes
    ----------
    by : str
        What makes a group.
    rows : tuple of Row
        The groups, those that stand out most first.
    remarks : tuple of str
        What is to be said of the whole archive.
    limits : dict of str to float
        By name of a figure, the value above which a group stands out; NaN with too few groups.
    could_see : dict of str to (float, float)
        By fault the size from which on it stands out, in one group and in all, see
        :func:`~cuvis_dist.audit.visible.visible`; empty with too few groups.
    """

    by: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    limits: dict[str, float] = field(default_factory=dict)
    could_see: dict[str, tuple[float, float]] = field(default_factory=dict)


def audit(
    frames: Sequence[FrameStatistics],
    by: str = "recording",
    wavelengths: np.ndarray | None = None,
) -> Audit:
    """Compare every group of frames with the others.

    Parameters
    ----------
    frames : sequence of FrameStatistics
        All of one port.
    by : str
        ``recording``, ``frame``, or a field of the universe.
    wavelengths : ndarray, optional
        ``[C]`` in nm.

    Raises
    ------
    InputError
        As :func:`~cuvis_dist.audit.groups.grouped` does.
    """
    groups = grouped(frames, by)
    if wavelengths is not None and len(wavelengths) != len(groups[0].mean):
        wavelengths = None
    comparison, judge = _judged(groups, wavelengths)
    rows = _rows(comparison, judge, groups)
    remarks = _remarks(groups, comparison, by, wavelengths)
    kind = kind_of(comparison.shifts(judge), np.stack([group.mean for group in groups]))
    if kind:
        remarks.append(_alike([rows[groups[i].name] for i in kind]))
        for part in kind, [i for i in range(len(groups)) if i not in kind]:
            some = [groups[i] for i in part]
            comparison, judge = _judged(some, wavelengths)
            rows |= _rows(comparison, judge, some)
    sizes = comparison.visible(judge)
    if sizes:
        remarks.append(said(sizes))
    ordered = sorted(rows.values(), key=lambda row: -row.standing_out)
    return Audit(by, tuple(ordered), tuple(remarks), judge.limits(), sizes)


def _judged(groups: Sequence[Group], wavelengths: np.ndarray | None) -> tuple[Comparison, Judge]:
    """Compare groups, again and again without those that stand out."""
    comparison = Comparison(groups, wavelengths)
    usual = np.ones(len(groups), dtype=bool)
    for _ in range(_ROUNDS):
        judge = comparison.judge(usual)
        if comparison.take_out_extremes(judge):
            judge = comparison.judge(usual)
        standing = np.array([comparison.standing(i, judge) for i in range(len(groups))])
        still = standing <= 1
        if still.sum() < max(len(groups) / 2, 1):  # no majority says what is usual
            still = standing <= np.median(standing)
        if np.array_equal(still, usual):
            break
        usual = still
    return comparison, judge


def _rows(comparison: Comparison, judge: Judge, groups: Sequence[Group]) -> dict[str, Row]:
    rows = [_row(comparison, i, judge, group) for i, group in enumerate(groups)]
    return {row.name: row for row in rows}


def _alike(rows: Sequence[Row]) -> str:
    """Say that some groups are a kind of their own."""
    rows = sorted(rows, key=lambda row: -row.standing_out)
    names = ", ".join(row.name for row in rows[:3])
    if len(rows) > 3:
        names += f" and {len(rows) - 3} more"
    cause = f" ({rows[0].causes[0]})" if rows[0].causes else ""
    return (
        f"{len(rows)} groups are unlike the others and alike{cause}: {names}; they are taken for "
        "another kind, and judged among themselves"
    )


def _row(comparison: Comparison, i: int, judge: Judge, group: Group) -> Row:
    compared, causes = comparison.compared[i], comparison.causes(i, judge)
    return Row(
        group.name,
        len(group.frames),
        group.n,
        comparison.standing(i, judge),
        tuple(causes),
        compared.figures(),
        judge.away(i),
        compared.noise(),
        None if compared.features is None else compared.features.mean,
    )


def _said(count: int, by: str) -> str:
    return f"1 group (by {by}) is" if count == 1 else f"{count} groups (by {by}) are"


def _remarks(
    groups: Sequence[Group], comparison: Comparison, by: str, wavelengths: np.ndarray | None
) -> list[str]:
    remarks = []
    if len(groups) <= LEAST_OTHERS:
        remarks.append(
            f"{_said(len(groups), by)} too few to judge what is usual: only bands that "
            f"are constant, saturated or exchanged are named. {LEAST_OTHERS + 1} are the least"
            + ("; try --by frame" if by != "frame" else "")
        )
    elif len(groups) < _FEW:
        remarks.append(
            f"{len(groups)} groups (by {by}) say little about what is usual: only what is far off "
            "stands out"
        )
    dead = np.flatnonzero(~comparison.live)
    if len(dead):
        remarks.append(f"{named(dead, wavelengths)} constant in most or all of them")
    if not any(len(g.pixels) for g in groups):
        remarks.append("no sample of pixels is kept: foreign and saturated pixels are not seen")
    return remarks
