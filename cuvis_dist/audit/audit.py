"""Which recordings stand out from the rest of the archive, how far, and why?

Each group is compared with all the others; those that stand out are left out of what is usual, and
the rest is judged again, so that one fault does not hide another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cuvis_dist.audit import bands as facts
from cuvis_dist.audit import models
from cuvis_dist.audit.causes import causes_of, facts_of, named
from cuvis_dist.audit.compared import IN_SPREADS, MEASURES, Cause, Compared
from cuvis_dist.audit.features import features_of
from cuvis_dist.audit.groups import FrameStatistics, Group, group_of, grouped
from cuvis_dist.audit.parts import unusual_frames
from cuvis_dist.audit.reference import Reference, axis_of, noise, reference_of
from cuvis_dist.statistics.spread import LEAST_OTHERS, apart, centre_and_spread, limit

#: How often the usual groups are chosen again.
_ROUNDS = 4
#: With fewer groups, their spread is hardly known, and the limit is high.
_FEW = 8
#: With more groups than this, one of them changes nothing about what is usual.
_ALONE = 100


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
    """

    by: str
    rows: tuple[Row, ...]
    remarks: tuple[str, ...]
    limits: dict[str, float] = field(default_factory=dict)


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
    comparison = _Comparison(groups, wavelengths)
    usual = np.ones(len(groups), dtype=bool)
    for _ in range(_ROUNDS):
        found, limits = comparison.judge(usual)
        standing = np.array([row.standing_out for row in found])
        still = standing <= 1
        if still.sum() < max(len(groups) / 2, 1):  # no majority says what is usual
            still = standing <= np.median(standing)
        if np.array_equal(still, usual):
            break
        usual = still
    rows = sorted(found, key=lambda row: -row.standing_out)
    return Audit(by, tuple(rows), tuple(_remarks(groups, comparison, by, wavelengths)), limits)


def _said(count: int, by: str) -> str:
    return f"1 group (by {by}) is" if count == 1 else f"{count} groups (by {by}) are"


def _remarks(
    groups: Sequence[Group], comparison: _Comparison, by: str, wavelengths: np.ndarray | None
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


class _Comparison:
    """All groups, and what was computed of them for one set of bands or another."""

    def __init__(self, groups: Sequence[Group], wavelengths: np.ndarray | None) -> None:
        self.groups, self.wavelengths = groups, wavelengths
        self.live = facts.live_bands(groups)
        self._noise: dict[tuple[int, bytes], np.ndarray] = {}
        self._common: tuple[bytes, Reference] | None = None

    def judge(self, usual: np.ndarray) -> tuple[list[Row], dict[str, float]]:
        """Return a row for each group, given which of them say what is usual, and the limits."""
        compared = [self._compare(i, usual) for i in range(len(self.groups))]
        measured = [c.measures() for c in compared]
        known = [c.features for c in compared if c.features]
        squares = [(f.trace, float((f.mean**2).mean())) for f in known] or [(1.0, 1.0)]
        trace, deviation = map(float, np.median(np.array(squares), axis=0))
        judge = _Judge(measured, usual, (trace, deviation))
        return [self._row(i, c, judge) for i, c in enumerate(compared)], judge.limits()

    def _compare(self, i: int, usual: np.ndarray, group: Group | None = None) -> Compared:
        """Compare a group, or some of its frames, with the other usual groups."""
        group = group or self.groups[i]
        others = [g for j, g in enumerate(self.groups) if usual[j] and j != i]
        constant = facts.constant_bands(group, others, self.live)
        full = facts.saturated_bands(group, others, self.live)
        bands = np.flatnonzero(self.live & ~constant & ~full)
        causes = facts_of(group, constant, full, self.wavelengths)
        if not others or not len(bands):
            return Compared(group, causes)
        alone = len(self.groups) <= _ALONE or not usual[i]
        reference = self._reference(others if alone else self._usual(usual), bands, alone)
        axis = axis_of(bands, self.wavelengths, len(group.mean))
        noises = [self._noise_of(j, bands) for j in map(int, np.flatnonzero(usual)) if j != i]
        features = features_of(group, others, reference, axis, noises)
        known = models.atoms(features, reference.mean, axis)
        return Compared(group, causes, reference, axis, features, known)

    def _usual(self, usual: np.ndarray) -> list[Group]:
        return [g for g, counts in zip(self.groups, usual, strict=True) if counts]

    def _reference(self, others: Sequence[Group], bands: np.ndarray, alone: bool) -> Reference:
        if alone:
            return reference_of(others, bands)
        key = bands.tobytes() + str([g.name for g in others]).encode()
        if self._common is None or self._common[0] != key:
            self._common = key, reference_of(others, bands)
        return self._common[1]

    def _noise_of(self, j: int, bands: np.ndarray) -> np.ndarray:
        key = j, bands.tobytes()
        if key not in self._noise:
            self._noise[key] = noise(self.groups[j], bands)
        return self._noise[key]

    def _row(self, i: int, compared: Compared, judge: _Judge) -> Row:
        away, group = judge.away(i), compared.group
        causes = compared.facts + causes_of(compared, away, judge.context, self.wavelengths)
        # A fact stands out as such, and more than any estimate that is not above the limit.
        standing = max([*away.values(), *(cause.weight for cause in causes)])
        if causes:
            causes = self._of_some_frames(i, compared, judge) or causes
        return Row(
            group.name,
            len(group.frames),
            group.n,
            standing,
            tuple(sorted(causes, key=lambda cause: -cause.weight)),
            compared.figures(),
            away,
            compared.noise(),
            None if compared.features is None else compared.features.mean,
        )

    def _of_some_frames(self, i: int, compared: Compared, judge: _Judge) -> list[Cause]:
        """Return the causes of those frames that stand out, if they are not all of the group's."""
        if compared.reference is None:
            return []
        others = [g for j, g in enumerate(self.groups) if judge.usual[j] and j != i]
        those = unusual_frames(compared.group, others, compared.reference)
        rest = [frame for frame in compared.group.frames if not any(frame is f for f in those)]
        if not those or self._causes(i, rest, judge):  # the others have the same, less plainly
            return []
        found = self._causes(i, those, judge)
        where = f"in {len(those)} of {len(compared.group.frames)} frames"
        return [replace(cause, words=f"{where}: {cause.words}") for cause in found]

    def _causes(self, i: int, frames: Sequence[FrameStatistics], judge: _Judge) -> list[Cause]:
        """Return the causes of some frames of a group, as if they were all of it."""
        part = self._compare(i, judge.usual, group_of(self.groups[i].name, frames))
        away = judge.away(i, part.measures())
        return part.facts + causes_of(part, away, judge.context, self.wavelengths)


class _Judge:
    """Says how far a group is off in units of the limit, by the spread of the usual ones.

    Parameters
    ----------
    measured : sequence of dict
        What was measured of each group, with what sampling alone spreads it by.
    usual : ndarray
        ``[R]`` bool.
    squares : tuple of float and float
        The usual mean squares of whitened pixels, and of the deviations of the mean.
    """

    def __init__(
        self,
        measured: Sequence[dict[str, tuple[float, float]]],
        usual: np.ndarray,
        squares: tuple[float, float],
    ) -> None:
        self.measured, self.usual = measured, usual
        others = int(usual.sum()) - 1
        self.context = others, *squares
        tests = len(measured) * len(MEASURES)
        self.bounds = {name: limit(others, tests, name in IN_SPREADS) for name in MEASURES}

    def away(self, i: int, own: dict[str, tuple[float, float]] | None = None) -> dict[str, float]:
        """Return by measure how far a group is off, or one with other measures in its place."""
        found = {}
        for name, two_sided in MEASURES.items():
            values = np.array([m[name][0] for m in self.measured])
            value, floor = (own or self.measured[i])[name]
            others = values[self.usual & (np.arange(len(values)) != i)]
            z = apart(value, others, floor, IN_SPREADS.get(name, 0.0))
            found[name] = (abs(z) if two_sided else max(z, 0.0)) / self.bounds[name]
        return found

    def limits(self) -> dict[str, float]:
        """Return by name of a figure the value from which on a group stands out."""
        found = {}
        for figure, (name, back) in _FIGURES.items():
            values, floors = np.array([m[name] for m in self.measured])[self.usual].T
            known = np.isfinite(values)
            if known.sum() <= LEAST_OTHERS:
                found[figure] = np.nan
                continue
            centre, spread = centre_and_spread(values)
            far = self.bounds[name] * max(float(spread), float(np.median(floors[known])))
            found[figure] = float(back(float(centre) + far))
        return found


#: Figures that are measures as well, and what makes one of the other.
_FIGURES: dict[str, tuple[str, Callable[[float], float]]] = {
    "mean_shift": ("mean", lambda value: math.exp(value / 2)),
    "affine_invariant": ("covariance", math.exp),
    "outside": ("foreign", float),
}
