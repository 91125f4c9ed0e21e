"""How far is a number from those of the others, in units of their spread?

Nothing else says what is usual in an archive: with millions of correlated pixels every difference
between two recordings is significant.

Sources: the biweight midvariance is that of F. Mosteller and J. W. Tukey, "Data Analysis and
Regression" (1977), chapter 10; D. A. Lax, "Robust Estimators of Scale: Finite-Sample Performance in
Long-Tailed Symmetric Distributions", JASA 80(391) (1985), finds an efficiency of 0.86 or more for
few values, which the degrees of freedom here stand for.
"""

from __future__ import annotations

import numpy as np
from scipy.special import stdtrit

#: With fewer others there is no saying what their spread is.
LEAST_OTHERS = 4
#: How often an archive without a fault may be said to have one, per archive.
_ALPHA = 0.01
#: The part of the degrees of freedom that the robust spread has.
_EFFICIENCY = 0.8
#: So many degrees of freedom count for a spread that is known beforehand.
_KNOWN = 3.0
#: In MADs: what lies farther away does not count.
_CUT = 9.0


def centre_and_spread(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the median and the biweight spread of ``[N, ...]`` along its first axis.

    Values that are not finite are left out. Where more than half of the values are the same, the
    spread is 0.
    """
    values = np.where(np.isfinite(values), values, np.nan)
    with np.errstate(all="ignore"):
        centre = median(values)
        apart = values - centre
        mad = median(np.abs(apart))
        u = apart / np.where(mad > 0, _CUT * mad, 1)
        near = (np.abs(u) < 1) & np.isfinite(u)
        square = np.where(near, u, 0) ** 2
        count = np.isfinite(values).sum(axis=0)
        above = np.sum(np.where(near, apart, 0) ** 2 * (1 - square) ** 4, axis=0)
        below = np.abs(np.sum(near * (1 - square) * (1 - 5 * square), axis=0))
        # The divisor n - 1 in place of n makes up for the centre, as in a variance.
        variance = count**2 / np.maximum(count - 1, 1) * above / np.maximum(below, 1e-300) ** 2
    return centre, np.where((mad > 0) & (count > 1), np.sqrt(variance), 0.0)


def median(values: np.ndarray) -> np.ndarray:
    """Return the median of ``[N, ...]`` along its first axis without NaN; 0 where there is none."""
    if not len(values):
        return np.zeros(values.shape[1:])
    ordered = np.sort(values, axis=0)  # NaN last
    count = np.isfinite(values).sum(axis=0)
    low, high = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, len(values) - 1)
    pick = [np.take_along_axis(ordered, i[None], axis=0)[0] for i in (low, high)]
    return np.nan_to_num((pick[0] + pick[1]) / 2)


def moderated(spread: float, others: int, floor: float, known: float = 0.0) -> float:
    """Return the unit in which a value's distance from the median of others is measured.

    Parameters
    ----------
    spread : float
        That of the others.
    others : int
        How many they are.
    floor : float
        What rounding and sampling alone spread the value by.
    known : float
        What such values are spread by, as far as that is known: few others hardly tell. The spread
        is then that of the others with some values of this one (a moderated t: G. K. Smyth,
        Statistical Applications in Genetics and Molecular Biology 3(1) (2004)), or their own
        where that is larger.
    """
    freedom = _freedom(others)
    both = np.sqrt((freedom * spread**2 + _KNOWN * known**2) / (freedom + _KNOWN)) if known else 0.0
    return float(max(spread, both, floor, 1e-300))


def _freedom(others: int) -> float:
    return max(1.0, _EFFICIENCY * (others - 1))


def limit(others: int, tests: int, known: bool = False) -> float:
    """Return how many spreads a value must be away to be called unusual.

    Parameters
    ----------
    others : int
        How many values the spread was estimated from.
    tests : int
        How many values are looked at in all.
    known : bool
        Whether something is known of the spread: see :func:`moderated`.
    """
    freedom = _freedom(others) + _KNOWN * known
    of_median = np.sqrt(1 + np.pi / 2 / max(1, others))
    return float(-stdtrit(freedom, _ALPHA / 2 / max(1, tests)) * of_median)
