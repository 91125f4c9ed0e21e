"""Is what stands out a kind of its own: many recordings that are unlike the others, and alike?

Two fields, two illuminations: half of an archive stands out from the other half, and nothing is
wrong with it. Such groups are judged among themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cuvis_dist.statistics.spread import LEAST_OTHERS

#: Groups are alike if they are off in the same direction (cosine), and about as far (factor).
_COSINE, _AS_FAR = 0.7, 2.0
#: The least part of the archive that is a kind.
_PART = 1 / 3


def kind_of(shifts: Mapping[int, np.ndarray], means: np.ndarray) -> list[int]:
    """Return the groups that are a kind of their own; none if there are too few.

    Parameters
    ----------
    shifts : mapping of int to ndarray
        By each group that stands out, the shift of its mean, in spreads between the usual ones.
    means : ndarray
        ``[R, C]`` the mean spectra of all groups.
    """
    best: list[int] = []
    for own in shifts.values():
        alike = [
            j
            for j, other in shifts.items()
            if len(other) == len(own)
            and own @ other > _COSINE * np.linalg.norm(own) * np.linalg.norm(other)
            and 1 / _AS_FAR < np.linalg.norm(own) / np.linalg.norm(other) < _AS_FAR
        ]
        best = max(best, alike, key=len)
    usual = [i for i in range(len(means)) if i not in shifts]
    if len(best) <= max(LEAST_OTHERS, _PART * len(means)) or not usual:
        return []
    # Others that stand out are of the kind that they are nearer to, whatever else is wrong.
    theirs, here = np.median(means[usual], axis=0), np.median(means[best], axis=0)
    for i in set(shifts) - set(best):
        there = np.median(np.abs(means[i] - theirs))
        if np.median(np.abs(means[i] - here)) < there / _AS_FAR:
            best.append(i)
    return sorted(best)
