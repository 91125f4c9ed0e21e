"""How small a fault could an audit have seen in this archive?

Content that differs from recording to recording hides what is small beside it. So a fault is put
into the statistics of a few usual groups, one after the other, and made as large as it has to be to
stand out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from cuvis_dist.audit.groups import Group

#: Groups that are looked at, steps of the search, and how near the limit it ends.
_GROUPS, _STEPS, _NEAR = 5, 8, 0.03
#: Where the search begins and ends; of an offset it is the part of the mean.
_FIRST, _LEAST, _MOST = 0.02, 1e-6, 0.5


def visible(
    groups: Sequence[Group], away: Callable[[int, Group], float], axis: np.ndarray
) -> dict[str, float]:
    """Return by fault the size from which on it stands out, in every group that was tried.

    Parameters
    ----------
    groups : sequence of Group
        The usual ones.
    away : callable
        Says how far one of them is off with other statistics, in units of the limit.
    axis : ndarray
        ``[C]`` places of the bands in [-1, 1].

    Returns
    -------
    dict of str to float
        ``gain`` (minus 1), ``offset`` in the data's units, ``slope`` (at the ends of the spectrum)
        and ``foreign`` (share of pixels with the mean spectrum in reverse); NaN where half as much
        again as the values themselves would not be seen.
    """
    which = np.unique(np.linspace(0, len(groups) - 1, _GROUPS).astype(int))
    level = float(np.mean([np.abs(g.mean).mean() for g in groups])) or 1.0

    def spoilt(group: Group, fault: str, by: float) -> Group:
        if fault == "gain":
            return _changed(group, np.full(len(axis), 1 + by))
        if fault == "offset":
            return _changed(group, np.ones(len(axis)), by * level)
        return _changed(group, 1 + by * axis) if fault == "slope" else _with_foreign(group, by)

    sizes: dict[str, list[float]] = {"gain": [], "offset": [], "slope": [], "foreign": []}
    for i in map(int, which):
        for fault, of_groups in sizes.items():
            for sign in (1,) if fault == "foreign" else (1, -1):

                def far(by: float, i: int = i, fault: str = fault, sign: int = sign) -> float:
                    return away(i, spoilt(groups[i], fault, sign * by))

                of_groups.append(_smallest(far))
    found = {fault: float(np.max(each)) for fault, each in sizes.items()}
    return found | {"offset": found["offset"] * level}


def said(sizes: dict[str, float]) -> str:
    """Return in words what could have been seen."""
    words = {
        "gain": f"a gain of {1 + sizes['gain']:.3g}",
        "offset": f"an offset of {sizes['offset']:.2g}",
        "slope": f"a slope of ±{100 * sizes['slope']:.2g} %",
        "foreign": f"foreign pixels from {100 * sizes['foreign']:.2g} %",
    }
    seen = [words[name] for name, size in sizes.items() if np.isfinite(size)]
    unseen = [name for name, size in sizes.items() if not np.isfinite(size)]
    text = "could see here: " + (", ".join(seen) or "nothing")
    return text + (f"; hidden by content: {', '.join(unseen)}" if unseen else "")


def _smallest(away: Callable[[float], float]) -> float:
    """Return the size of a fault that is at the limit; deviations grow about as sizes do."""
    low, high, size = 0.0, np.inf, _FIRST
    for _ in range(_STEPS):
        far = away(size)
        if abs(far - 1) < _NEAR:
            break
        low, high = (size, high) if far < 1 else (low, size)
        step = size / max(far, 1e-3)
        size = step if low < step < high else (low + min(high, 4 * low)) / 2
        size = min(max(size, _LEAST), _MOST)
        if low >= _MOST:
            return np.nan
    return size


def _changed(group: Group, gain: np.ndarray, offset: float = 0.0) -> Group:
    """Return a group whose bands have another gain and offset."""
    low, high = group.minimum, group.maximum
    return replace(
        group,
        mean=group.mean * gain + offset,
        M2=group.M2 * np.outer(gain, gain),
        minimum=None if low is None else low * gain + offset,
        maximum=None if high is None else high * gain + offset,
        pixels=group.pixels * gain + offset,
    )


def _with_foreign(group: Group, share: float) -> Group:
    """Return a group some of whose pixels are of a spectrum that is the mean one in reverse."""
    foreign, narrow = group.mean[::-1], 0.3
    apart = foreign - group.mean
    pixels = group.pixels.copy()
    count = round(share * len(pixels))
    some = np.linspace(0, len(pixels) - 1, count).astype(int)
    pixels[some] = foreign + narrow * (pixels[some] - group.mean)
    spread = 1 - share + narrow**2 * share
    return replace(
        group,
        mean=group.mean + share * apart,
        M2=group.M2 * spread + group.n * share * (1 - share) * np.outer(apart, apart),
        pixels=pixels,
    )
