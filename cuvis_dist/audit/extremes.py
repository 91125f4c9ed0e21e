"""Which few pixels are so extreme that they hide what the rest of a group is like?

One pixel of thousands, a hot one or a bird, moves mean and covariance along a direction in which
pixels hardly differ, and is found in no sample. It is known by what it makes: along one direction
the covariance is much larger than usual, and a single pixel that makes it reaches just as far as
the smallest and largest values of the bands do. More noise, or more such pixels, would not.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from cuvis_dist.audit.features import relative_covariance
from cuvis_dist.audit.groups import Group
from cuvis_dist.audit.reference import Reference

#: How many pixels are taken out.
_MOST = 4
#: The variance along a direction beside that along the fourth widest.
_ISOLATED = 1.5
#: A band shows a pixel that is so many standard deviations away.
_PLAIN = 3.0
#: How far a single pixel may seem to lie, beside how far the extrema do.
_REACHES = (0.85, 1.15)


def without_extremes(group: Group, reference: Reference) -> tuple[Group, int]:
    """Return a group's moments without its extreme pixels, and how many these were."""
    count = 0
    while count < _MOST and (rest := _without_one(group, reference)) is not None:
        group, count = rest, count + 1
    return group, count


def _without_one(group: Group, reference: Reference) -> Group | None:
    if group.minimum is None or group.maximum is None or group.n <= 2 * _MOST:
        return None
    bands = reference.bands
    values, vectors = np.linalg.eigh(relative_covariance(group, reference))
    # Of few pixels, sampling alone makes some eigenvalues large (Marchenko and Pastur 1967).
    sampled = (1 + np.sqrt(len(bands) / group.n)) ** 2
    usual = max(float(values[-min(4, len(values))]), sampled)
    if values[-1] < _ISOLATED * usual:
        return None
    # In bands: the direction, as long as one pixel would have to be to make all that is unusual.
    way = np.linalg.solve(reference.whiten.T, vectors[:, -1]) * reference.scale
    way = way * np.sqrt((values[-1] - usual) * (group.n - 1))
    up, down = group.maximum[bands] - group.mean[bands], group.mean[bands] - group.minimum[bands]
    seen = np.abs(way) > _PLAIN * np.sqrt(group.variance[bands])
    if not seen.any():
        return None
    for sign in (1, -1):
        reach = np.maximum(np.where(sign * way > 0, up, down), 1e-300)
        if _REACHES[0] < float(np.median((np.abs(way) / reach)[seen])) < _REACHES[1]:
            return _taken_out(group, bands, sign * way)
    return None


def _taken_out(group: Group, bands: np.ndarray, way: np.ndarray) -> Group:
    """Return a group without the pixel that is so far from the mean."""
    mean, M2 = group.mean.copy(), group.M2.copy()
    mean[bands] -= way / (group.n - 1)
    M2[np.ix_(bands, bands)] -= np.outer(way, way)
    return replace(group, mean=mean, M2=M2, n=group.n - 1)
