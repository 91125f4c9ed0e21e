"""What distinguishes one group of frames from the rest, in numbers?

Sources: the affine-invariant distance is that of W. Förstner and B. Moonen, "A Metric for
Covariance Matrices" (1999), the root of ``Σ log² λ`` over the eigenvalues of one matrix relative to
the other; the Bhattacharyya distance of two normal distributions is that of K. Fukunaga,
"Introduction to Statistical Pattern Recognition", 2nd ed. 1990, eq. (3.152).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cuvis_dist.audit.groups import Group
from cuvis_dist.audit.reference import RIDGE, Reference, noise
from cuvis_dist.statistics.spread import centre_and_spread

#: Of the others' pixels so many lie outside of the bulk, by definition.
OUTSIDE = 0.01
#: Pixels of a group's sample that are looked at, and the fewest that say anything.
_MOST_PIXELS, LEAST_PIXELS = 2000, 40
#: Other groups whose noise and pixels are looked at, spread over all.
_MOST_GROUPS = 40
#: Bands that are farther off a line, in standard deviations, count less.
_HUBER = 1.5


@dataclass(frozen=True)
class Features:
    """One group beside the usual others.

    Attributes
    ----------
    mean : ndarray
        ``[B]`` the whitened mean minus the usual one, in spreads between groups.
    atoms : ndarray
        ``[B, B]``: row c is what one unit more in band c adds to ``mean``.
    noise : ndarray
        ``[B]`` the logarithm of each band's noise relative to the usual.
    level, tilt : float
        Its median over the bands, and its slope from the middle to the end of the spectrum.
    level_spread, tilt_spread : float
        Those of the others.
    bands_noise : ndarray
        ``[B]`` what is left of ``noise`` without level and tilt, in spreads between groups.
    trace : float
        Mean square of the whitened pixels around the usual mean: 1 where the group is usual.
    relative : ndarray
        ``[B]`` eigenvalues of the covariance relative to the usual one, ascending.
    direction : ndarray
        ``[B]`` whitened direction of the largest of them.
    striped : float
        The variance along an offset of all bands, relative to the usual one and to that along the
        other directions.
    affine_invariant, bhattacharyya, condition : float
        Distances from the others; the condition number of the correlations.
    outside : float
        Share of the sample's pixels that lie outside of the bulk; NaN without a sample.
    bulk : float
        The median of the pixels' distances from the group's own middle, in that of the others.
    cleaned : ndarray or None
        ``mean`` without those pixels.
    """

    mean: np.ndarray
    atoms: np.ndarray
    noise: np.ndarray
    level: float
    tilt: float
    level_spread: float
    tilt_spread: float
    bands_noise: np.ndarray
    trace: float
    relative: np.ndarray
    direction: np.ndarray
    striped: float
    affine_invariant: float
    bhattacharyya: float
    condition: float
    outside: float
    bulk: float
    cleaned: np.ndarray | None


def features_of(
    group: Group,
    others: Sequence[Group],
    reference: Reference,
    axis: np.ndarray,
    noises: Sequence[np.ndarray],
) -> Features:
    """Compare a group with the others.

    Parameters
    ----------
    group : Group
        The one in question.
    others : sequence of Group
        The usual ones without it.
    reference : Reference
        What :func:`~cuvis_dist.audit.reference.reference_of` says of them.
    axis : ndarray
        ``[B]``, see :func:`~cuvis_dist.audit.reference.axis_of`.
    noises : sequence of ndarray
        The noise of the others in the bands of the reference.
    """
    bands, units = reference.bands, reference.units(group.n)
    shift = reference.whitened(group.mean[bands]) - reference.centre
    covariance = _relative(group.covariance, reference)
    relative, vectors = np.linalg.eigh(covariance)
    relative = np.maximum(relative, RIDGE)
    offset = reference.whitened(np.ones(len(bands)))
    striped = float(offset @ covariance @ offset / (offset @ offset) / np.median(relative))
    affine = float(np.sqrt((np.log(relative) ** 2).sum()))
    between = shift @ vectors
    bhattacharyya = float(
        (between**2 / (1 + relative)).sum() / 4
        + np.log((1 + relative) / 2 / np.sqrt(relative)).sum() / 2
    )
    some = slice(None, None, -(-len(others) // _MOST_GROUPS) or 1)
    outside, bulk, cleaned = _outside(group, others[some], reference)
    level = _Noise(group, reference, axis, noises[some])
    return Features(
        shift / units,
        reference.whiten / reference.scale[:, None] / units,
        level.apart,
        *level.line,
        *level.spreads(group.n),
        level.bands(group.n),
        float(relative.sum() + (shift**2).sum()) / len(bands),
        relative,
        vectors[:, -1],
        striped,
        affine,
        bhattacharyya,
        _condition(group.covariance[np.ix_(bands, bands)]),
        outside,
        bulk,
        None if cleaned is None else cleaned / units,
    )


def _relative(covariance: np.ndarray, reference: Reference) -> np.ndarray:
    """Return ``[B, B]`` the covariance in the whitened directions."""
    block = covariance[np.ix_(reference.bands, reference.bands)]
    block = block / np.outer(reference.scale, reference.scale)
    block[np.diag_indices_from(block)] += RIDGE
    return reference.whiten.T @ block @ reference.whiten


def _condition(covariance: np.ndarray) -> float:
    scale = np.sqrt(np.maximum(covariance.diagonal(), np.finfo(float).tiny))
    values = np.linalg.eigvalsh(covariance / np.outer(scale, scale))
    return float(values[-1] / max(values[0], np.finfo(float).eps))


class _Noise:
    """The noise of a group beside that of the others: level, tilt, and what is left."""

    def __init__(
        self, group: Group, reference: Reference, axis: np.ndarray, noises: Sequence[np.ndarray]
    ) -> None:
        known = np.stack(noises) if len(noises) else np.empty((0, len(axis)))
        self.axis = axis
        self.usual, _ = centre_and_spread(known)
        self.known = known - self.usual
        self.apart = noise(group, reference.bands) - self.usual
        self.line = self._line(self.apart)
        self.pixels = reference.n

    def _line(self, apart: np.ndarray) -> tuple[float, float]:
        """Fit a line over the spectrum that few bands do not bend (Huber 1964); (level, tilt)."""
        seen = np.isfinite(apart)
        if not seen.any():
            return np.nan, np.nan
        y, x = apart[seen], self.axis[seen]
        level = float(np.median(y))
        if len(y) < 4 or not np.ptp(x):
            return level, 0.0
        design = np.stack([np.ones_like(x), x], axis=1)
        line = np.array([level, 0.0])
        for _ in range(8):
            size = np.abs(y - design @ line)
            near = _HUBER * max(1.4826 * float(np.median(size)), 1e-6)
            weighted = design * np.minimum(1, near / np.maximum(size, 1e-300))[:, None]
            line = np.linalg.solve(design.T @ weighted, weighted.T @ y)
        return float(line[0]), float(line[1])

    def spreads(self, n: int) -> tuple[float, float]:
        """Return the spread of level and tilt from group to group, not below that of sampling."""
        lines = np.array([self._line(row) for row in self.known]).reshape(-1, 2)
        _, spread = centre_and_spread(lines)
        few = np.sqrt(max(1.0, self.pixels / max(1, n)))
        sampling = 1 / np.sqrt(2 * max(1, n) * max(1, len(self.axis)))
        level, tilt = np.maximum(spread * few, sampling * np.array([1.0, 1.75]))
        return float(level), float(tilt)

    def bands(self, n: int) -> np.ndarray:
        """Return ``[B]`` how far each band is off the line, in spreads."""
        left = self._left(self.apart)
        if not len(self.known):
            return np.zeros_like(left)
        rest = np.stack([self._left(row) for row in self.known])
        _, own = centre_and_spread(rest)
        together = float(np.sqrt(np.median(own**2))) if len(own) else 0.0
        floor = 1 / np.sqrt(2 * max(1, self.pixels))
        few = np.sqrt(max(1.0, self.pixels / max(1, n)))
        return np.nan_to_num(left / few / np.sqrt((own**2 + together**2) / 2 + floor**2))

    def _left(self, apart: np.ndarray) -> np.ndarray:
        level, tilt = self._line(apart)
        return apart - level - tilt * self.axis


def distances(pixels: np.ndarray, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Return whitened pixels ``[K, B]`` around their own middle, and their squared lengths."""
    white = reference.whitened(pixels[:: max(1, len(pixels) // _MOST_PIXELS)][:, reference.bands])
    white = white - np.median(white, axis=0)
    return white, np.einsum("kb,kb->k", white, white)


def _outside(
    group: Group, others: Sequence[Group], reference: Reference
) -> tuple[float, float, np.ndarray | None]:
    """Return the share of foreign pixels, the size of the bulk, and the whitened mean without them.

    Distances are taken from the middle of the group's own sample and in units of their median,
    so that a gain or an offset of all pixels makes none of them foreign.
    """
    nothing = np.nan, np.nan, None
    if len(group.pixels) < LEAST_PIXELS:
        return nothing
    rest = [distances(g.pixels, reference)[1] for g in others if len(g.pixels) >= LEAST_PIXELS]
    if not rest:
        return nothing
    middles = [float(np.median(d)) for d in rest]
    bound = np.quantile(
        np.concatenate([d / max(m, RIDGE) for d, m in zip(rest, middles, strict=True)]),
        1 - OUTSIDE,
    )
    white, own = distances(group.pixels, reference)
    middle = float(np.median(own))
    far = own / max(middle, RIDGE) > bound
    share = float(far.mean())
    shift = reference.whitened(group.mean[reference.bands]) - reference.centre
    cleaned = None
    if 0 < share < 0.5:
        cleaned = shift + share / (1 - share) * (white.mean(axis=0) - white[far].mean(axis=0))
    return share, middle / max(float(np.median(middles)), RIDGE), cleaned
