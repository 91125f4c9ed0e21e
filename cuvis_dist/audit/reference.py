"""What is usual in the rest of an archive: mean spectrum, correlations, and what differs naturally?

Scenes differ from recording to recording by what they show. That moves the mean spectrum along the
directions in which pixels differ, too, and hardly along the others, where there is noise alone. So
means are compared in the eigenvectors of the pixels' covariance within recordings, each in units of
the spread between recordings along it: a shift of all bands that no content makes stands out,
however small it is beside the content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import isotonic_regression

from cuvis_dist.audit.groups import Group
from cuvis_dist.statistics.spread import centre_and_spread

#: Added to the eigenvalues of the correlation matrix, so that bands that are the same have one.
RIDGE = 1e-9


@dataclass(frozen=True)
class Reference:
    """The usual groups, in some of the bands.

    Attributes
    ----------
    bands : ndarray
        ``[B]`` int: which of the bands.
    scale : ndarray
        ``[B]`` standard deviation of a band within groups.
    whiten : ndarray
        ``[B, B]``: ``x / scale @ whiten`` has unit covariance within groups.
    inverse : ndarray
        ``[B, B]`` inverse of the covariance within groups, of ``x``.
    covariance : ndarray
        ``[B, B]`` within groups.
    centre, spread : ndarray
        ``[B]`` of the groups' whitened means: median, and spread from group to group.
    mean : ndarray
        ``[B]`` the spectrum at ``centre``.
    n : float
        Pixels of a usual group.
    """

    bands: np.ndarray
    scale: np.ndarray
    whiten: np.ndarray
    inverse: np.ndarray
    covariance: np.ndarray
    centre: np.ndarray
    spread: np.ndarray
    mean: np.ndarray
    n: float

    @cached_property
    def atoms(self) -> np.ndarray:
        """``[B, B]``: row c is what one unit more in band c adds to the whitened mean."""
        return self.whiten / self.scale[:, None]

    def whitened(self, spectra: np.ndarray) -> np.ndarray:
        """Return spectra ``[..., B]`` in the directions in which pixels have unit variance."""
        return spectra / self.scale @ self.whiten

    def units(self, n: int) -> np.ndarray:
        """Return ``[B]`` how far the whitened mean of a group of n pixels usually is off."""
        return self.spread * np.sqrt(max(1.0, self.n / max(1, n)))


def reference_of(groups: Sequence[Group], bands: np.ndarray) -> Reference:
    """Return what is usual in these groups; there must be one, and no band constant in all."""
    freedom = sum(max(0, g.n - 1) for g in groups)
    covariance = sum((g.M2 for g in groups[1:]), groups[0].M2)[np.ix_(bands, bands)] / max(
        1, freedom
    )
    scale = np.sqrt(np.maximum(covariance.diagonal(), np.finfo(float).tiny))
    values, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
    order = np.argsort(values)[::-1]
    values, vectors = np.maximum(values[order], 0) + RIDGE, vectors[:, order]
    whiten = vectors / np.sqrt(values)
    means = np.stack([g.mean[bands] for g in groups])
    centre, spread = centre_and_spread(means / scale @ whiten)
    typical = float(np.median([g.n for g in groups]))
    floor = 1 / np.sqrt(typical)
    # Content spreads the means along the directions in which pixels differ most: the spread falls.
    # Directions are estimated from few groups, and neighbours lend each other their evidence.
    smooth = isotonic_regression(np.log(np.maximum(spread, floor / 4)), increasing=False).x
    return Reference(
        bands,
        scale,
        whiten,
        (whiten @ whiten.T) / np.outer(scale, scale),
        covariance,
        centre,
        np.maximum(np.exp(smooth), floor),
        centre @ (vectors * np.sqrt(values)).T * scale,
        typical,
    )


def axis_of(bands: np.ndarray, wavelengths: np.ndarray | None, channels: int) -> np.ndarray:
    """Return ``[B]`` where each band lies between the first (-1) and the last (1) of all."""
    along = np.arange(channels, dtype=float) if wavelengths is None else wavelengths.astype(float)
    low, high = float(np.min(along)), float(np.max(along))
    return (2 * (along - low) / (high - low) - 1 if high > low else np.zeros(channels))[bands]
