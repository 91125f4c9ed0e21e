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
_GROUPS, _STEPS, _NEAR = 3, 6, 0.08
#: Where the search begins and ends; of an offset it is the part of the mean.
_FIRST, _LEAST, _MOST = 0.02, 1e-6, 0.5


def visible(
    groups: Sequence[Group], away: Callable[[int, Group], float], axis: np.ndarray
) -> dict[str, tuple[float, float]]:
    """Return by fault the size from which on it stands out, in one of the groups and in all.

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
    dict of str to (float, float)
        ``gain`` (minus 1), ``offset`` in the data's units, ``slope`` (at the ends of the spectrum)
        and ``foreign`` (share of pixels with the mean spectrum in reverse); infinite where half of
        the values themselves would not be seen. In between it depends on the content.
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
    found = {fault: (float(min(each)), max(each)) for fault, each in sizes.items()}
    low, high = found["offset"]
    one = 1 / max(1, min(g.n for g in groups))
    few = max(found["foreign"][0], one), max(found["foreign"][1], one)
    return found | {"offset": (low * level, high * level), "foreign": few}


def said(sizes: dict[str, tuple[float, float]]) -> str:
    """Return in words what would have been seen in any group."""
    seen = []
    for fault, (_, size) in sizes.items():
        percent = f"{100 * size:.2g} %"
        words = {
            "gain": f"a gain of {1 + size:.4g}",
            "offset": f"an offset of {size:.2g}",
            "slope": f"a slope of ±{percent}",
            "foreign": f"{percent} foreign pixels",
        }
        seen.append(words[fault] if np.isfinite(size) else f"no {fault} for sure")
    return f"could see here: {', '.join(seen)}; what is less may be hidden by content"


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
            return np.inf
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
