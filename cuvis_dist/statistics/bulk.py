"""Which frames, or which pixels, are the bulk of an archive, so that a covariance is the bulk's?

Concentration steps: of any subset take the merged mean and covariance, then keep those units that
lie closest to it. The determinant of the covariance falls with every step until nothing changes;
the best of several starts counts. A unit here is a set of pixels with its moments, a frame or a
single pixel: its distance is the mean squared Mahalanobis distance of its pixels,
``tr(Σ⁻¹ S_f) + (m_f - m)ᵀ Σ⁻¹ (m_f - m)``, which needs no pixel, and the proof for pixels holds for
units of one size as it is. A step that does not lower the determinant, which units of unlike sizes
allow, is the last one.

Source: P. J. Rousseeuw and K. Van Driessen, "A Fast Algorithm for the Minimum Covariance
Determinant Estimator", Technometrics 41(3) (1999): theorem 1, and their reweighting in section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.special import chdtri

from cuvis_dist.statistics.gaps import PLAIN_FAR, PLAIN_UNLIKE, apart, unlike_in_a_band

#: Starts that go through two steps; of the best, those that go on to the end; steps at most.
_STARTS, _BEST, _STEPS = 50, 5, 100
#: With more single pixels than this, so many are looked at first; for each channel at least.
_SOME, _SOME_PER_CHANNEL = 1500, 10
#: Pixels for each channel, at least, of which a bulk is looked for.
PER_CHANNEL = 5
#: Added to the variances, in their own units, so that bands that are the same have an inverse.
_RIDGE = 1e-9


@dataclass(frozen=True)
class Bulk:
    """The units that are close to each other.

    Attributes
    ----------
    core : ndarray
        ``[F]`` bool: so many units whose covariance has the least determinant.
    kept : ndarray
        ``[F]`` bool: the core, and every other unit that is not apart from it.
    distance : ndarray
        ``[F]`` mean squared Mahalanobis distance of each unit's pixels from the core, by the
        number of channels: about 1 for a usual one.
    log_determinants : tuple of float
        Those of the steps that led there; each is smaller than the one before.
    unlike : ndarray
        ``[F]`` of frames, by how much the noise of one band, which the others do not predict, is
        out of line with that of the frame's others: the logarithm of a ratio. 0 is usual.
    band : ndarray
        ``[F]`` which band that is.
    """

    core: np.ndarray
    kept: np.ndarray
    distance: np.ndarray
    log_determinants: tuple[float, ...]
    unlike: np.ndarray = field(default_factory=lambda: np.empty(0))
    band: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=int))


def bulk_of_frames(
    n: Sequence[int] | np.ndarray,
    means: np.ndarray,
    M2: np.ndarray,
    keep: float,
    seed: int = 0,
) -> Bulk:
    """Find the frames whose pixels are the bulk.

    Parameters
    ----------
    n : sequence of int
        ``[F]`` pixels of each frame; those of frames without pixels are kept.
    means, M2 : ndarray
        ``[F, C]`` and ``[F, C, C]`` float64: see :class:`~cuvis_dist.statistics.Moments`.
    keep : float
        The part of the frames that is surely good, above 0.5 and up to 1: so many are kept at
        least. The core is smaller: it leaves out twice as many as may be bad.
    seed : int
        Chooses the starts.

    Raises
    ------
    ValueError
        If ``keep`` is not above 0.5 and up to 1.
    """
    if not 0.5 < keep <= 1:
        raise ValueError(f"keep is {keep}: it must be above 0.5 and up to 1")
    units = _Units(np.asarray(n, dtype=float), means, M2)
    # Frames with content of their own are far off, too: the core needs room to be without them.
    core, dets = _concentrate(units, max(0.5, 2 * keep - 1), seed)
    distance = units.distances(*units.merged(core))
    unlike, band = unlike_in_a_band(units.noise(*units.merged(core)), units.n)
    kept, known = np.ones(len(distance), dtype=bool), units.n > 0
    most = len(kept) - _part(keep, len(kept))
    logs = np.log(np.maximum(distance, 1e-300))
    for values, plain in ((logs, PLAIN_FAR), (-logs, PLAIN_FAR), (unlike, PLAIN_UNLIKE)):
        there = np.flatnonzero(kept & known)
        kept[there[apart(values[there], most - int((~kept).sum()), plain)]] = False
    return Bulk(core, kept, distance, dets, unlike, band)


def bulk_of_pixels(pixels: np.ndarray, keep: float, seed: int = 0) -> Bulk:
    """Find the pixels ``[K, C]`` that are the bulk; see :func:`bulk_of_frames`.

    The core has the part ``keep`` of the pixels, and others are kept as in the source: up to the
    97.5 % quantile of χ², with the core's covariance scaled so that half of the pixels lie within
    the median of χ². So many as in the core are kept at least.
    """
    units = _Units(np.ones(len(pixels)), np.asarray(pixels, dtype=float), None)
    core, dets = _concentrate_many(units, keep, seed)
    distance = units.distances(*units.merged(core))
    kept = distance <= _bound(distance, pixels.shape[1], keep)
    return Bulk(core, kept, distance, dets)


@dataclass(frozen=True, eq=False)
class PixelBulk:
    """Where the bulk of the pixels lies: an ellipsoid.

    Attributes
    ----------
    centre : ndarray
        ``[C]`` float64.
    whiten : ndarray
        ``[C, C]`` float64: ``|(x - centre) @ whiten|²`` is the squared Mahalanobis distance of a
        pixel by the number of channels; half of the pixels are within χ²'s median by it.
    bound : float
        The largest one inside.
    kept : float
        The part of the pixels that it was found from which is inside.
    """

    centre: np.ndarray
    whiten: np.ndarray
    bound: float
    kept: float

    def distance(self, pixels: np.ndarray) -> np.ndarray:
        """Return ``[N]`` the squared distances of pixels ``[N, C]``."""
        apart = (np.asarray(pixels, dtype=float) - self.centre) @ self.whiten
        return np.einsum("nc,nc->n", apart, apart)


def ellipsoid_of(pixels: np.ndarray, keep: float, seed: int = 0) -> PixelBulk:
    """Return the ellipsoid that :func:`bulk_of_pixels` finds, for pixels that it was not given.

    Raises
    ------
    ValueError
        If ``keep`` is not above 0.5 and up to 1, or there are fewer than :data:`PER_CHANNEL`
        pixels for each channel.
    """
    if not 0.5 < keep <= 1:
        raise ValueError(f"keep is {keep}: it must be above 0.5 and up to 1")
    count, channels = pixels.shape
    if count < PER_CHANNEL * channels:
        raise ValueError(
            f"{count} pixels are too few to say where the bulk of {channels} channels is: "
            f"{PER_CHANNEL * channels} are the least"
        )
    units = _Units(np.ones(count), np.asarray(pixels, dtype=float), None)
    core, _ = _concentrate_many(units, keep, seed)
    centre, covariance = units.merged(core)
    distance = units.distances(centre, covariance)
    bound = _bound(distance, channels, keep)
    inside = distance <= bound
    ordered = np.sort(distance)
    last = int(inside.sum())
    if last < count:  # between two pixels, so that rounding moves none of them across
        bound = float(ordered[last - 1] + ordered[last]) / 2
    # The inverse as the distances above have it: both roots of it are equally good.
    whiten = np.linalg.inv(np.linalg.cholesky(covariance)).T / units.scale[:, None]
    scale = chdtri(channels, 0.5) / channels / max(float(np.median(distance)), 1e-300)
    return PixelBulk(
        units.middle + centre * units.scale,
        whiten * np.sqrt(scale / channels),
        bound * scale,
        last / count,
    )


def _bound(distance: np.ndarray, channels: int, keep: float) -> float:
    """Return the largest distance from the core, in its own units, that is kept."""
    median = max(float(np.median(distance)), 1e-300)
    of_chi = chdtri(channels, 0.025) / chdtri(channels, 0.5) * median
    return max(of_chi, float(np.sort(distance)[_part(keep, len(distance)) - 1]))


class _Units:
    """Sets of pixels with their moments, scaled so that channels have about unit variance."""

    def __init__(self, n: np.ndarray, means: np.ndarray, M2: np.ndarray | None) -> None:
        self.n = n
        within = 0.0 if M2 is None else np.einsum("fcc->c", M2)
        middle = np.median(means[n > 0], axis=0) if (n > 0).any() else means.mean(axis=0)
        total = within + n @ (means - middle) ** 2
        scale = np.sqrt(total / max(1.0, n.sum()))
        scale = np.where(scale > 0, scale, 1.0)
        self.middle, self.scale = middle, scale
        self.means = (means - middle) / scale
        self.M2 = None if M2 is None else M2 / np.outer(scale, scale)

    def merged(self, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return mean ``[C]`` and covariance ``[C, C]`` of the chosen units, divisor n."""
        weights = np.where(chosen, self.n, 0.0)
        total = max(1.0, weights.sum())
        mean = weights @ self.means / total
        apart = self.means[chosen] - mean
        square = (apart * self.n[chosen, None]).T @ apart
        if self.M2 is not None:
            square = square + self.M2[chosen].sum(axis=0)
        covariance = square / total
        covariance[np.diag_indices_from(covariance)] += _RIDGE
        return mean, covariance

    def distances(self, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """Return ``[F]`` mean squared Mahalanobis distances by the number of channels."""
        inverse = np.linalg.inv(covariance)
        apart = self.means - mean
        squares = np.einsum("fc,fc->f", apart @ inverse, apart)
        if self.M2 is not None:
            squares += np.tensordot(self.M2, inverse, axes=2) / np.maximum(self.n, 1)
        return squares / len(mean)

    def noise(self, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
        """Return ``[F, C]`` the mean square of what other bands do not predict of each band.

        It is 1 for pixels with this mean and covariance.
        """
        inverse = np.linalg.inv(covariance)
        squares = ((self.means - mean) @ inverse) ** 2
        if self.M2 is not None:
            within = [((inverse @ M2) * inverse).sum(axis=1) for M2 in self.M2]
            squares += np.array(within) / np.maximum(self.n, 1)[:, None]
        return squares / inverse.diagonal()

    def start(self, rng: np.random.Generator) -> np.ndarray:
        """Choose units at random until their pixels can have a covariance of full rank."""
        order = rng.permutation(np.flatnonzero(self.n > 0))
        enough = int(np.searchsorted(np.cumsum(self.n[order]), self.means.shape[1] + 1)) + 1
        return _those(len(self.n), order[:enough])


def _concentrate(units: _Units, keep: float, seed: int) -> tuple[np.ndarray, tuple[float, ...]]:
    """Return the best core, and the determinants on the way to it."""
    count = len(units.n)
    size = _part(keep, count)
    everything = np.ones(count, dtype=bool)
    if size >= count:
        return everything, (_log_determinant(units, everything),)
    rng = np.random.default_rng(seed)
    starts = [everything, *(units.start(rng) for _ in range(_STARTS))]
    tried = [_steps(units, start, size, 2) for start in starts]
    tried.sort(key=lambda found: found[1][-1])
    ends = [_steps(units, core, size, _STEPS, dets) for core, dets in tried[:_BEST]]
    return min(ends, key=lambda found: found[1][-1])


def _concentrate_many(
    units: _Units, keep: float, seed: int
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Concentrate single pixels: some of them first, and from what is found there all.

    That is how the source does it with many; the starts alone would take most of the time.
    """
    count, channels = units.means.shape
    few = max(_SOME, _SOME_PER_CHANNEL * channels)
    if count <= few or _part(keep, count) >= count:
        return _concentrate(units, keep, seed)
    some = np.sort(np.random.default_rng(seed).permutation(count)[:few])
    core, _ = _concentrate(_Units(units.n[some], units.means[some], None), keep, seed)
    return _steps(units, _those(count, some[core]), _part(keep, count), _STEPS)


def _steps(
    units: _Units, chosen: np.ndarray, size: int, most: int, dets: tuple[float, ...] = ()
) -> tuple[np.ndarray, tuple[float, ...]]:
    """Concentrate until the determinant falls no more; at least one step is from a start."""
    for _ in range(most):
        closest = np.argsort(units.distances(*units.merged(chosen)), kind="stable")[:size]
        after = _those(len(units.n), closest)
        found = _log_determinant(units, after)
        if dets and not found < dets[-1]:
            break
        chosen, dets = after, (*dets, found)
    return chosen, dets


def _part(part: float, count: int) -> int:
    """Return a part of a number, rounded up, but for what rounding has added to it."""
    return int(np.ceil(round(part * count, 6)))


def _those(count: int, chosen: np.ndarray) -> np.ndarray:
    result = np.zeros(count, dtype=bool)
    result[chosen] = True
    return result


def _log_determinant(units: _Units, chosen: np.ndarray) -> float:
    return float(np.linalg.slogdet(units.merged(chosen)[1])[1])
