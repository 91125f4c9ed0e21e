"""What is wrong with a group whatever the others are like? Its bands, frames and pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from cuvis_dist.audit.bands import copies, saturated_shares, still_in_some
from cuvis_dist.audit.compared import Cause
from cuvis_dist.audit.groups import FrameStatistics, Group, group_of
from cuvis_dist.statistics.spread import centre_and_spread

#: The weight of what is wrong whatever the others are like, in units of the limit.
FACT = 10.0
#: Bands that one message lists.
_LISTED = 5
#: Frames with fewer values may be alike by chance.
_LEAST_VALUES = 100
#: Pixels that are empty: the least share and number, and how many spreads more than elsewhere.
_EMPTY, _LEAST_EMPTY, _FAR = 0.003, 3, 10
#: In standard deviations of pixels and times: so much farther are values of exchanged bytes.
_WRONG_BYTES = 5.0
#: Pixels that steps between values are looked for in, and how many times the usual they are.
_PIXELS, _STEPS = 1000, 4
#: One of so many others may have the same fault.
_SAME = 4


def facts_of(
    group: Group, constant: np.ndarray, full: np.ndarray, wavelengths: np.ndarray | None
) -> list[Cause]:
    """Return what is wrong with single bands, given which are constant and which saturated."""
    causes = []
    if constant.any():
        still = np.flatnonzero(constant)
        words = f"{named(still, wavelengths)} constant"
        if constant.all() or (group.variance == 0).all():
            words = "all bands constant"
        causes.append(Cause("constant", words, FACT * (1 + len(still) / len(constant))))
    if full.any():
        bands = np.flatnonzero(full)
        share = float(saturated_shares(group)[bands].max())
        top = float(
            (group.maximum if group.maximum is not None else group.pixels.max(axis=0))[bands].max()
        )
        words = f"{named(bands, wavelengths)} saturated: up to {share:.0%} of pixels at {top:g}"
        causes.append(Cause("saturated", words, 1 + (FACT - 1) * min(1, 10 * share)))
    return causes


def broken_bands(
    groups: Sequence[Group], live: np.ndarray, wavelengths: np.ndarray | None
) -> dict[int, tuple[np.ndarray, list[Cause]]]:
    """Return by group the bands that are broken in some frames, or copies, and what to say of them.

    They are not compared with those of other groups.
    """
    found: dict[int, tuple[np.ndarray, list[Cause]]] = {}
    for i, still in still_in_some(groups, live).items():
        bands, count = np.any(still, axis=0), int(still.any(axis=1).sum())
        words = f"{_part(count, groups[i])}{named(np.flatnonzero(bands), wavelengths)} constant"
        weight = 1 + (FACT - 1) * count / len(still)
        found[i] = bands, [Cause("constant", words, weight)]
    for i, pairs in copies(groups, live).items():
        bands, causes = found.get(i, (np.zeros_like(live), []))
        bands[[band for pair in pairs for band in pair]] = True
        words = f"{named(pairs[0], wavelengths)} the same: one is a copy"
        if len(pairs) > 1:
            words += f", and {len(pairs) - 1} more such pair{'s' * (len(pairs) > 2)}"
        found[i] = bands, [*causes, Cause("copied", words, FACT)]
    return found


def named(bands: Sequence[int] | np.ndarray, wavelengths: np.ndarray | None) -> str:
    """Return ``band 3 (462 nm)``, ``bands 3 and 5``, or the range of many."""

    def one(band: int) -> str:
        return f"{band}" + (
            f" ({float(wavelengths[band]):.4g} nm)" if wavelengths is not None else ""
        )

    listed = [int(band) for band in bands]
    if len(listed) == 1:
        return f"band {one(listed[0])}"
    if len(listed) <= _LISTED:
        return f"bands {', '.join(map(one, listed[:-1]))} and {one(listed[-1])}"
    if listed == list(range(listed[0], listed[-1] + 1)):
        return f"bands {one(listed[0])} to {one(listed[-1])}"
    return f"{len(listed)} bands from {one(listed[0])} to {one(listed[-1])}"


def percent(share: float) -> str:
    """Return ``0.5 %``, ``12 %`` or ``100 %``: two digits, never as ``1e+02``."""
    return f"{100 * share:.0f} %" if share >= 0.995 else f"{100 * share:.2g} %"


def signed(value: float, digits: int = 3) -> str:
    """Return ``+0.0029`` or ``+33600``: a few digits, and thousands not as ``+3.36e+04``."""
    rounded = float(f"{value:.{digits}g}")
    return f"{rounded:+.0f}" if 1000 <= abs(rounded) < 1e7 else f"{rounded:+.{digits}g}"


# ---- frames and pixels ---------------------------------------------------------------------


def plain_facts(groups: Sequence[Group], live: np.ndarray) -> dict[int, list[Cause]]:
    """Return what is wrong with frames and pixels of groups, by the group's number.

    Parameters
    ----------
    groups : sequence of Group
        All of the archive.
    live : ndarray
        ``[C]`` bool: the bands that vary in most of them.
    """
    found: dict[int, list[Cause]] = {}
    for look in (_empty_frames, _twice, _empty_pixels, _coarse, _bytes_exchanged):
        for i, cause in look(groups, live).items():
            found.setdefault(i, []).append(cause)
    return found


def _part(count: int, group: Group) -> str:
    return f"in {count} of {len(group.frames)} frames: "


def _empty_frames(groups: Sequence[Group], live: np.ndarray) -> Mapping[int, Cause]:
    """Name the groups some of whose frames are constant; all of them is said of the bands."""
    found = {}
    for i, group in enumerate(groups):
        empty = sum(f.moments.n > 2 and not _variances(f)[live].any() for f in group.frames)
        if live.any() and 0 < empty < len(group.frames):
            words = f"{_part(empty, group)}all bands constant"
            found[i] = Cause("constant", words, FACT)
    return found


def _variances(frame: FrameStatistics) -> np.ndarray:
    return frame.moments.only_diagonal().M2.numpy()


def _twice(groups: Sequence[Group], live: np.ndarray) -> Mapping[int, Cause]:
    """Name the groups with frames that the archive has under another name, too.

    No sensor takes the same picture twice: mean and variance of every band are equal to the bit.
    """
    seen: dict[bytes, list[tuple[int, str]]] = {}
    for i, group in enumerate(groups):
        for frame in group.frames:
            if key := _picture(frame):
                seen.setdefault(key, []).append((i, frame.uid))
    alike: dict[int, list[list[str]]] = {}
    for places in seen.values():
        for i in {i for i, _ in places} if len(places) > 1 else ():
            own = [uid for j, uid in places if j == i]
            alike.setdefault(i, []).append([*own, *(uid for j, uid in places if j != i)])
    found = {}
    for i, sets in alike.items():
        first, other = sets[0][:2]
        words = f"frame {first} is the same as {other}"
        if len(sets) > 1:
            words += f", and {len(sets) - 1} more of this kind"
        share = min(1.0, sum(map(len, sets)) / max(1, len(groups[i].frames)))
        found[i] = Cause("twice", words, 1 + 2 * FACT * share)
    return found


def _picture(frame: FrameStatistics) -> bytes:
    """Return what no two pictures have in common; nothing where values are too few for that."""
    variances = _variances(frame)
    if frame.moments.n * int((variances > 0).sum()) < _LEAST_VALUES:
        return b""
    return frame.moments.mean.numpy().tobytes() + variances.tobytes()


def without_copies(group: Group) -> Group:
    """Return the group with each picture once: copies say nothing more of noise and content."""
    if len(group.frames) < 2:
        return group
    seen: dict[bytes, FrameStatistics] = {}
    kept = [f for f in group.frames if not (key := _picture(f)) or seen.setdefault(key, f) is f]
    return group if len(kept) == len(group.frames) else group_of(group.name, kept)


def empty_pixels(group: Group, live: np.ndarray) -> np.ndarray:
    """Return ``[K]`` bool: the sampled pixels that have one value in all bands."""
    if live.sum() < 3 or not len(group.pixels):
        return np.zeros(len(group.pixels), dtype=bool)
    return np.ptp(group.pixels[:, live], axis=1) == 0


def _without_empty(group: Group, live: np.ndarray) -> Group:
    """Return the group with the pixels of those frames alone that are not constant as a whole."""
    if group.variance[live].any() and len(group.frames) < 2:
        return group
    kept = [f for f in group.frames if _variances(f)[live].any()]
    if len(kept) == len(group.frames):
        return group
    pixels = [f.pixels for f in kept if len(f.pixels)]
    return replace(group, pixels=np.concatenate(pixels) if pixels else group.pixels[:0])


def _empty_pixels(groups: Sequence[Group], live: np.ndarray) -> Mapping[int, Cause]:
    counts = np.array([empty_pixels(_without_empty(g, live), live).sum() for g in groups])
    shares = counts / np.maximum([len(g.pixels) for g in groups], 1)
    centre, spread = centre_and_spread(shares)
    found = {}
    for i in map(int, np.flatnonzero(shares > max(_EMPTY, float(centre + _FAR * spread)))):
        if counts[i] >= _LEAST_EMPTY:
            words = f"{percent(shares[i])} of the pixels are empty: one value in all bands"
            found[i] = Cause("empty", words, 1 + (FACT - 1) * min(1.0, float(10 * shares[i])))
    return found


def _coarse(groups: Sequence[Group], live: np.ndarray) -> Mapping[int, Cause]:
    """Name the groups whose values lie in steps that are much wider than those of most others."""
    known = [i for i, g in enumerate(groups) if len(g.pixels) >= _LEAST_VALUES]
    if len(known) < 3 or not live.any():
        return {}
    count = min(_PIXELS, *(len(groups[i].pixels) for i in known))
    steps = np.array([_steps(groups[i].pixels[:count, live]) for i in known])
    found = {}
    for k, i in enumerate(known):
        others = np.sort(np.delete(steps, k, axis=0), axis=0)
        rest = others[: len(others) - len(others) // _SAME, :2]  # others may have the same fault
        wide = (steps[k, :2] > _STEPS * rest.max(axis=0)).all()
        if wide and steps[k, 2] < others[len(others) // _SAME, 2] / 2:
            usual = float(np.median(others[:, 0]))
            words = f"values in steps of {steps[k, 0]:.3g}, usually {usual:.3g}: fewer bits"
            found[i] = Cause("coarse", words, FACT / 2)
    return found


def _steps(pixels: np.ndarray) -> tuple[float, float, float]:
    """Return the step between values, the same in standard deviations, and the share of values."""
    steps, relative, distinct = [], [], []
    for band in pixels.T[:: -(-pixels.shape[1] // 20)]:
        values = np.unique(band)
        if len(values) > 2:
            steps.append(np.quantile(np.diff(values), 0.1))
            relative.append(steps[-1] / band.std())
            distinct.append(len(values) / len(band))
    if not steps:
        return 0.0, 0.0, 1.0
    return float(np.median(steps)), float(np.median(relative)), float(np.median(distinct))


def _bytes_exchanged(groups: Sequence[Group], live: np.ndarray) -> Mapping[int, Cause]:
    """Name the groups of 16-bit numbers that are like the others once their bytes are exchanged."""
    if len(groups) < 3 or not live.any():
        return {}
    usual = np.median([g.mean[live] for g in groups], axis=0)
    spread = np.sqrt(np.median([g.variance[live] for g in groups], axis=0))
    found = {}
    for i, group in enumerate(groups):
        far = _apart(group.mean[live], usual, spread)
        values = group.pixels[:_PIXELS, live]
        if far < _WRONG_BYTES or len(values) < _LEAST_VALUES or (values != np.rint(values)).any():
            continue
        if values.min() < -(2**15) or values.max() >= 2**16:
            continue
        exchanged = values.astype(np.int64).astype(np.uint16).byteswap()
        for each in exchanged, exchanged.view(np.int16):
            narrow = np.median(each.std(axis=0) / np.maximum(spread, 1e-300)) < _WRONG_BYTES
            if narrow and _apart(each.mean(axis=0), usual, spread) < far / _WRONG_BYTES:
                words = "the two bytes of each value exchanged: another byte order"
                found[i] = Cause("bytes", words, FACT)
    return found


def _apart(mean: np.ndarray, usual: np.ndarray, spread: np.ndarray) -> float:
    return float(np.median(np.abs(mean - usual) / np.maximum(spread, 1e-300)))
