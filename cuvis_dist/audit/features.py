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
from cuvis_dist.audit.noise import Noise
from cuvis_dist.audit.reference import RIDGE, Reference

#: Of the others' pixels so many lie outside of the bulk, by definition.
OUTSIDE = 0.01
#: Pixels of a group's sample that are looked at, and the fewest that say anything.
_MOST_PIXELS, LEAST_PIXELS = 2000, 40
#: Other groups whose pixels are looked at, spread over all, and how many pixels of them.
_MOST_GROUPS, _ALL_PIXELS = 40, 10_000


@dataclass(frozen=True)
class Features:
    """One group beside the usual others.

    Attributes
    ----------
    reference : Reference
        The usual others.
    units : ndarray
        ``[B]`` how far the whitened mean of such a group usually is off.
    mean : ndarray
        ``[B]`` the whitened mean minus the usual one, in spreads between groups.
    noise : ndarray
        ``[B]`` the logarithm of each band's noise relative to the usual.
    level, tilt : float
        Its median over the bands, and its slope from the middle to the end of the spectrum.
    level_spread, tilt_spread : float
        Those of the others.
    bands_noise : ndarray
        ``[B]`` what is left of ``noise`` without level and tilt, in spreads between groups.
    bands_spread : ndarray
        ``[B]`` those spreads.
    trace : float
        Mean square of the whitened pixels around the usual mean: 1 where the group is usual.
    relative : ndarray
        ``[B]`` eigenvalues of the covariance relative to the usual one, ascending.
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

    reference: Reference
    units: np.ndarray
    mean: np.ndarray
    noise: np.ndarray
    level: float
    tilt: float
    level_spread: float
    tilt_spread: float
    bands_noise: np.ndarray
    bands_spread: np.ndarray
    trace: float
    relative: np.ndarray
    striped: float
    affine_invariant: float
    bhattacharyya: float
    condition: float
    outside: float
    bulk: float
    cleaned: np.ndarray | None

    @property
    def atoms(self) -> np.ndarray:
        """``[B, B]``: row c is what one unit more in band c adds to ``mean``."""
        return self.reference.atoms / self.units


def features_of(
    group: Group, reference: Reference, noise: Noise, outside: Outside, condition: float
) -> Features:
    """Compare a group with the others.

    Parameters
    ----------
    group : Group
        The one in question.
    reference : Reference
        What :func:`~cuvis_dist.audit.reference.reference_of` says of the usual others.
    noise : Noise
        Its noise beside theirs, in the bands of the reference.
    outside : Outside
        Its pixels beside theirs.
    condition : float
        See :func:`condition_of`.
    """
    units, size = reference.units(group.n), len(reference.bands)
    shift = reference.whitened(group.mean[reference.bands]) - reference.centre
    covariance = relative_covariance(group, reference)
    relative = np.maximum(np.linalg.eigvalsh(covariance), RIDGE)
    offset = reference.whitened(np.ones(size))
    striped = float(offset @ covariance @ offset / (offset @ offset) / np.median(relative))
    affine = float(np.sqrt((np.log(relative) ** 2).sum()))
    apart = shift @ np.linalg.solve(covariance + np.eye(size), shift)
    bhattacharyya = float(apart / 4 + np.log((1 + relative) / 2 / np.sqrt(relative)).sum() / 2)
    of_bands, bands_spread = noise.bands(group.n)
    return Features(
        reference,
        units,
        shift / units,
        noise.apart,
        float(noise.line[0]),
        float(noise.line[1]),
        *noise.spreads(group.n),
        of_bands,
        bands_spread,
        float(relative.sum() + (shift**2).sum()) / size,
        relative,
        striped,
        affine,
        bhattacharyya,
        condition,
        outside.share,
        outside.bulk,
        None if outside.step is None else (shift + outside.step) / units,
    )


def relative_covariance(group: Group, reference: Reference) -> np.ndarray:
    """Return ``[B, B]`` the covariance of a group in the directions of a reference."""
    block = group.covariance[np.ix_(reference.bands, reference.bands)]
    block = block / np.outer(reference.scale, reference.scale)
    block[np.diag_indices_from(block)] += RIDGE
    return reference.whiten.T @ block @ reference.whiten


def condition_of(group: Group, bands: np.ndarray) -> float:
    """Return the condition number of the correlations of some bands."""
    covariance = group.covariance[np.ix_(bands, bands)]
    scale = np.sqrt(np.maximum(covariance.diagonal(), np.finfo(float).tiny))
    values = np.linalg.eigvalsh(covariance / np.outer(scale, scale))
    return float(values[-1] / max(values[0], np.finfo(float).eps))


@dataclass(frozen=True)
class Outside:
    """The pixels of a group that are outside of the bulk.

    Distances are taken from the middle of the group's own sample and in units of their median,
    so that a gain or an offset of all pixels makes none of them foreign.

    Attributes
    ----------
    share : float
        The part of the group's sampled pixels that is outside of the bulk; NaN without a
        sample.
    bulk : float
        The median of the pixels' distances from the group's own middle, in that of the others.
    step : ndarray or None
        ``[B]`` by how much the whitened mean would move without those pixels.
    """

    share: float = np.nan
    bulk: float = np.nan
    step: np.ndarray | None = None

    @classmethod
    def of(cls, group: Group, reference: Reference, bulk: tuple[float, float] | None) -> Outside:
        """Look at the sample of a group, given the others' :func:`bulk_of`."""
        if len(group.pixels) < LEAST_PIXELS or bulk is None:
            return cls()
        usual, bound = bulk
        white, own = _distances(group.pixels, reference, _MOST_PIXELS)
        middle = float(np.median(own))
        far = own / max(middle, RIDGE) > bound
        share = float(far.mean())
        step = None
        if 0 < share < 0.5:
            step = share / (1 - share) * (white.mean(axis=0) - white[far].mean(axis=0))
        return cls(share, middle / max(usual, RIDGE), step)


def bulk_of(groups: Sequence[Group], reference: Reference) -> tuple[float, float] | None:
    """Return the usual median distance of pixels from their middle, and where the bulk ends.

    The latter is in units of the former. None if no group has a sample.
    """
    some = [g for g in groups if len(g.pixels) >= LEAST_PIXELS]
    some = some[:: -(-len(some) // _MOST_GROUPS) or 1]
    if not some:
        return None
    most = max(LEAST_PIXELS, _ALL_PIXELS // len(some))
    rest = [_distances(g.pixels, reference, most)[1] for g in some]
    middles = np.array([np.median(d) for d in rest])
    every = np.concatenate([d / max(m, RIDGE) for d, m in zip(rest, middles, strict=True)])
    return float(np.median(middles)), float(np.quantile(every, 1 - OUTSIDE))


def _distances(
    pixels: np.ndarray, reference: Reference, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return whitened pixels ``[K, B]`` around their own middle, and their squared lengths."""
    white = reference.whitened(pixels[:: -(-len(pixels) // most)][:, reference.bands])
    white = white - np.median(np.ascontiguousarray(white.T), axis=1)
    return white, np.einsum("kb,kb->k", white, white)
