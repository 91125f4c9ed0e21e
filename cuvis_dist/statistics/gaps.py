"""Which frames are a group of their own, apart from all others?

Where frames differ in what they show, there is no saying how far a usual one may be from the bulk:
the gaps between them say it.
"""

from __future__ import annotations

import numpy as np

from cuvis_dist.statistics.spread import centre_and_spread, limit

#: Frames are left out where the logarithms of their distances, or how unlike they are in a band,
#: are so much apart from those of the others.
PLAIN_FAR, PLAIN_UNLIKE = 0.2, 0.5
#: And by so many spreads of all, and so many times the widest gap between those that are kept.
_SPREADS, _WIDER = 3, 1.25
#: Noise, in parts of the usual, below which it makes no difference; and so many usual pixels are
#: added to a frame's.
_NO_NOISE, _USUAL = 1e-3, 30


def apart(values: np.ndarray, most: int, plain: float) -> np.ndarray:
    """Return the places of the largest values that are a group of their own, none or a few.

    Frames differ in what they show, some of them by much: land in a scene of the sea is hundreds of
    times as far off as a usual frame. Their distances have a long tail without a gap, and frames
    that belong together are left together. So a few frames are apart where each is unusual by the
    spread of all, and the gap to the next one is plain, some spreads wide, and wider than every
    other one above the median.

    Parameters
    ----------
    values : ndarray
        ``[F]`` logarithms.
    most : int
        So many are apart at most.
    plain : float
        The least gap.
    """
    centre, spread = centre_and_spread(values)
    unusual = values > float(centre) + limit(len(values) - 1, len(values)) * float(spread)
    least = max(plain, _SPREADS * float(spread))
    order = np.argsort(-values, kind="stable")
    gaps = -np.diff(values[order])[: len(values) // 2]
    found = 0
    for size in range(1, min(most, len(gaps) - 1, int(unusual.sum())) + 1):
        if gaps[size - 1] > max(least, _WIDER * gaps[size:].max()):
            found = size
    return order[:found]


def unlike_in_a_band(noise: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far one band's noise is from what the frame's other bands lead to expect.

    Content moves many bands together, and brighter frames have more noise in all. Two exchanged
    bands, or saturated ones, change what the others predict of these alone.

    Parameters
    ----------
    noise : ndarray
        ``[F, C]`` of each frame the mean square of what other bands do not predict of each band, in
        that of the bulk.
    n : ndarray
        ``[F]`` pixels of each frame.

    Returns
    -------
    tuple of ndarray and ndarray
        ``[F]`` the largest logarithm of a ratio, and the band that it is of.
    """
    usual = np.median(noise[n > 0], axis=0) if (n > 0).any() else noise.mean(axis=0)
    ratio = (noise + _NO_NOISE) / (usual + _NO_NOISE)
    # Few pixels say little: as if some usual ones were among them.
    logs = np.log((n[:, None] * ratio + _USUAL) / (n[:, None] + _USUAL))
    away = np.abs(logs - np.median(logs, axis=1)[:, None])
    return away.max(axis=1), away.argmax(axis=1)
