"""How noisy are the bands of a group, beside those of the others?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cuvis_dist.audit.groups import Group
from cuvis_dist.audit.reference import RIDGE
from cuvis_dist.statistics.spread import centre_and_spread, median

#: Bands that are farther off a line, in standard deviations, count less.
_HUBER = 1.5


def noise(group: Group, bands: np.ndarray) -> np.ndarray:
    """Return ``[B]`` the logarithm of each band's noise, or NaN where pixels are too few.

    The noise of a band is what the other bands do not predict of it (R. E. Roger, "Principal
    Components transform with simple, automatic noise adjustment", International Journal of Remote
    Sensing 17(14) (1996)): ``1 / sqrt((Σ⁻¹)_cc)``, here without the bias of a regression on few
    pixels. A gain multiplies it, and content changes it little.
    """
    freedom = group.n - len(bands)
    if freedom < max(20, len(bands) // 2):
        return np.full(len(bands), np.nan)
    covariance = group.covariance[np.ix_(bands, bands)]
    scale = np.sqrt(np.maximum(covariance.diagonal(), np.finfo(float).tiny))
    correlation = covariance / np.outer(scale, scale) + RIDGE * np.eye(len(bands))
    try:
        inverse = np.linalg.inv(correlation).diagonal()
    except np.linalg.LinAlgError:
        return np.full(len(bands), np.nan)
    with np.errstate(all="ignore"):
        return np.log(scale) + 0.5 * np.log((group.n - 1) / freedom / inverse)


def lines(values: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """Fit lines over the spectrum that few bands do not bend (Huber 1964).

    Parameters
    ----------
    values : ndarray
        ``[G, B]``; those that are not finite do not count.
    axis : ndarray
        ``[B]`` places of the bands in [-1, 1].

    Returns
    -------
    ndarray
        ``[G, 2]``: value in the middle of the spectrum, and slope from there to its end; NaN
        where nothing is known.
    """
    seen = np.isfinite(values)
    level = np.where(seen.any(axis=1), median(np.where(seen, values, np.nan).T), np.nan)
    first, last = np.where(seen, axis, np.inf), np.where(seen, axis, -np.inf)
    bent = (last.max(axis=1) > first.min(axis=1)) & (seen.sum(axis=1) >= 4)
    found = np.stack([level, np.where(seen.any(axis=1), 0.0, np.nan)], axis=1)
    if not bent.any():
        return found
    y, x, known = np.where(seen, values, 0)[bent], np.where(seen, axis, 0)[bent], seen[bent]
    a, b = level[bent], np.zeros(bent.sum())
    for _ in range(8):
        size = np.abs(y - a[:, None] - b[:, None] * x)
        middle = median(np.where(known, size, np.nan).T)
        near = _HUBER * np.maximum(1.4826 * middle, 1e-6)
        weights = known * np.minimum(1, near[:, None] / np.maximum(size, 1e-300))
        s0, s1, s2 = (np.einsum("gb,gb->g", weights, x**k) for k in (0, 1, 2))
        t0, t1 = (np.einsum("gb,gb,gb->g", weights, y, x**k) for k in (0, 1))
        determinant = s0 * s2 - s1**2
        a, b = (t0 * s2 - t1 * s1) / determinant, (t1 * s0 - t0 * s1) / determinant
    found[bent] = np.stack([a, b], axis=1)
    return found


class Noise:
    """The noise of a group beside that of the others: level, tilt, and what is left.

    Parameters
    ----------
    own : ndarray
        ``[B]`` :func:`noise` of the group.
    others : sequence of ndarray
        ``[B]`` each, of the usual ones without it.
    axis : ndarray
        ``[B]`` places of the bands in [-1, 1].
    pixels : float
        Those of a usual group.
    """

    def __init__(
        self, own: np.ndarray, others: Sequence[np.ndarray], axis: np.ndarray, pixels: float
    ) -> None:
        known = np.stack(others) if len(others) else np.empty((0, len(axis)))
        usual, _ = centre_and_spread(known)
        self._known, self._axis, self._pixels = known - usual, axis, pixels
        self.apart = own - usual
        self.line = lines(self.apart[None], axis)[0]
        self._lines = lines(self._known, axis)

    def spreads(self, n: int) -> tuple[float, float]:
        """Return the spread of level and tilt from group to group, not below that of sampling."""
        _, spread = centre_and_spread(self._lines)
        sampling = 1 / np.sqrt(2 * max(1, n) * max(1, len(self._axis)))
        level, tilt = np.maximum(spread * self._few(n), sampling * np.array([1.0, 1.75]))
        return float(level), float(tilt)

    def bands(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return ``[B]`` each: how far a band is off the line, in spreads, and that spread."""
        left = self.apart - self.line @ self._over()
        if not len(self._known):
            return np.zeros_like(left), np.full_like(left, np.inf)
        _, own = centre_and_spread(self._known - self._lines @ self._over())
        together = float(np.sqrt(np.median(own**2))) if len(own) else 0.0
        floor = 1 / np.sqrt(2 * max(1, self._pixels))
        spread = self._few(n) * np.sqrt((own**2 + together**2) / 2 + floor**2)
        return np.nan_to_num(left / spread), spread

    def _over(self) -> np.ndarray:
        return np.stack([np.ones_like(self._axis), self._axis])

    def _few(self, n: int) -> float:
        return float(np.sqrt(max(1.0, self._pixels / max(1, n))))
