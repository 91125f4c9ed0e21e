"""How far is a group off, in units of the limit, by the spread of the usual ones?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from cuvis_dist.audit.compared import IN_SPREADS, MEASURES
from cuvis_dist.statistics.spread import LEAST_OTHERS, centre_and_spread, limit, moderated

Measured = dict[str, tuple[float, float]]
"""What was measured of a group by name, with what sampling alone spreads it by."""

#: With more groups than this, one of them changes nothing about what is usual.
ALONE = 50
#: Content has longer tails than normal deviations: with more others the limit falls no further.
_TAILS = 25
#: Of normal deviations such a part is nearer than so many standard deviations.
_TAIL = (0.95, 1.96)
#: Figures that are measures as well, and what makes one of the other.
_FIGURES: dict[str, tuple[str, Callable[[float], float]]] = {
    "mean_shift": ("mean", lambda value: math.exp(value / 2)),
    "affine_invariant": ("covariance", math.exp),
    "outside": ("foreign", lambda value: value**2),
}


class Judge:
    """Says how far a group is off.

    Parameters
    ----------
    measured : sequence of Measured
        What was measured of each group.
    usual : ndarray
        ``[R]`` bool.
    squares : tuple of float and float
        The usual mean squares of whitened pixels, and of the deviations of the mean.
    """

    def __init__(
        self, measured: Sequence[Measured], usual: np.ndarray, squares: tuple[float, float]
    ) -> None:
        self.measured, self.usual = measured, usual
        self.rare: dict[int, bool] = {}  # groups of which it was asked whether it is content
        others = int(usual.sum()) - 1
        self.context = others, *squares
        self.judged = others >= LEAST_OTHERS
        tests = len(measured) * len(MEASURES)
        bound = min(others, _TAILS)
        self.bounds = {name: limit(bound, tests, name in IN_SPREADS) for name in MEASURES}
        self._values = np.array([[m[name][0] for name in MEASURES] for m in measured])
        self._known = self._with_tails(usual) if len(measured) > ALONE else None

    def _usual_of(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return centre, spread and number of the values of some groups, by measure."""
        values = self._values[which]
        return *centre_and_spread(values), np.isfinite(values).sum(axis=0)

    def _with_tails(self, which: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the same of many groups, with what is seen of long tails, as content has them.

        The spread is that of a normal distribution with the same 95 % of what is below the limit.
        """
        centres, spreads, counts = self._usual_of(which)
        bounds = np.array([self.bounds[name] for name in MEASURES])
        with np.errstate(all="ignore"):
            far = np.abs(self._values[which] - centres) / spreads
        for k, bound in enumerate(bounds):
            below = far[:, k][far[:, k] <= bound]
            if len(below):
                spreads[k] *= max(1.0, float(np.quantile(below, _TAIL[0])) / _TAIL[1])
        return centres, spreads, counts

    def away(self, i: int, own: Measured | None = None) -> dict[str, float]:
        """Return by measure how far a group is off, or one with other measures in its place."""
        rest = self.usual & (np.arange(len(self.usual)) != i)
        centres, spreads, counts = self._known or self._usual_of(rest)
        found = {}
        for k, (name, two_sided) in enumerate(MEASURES.items()):
            value, floor = (own or self.measured[i])[name]
            if not np.isfinite(value) or counts[k] < LEAST_OTHERS:
                found[name] = 0.0
                continue
            unit = moderated(float(spreads[k]), int(counts[k]), floor, IN_SPREADS.get(name, 0.0))
            z = float(value - centres[k]) / unit
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
