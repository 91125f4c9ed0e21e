"""Which bands of a group are constant, saturated, or in another place? Facts, not estimates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from cuvis_dist.audit.groups import Group
from cuvis_dist.audit.reference import RIDGE, Reference
from cuvis_dist.statistics.spread import centre_and_spread

#: A band's variance beside that of the others is this part of the other bands' where it is dead.
_DEAD = 1e-4
#: A band is saturated where so large a part of the pixels, and so many, have the largest value:
#: more than so many times as many as have any of so many values below it.
_SATURATED, _LEAST_PIXELS, _PILE, _BELOW = 0.005, 15, 3, 20
#: In spreads: the saturation of one recording beside that of the others.
_FAR = 10
#: A band vanishes in some frames where it never comes near that in those of the other groups, but
#: for one that may have the same fault: so little of the usual variance is near.
_LITTLE = 0.1
#: Nor where so many pixels have one value that a frame may have no other.
_PILED = 0.4
#: Such a part of the groups may have the same copied band.
_MANY = 0.25
#: What exchanging or shifting bands must bring back of what is unusual about the correlations.
_EXPLAINED = 0.7
#: The simpler of two explanations is taken if it explains so large a part of what the other does.
_SIMPLER = 0.8


def live_bands(groups: Sequence[Group]) -> np.ndarray:
    """Return ``[C]`` bool: the bands that vary in most of the groups."""
    variances = np.stack([g.variance for g in groups])
    means = np.stack([np.abs(g.mean) for g in groups])
    varies = variances > (1e-9 * means) ** 2
    return varies.mean(axis=0) > 0.5


def still_in_some(groups: Sequence[Group], live: np.ndarray) -> dict[int, np.ndarray]:
    """Return by group ``[F, C]`` bool: bands that are constant in some of its frames, not in all.

    Frames that are constant as a whole do not count; neither do bands that hardly vary in frames of
    other groups, where few different values are usual.
    """
    if all(len(group.frames) < 2 for group in groups):
        return {}
    variances = [_variances(group) for group in groups]
    still = [np.equal(variance, 0) for variance in variances]
    empty = [each[:, live].all(axis=1) for each in still]
    lowest = np.stack(
        [np.where(e[:, None], np.inf, v).min(axis=0) for v, e in zip(variances, empty, strict=True)]
    )
    usual = np.median(np.concatenate(variances), axis=0)
    found = {}
    for i, each in enumerate(still):
        some = each & live & ~empty[i][:, None] & ~each.all(axis=0)
        if some.any() and len(groups) > 2:
            some &= np.sort(np.delete(lowest, i, axis=0), axis=0)[1] > _LITTLE * usual
            for band in np.flatnonzero(some.any(axis=0)):
                piles = [_largest_pile(g.pixels[:, band]) for g in groups if len(g.pixels)]
                some[:, band] &= bool(piles) and np.median(piles) < _PILED
            if some.any():
                found[i] = some
    return found


def _variances(group: Group) -> np.ndarray:
    """Return ``[F, C]`` the variance of each band in each frame; 0 where only rounding is left."""
    moments = [frame.moments.only_diagonal() for frame in group.frames]
    means = np.stack([each.mean.numpy() for each in moments])
    variances = np.stack([each.M2.numpy() / max(1, each.n - 1) for each in moments])
    few = np.array([each.n < _LEAST_PIXELS for each in moments])
    variances[few] = np.inf  # they may be alike by chance
    return np.where(variances <= (1e-9 * means) ** 2, 0.0, variances)


def copies(groups: Sequence[Group], live: np.ndarray) -> dict[int, list[tuple[int, int]]]:
    """Return by group the pairs of bands that have the same values, unless many groups have them.

    Their means, variances and covariance are then equal.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for i, group in enumerate(groups):
        varies = np.flatnonzero(live & (group.variance > (1e-9 * group.mean) ** 2))
        order = varies[np.argsort(group.mean[varies], kind="stable")]
        a, b = order[:-1], order[1:]
        together = group.M2[a, b]
        alike = np.isclose(group.mean[a], group.mean[b], rtol=1e-12, atol=0)
        for M2 in (group.M2[a, a], group.M2[b, b]):
            alike &= np.isclose(M2, together, rtol=1e-9, atol=0)
        if group.n >= _LEAST_PIXELS and alike.any():
            pairs = zip(a[alike].tolist(), b[alike].tolist(), strict=True)
            found[i] = [(min(pair), max(pair)) for pair in pairs]
    every = Counter(pair for pairs in found.values() for pair in pairs)
    rare = {pair for pair, count in every.items() if count <= max(1, _MANY * len(groups))}
    left = {i: sorted(rare.intersection(pairs)) for i, pairs in found.items()}
    return {i: pairs for i, pairs in left.items() if pairs}


def usual_variance(groups: Sequence[Group]) -> np.ndarray | None:
    """Return ``[C]`` the median variance of each band; None where there is no group."""
    return np.median(np.stack([g.variance for g in groups]), axis=0) if groups else None


def constant_bands(group: Group, usual: np.ndarray | None, live: np.ndarray) -> np.ndarray:
    """Return ``[C]`` bool: the bands that are constant here and usually vary."""
    if group.n < 3 or not live.any():
        return np.zeros(len(live), dtype=bool)
    still = group.variance <= (1e-9 * np.abs(group.mean)) ** 2
    if usual is not None:
        with np.errstate(all="ignore"):
            ratio = np.where(live & (usual > 0), group.variance / usual, np.nan)
            still = still | (ratio < _DEAD * np.nanmedian(ratio))
    return still & live


def saturated_shares(group: Group) -> np.ndarray:
    """Return ``[C]`` the share of sampled pixels at the largest value, where they pile up there.

    A sensor that is full gives one value to all that is brighter, so that far more pixels have it
    than the values below it. Elsewhere the share is 0.
    """
    shares = np.zeros(len(group.mean))
    if len(group.pixels) < _LEAST_PIXELS:
        return shares
    top = group.maximum if group.maximum is not None else group.pixels.max(axis=0)
    # A sample is of float32 where the extrema are of float64.
    at_top = group.pixels >= top - 1e-6 * np.abs(top)
    for band in np.flatnonzero(at_top.sum(axis=0) >= _LEAST_PIXELS):
        values, counts = np.unique(group.pixels[:, band][~at_top[:, band]], return_counts=True)
        count = int(at_top[:, band].sum())
        # Two values are those of a band that is hardly there.
        if len(values) > 1 and count > _PILE * counts[-_BELOW:].max():
            shares[band] = count / len(group.pixels)
    return shares


def _largest_pile(values: np.ndarray) -> float:
    return float(np.unique(values, return_counts=True)[1].max()) / len(values)


def saturated_bands(group: Group, others: Sequence[Group], live: np.ndarray) -> np.ndarray:
    """Return ``[C]`` bool: the bands where far more pixels than elsewhere are saturated."""
    shares = saturated_shares(group)
    if not shares.any():
        return np.zeros(len(live), dtype=bool)
    usual = [saturated_shares(g)[shares > 0].max() for g in others]
    centre, spread = centre_and_spread(np.array(usual))
    full = live & (shares > max(_SATURATED, float(centre + _FAR * spread)))
    for band in np.flatnonzero(full):  # where values lie in steps, all pile up everywhere
        piles = [_largest_pile(g.pixels[:, band]) for g in others if len(g.pixels)]
        full[band] = not piles or shares[band] > 2 * np.median(piles)
    return full


def exchanged(group: Group, reference: Reference, usual: float) -> tuple[str, tuple[int, ...]]:
    """Return how bands have changed places, if changing them back mends the group.

    The mean square of whitened pixels around the usual mean is that of their second moments:
    ``tr(Σ⁻¹ S) / B``. With ``v = e_i - e_j``, exchanging bands i and j turns S into
    ``(I - v vᵀ) S (I - v vᵀ)``, so that all pairs follow from three matrices.

    Parameters
    ----------
    group : Group
        The one in question.
    reference : Reference
        The usual others, in some of the bands.
    usual : float
        The usual mean square.

    Returns
    -------
    tuple of (str, tuple of int)
        ``swapped`` and the pair, ``shifted`` and by how many bands, ``rolled`` and how many have
        come to the front, ``reversed``, or nothing.
    """
    bands, P, size = reference.bands, reference.inverse, len(reference.bands)
    covariance, mean = group.covariance[np.ix_(bands, bands)], group.mean[bands]
    apart = mean - reference.mean

    def square(sources: np.ndarray) -> float:
        """Return the mean square with other bands of the group in the place of these."""
        step = group.mean[sources] - reference.mean
        return float(
            np.sum(P * (group.covariance[np.ix_(sources, sources)] + np.outer(step, step)))
        )

    before = square(bands) / size
    if size < 2 or before <= usual:
        return "", ()
    after = _pairs(covariance, P, apart, mean) / size
    i, j = np.unravel_index(int(np.argmin(after)), after.shape)
    found: dict[tuple[str, tuple[int, ...]], float] = {
        ("swapped", (int(min(i, j)), int(max(i, j)))): float(after[i, j])
    }
    channels = len(group.mean)
    found["reversed", ()] = square(channels - 1 - bands) / size / 0.95
    for by in (1, 2, 3):
        for sign in (1, -1) if size >= 4 * by else ():
            left = _shifted(covariance, mean, reference, by * sign)
            found["shifted", (by * sign,)] = left / 0.95
    for by in _rolls(group.mean, reference):
        found["rolled", (by,)] = square((bands + by) % channels) / size / 0.95
    what, best = min(found.items(), key=lambda item: item[1])
    # Shifting the values of one band is simpler than changing places.
    Pa = P @ apart
    one_band = before - float((Pa**2 / P.diagonal()).max()) / size
    explained = np.log(before / max(best, RIDGE))
    simpler = np.log(before / max(one_band, RIDGE)) > _SIMPLER * explained
    if explained < _EXPLAINED * np.log(max(before, RIDGE) / max(usual, RIDGE)) or simpler:
        return "", ()
    return what


def _pairs(C: np.ndarray, P: np.ndarray, apart: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return ``[B, B]``: ``tr(P S')`` with every pair exchanged, infinite on the diagonal."""

    def form(M: np.ndarray) -> np.ndarray:
        d = M.diagonal()
        return d[:, None] + d[None, :] - M - M.T  # vᵀ M v of every pair

    PC, Pa = P @ C, P @ apart
    after = np.trace(PC) - 2 * form(PC) + form(P) * form(C)
    # Of the mean, v times the difference of both bands is taken away.
    step = mean[:, None] - mean[None, :]
    after += apart @ Pa - 2 * step * (Pa[:, None] - Pa[None, :]) + step**2 * form(P)
    after[np.diag_indices_from(after)] = np.inf
    return after


def _rolls(mean: np.ndarray, reference: Reference) -> list[int]:
    """Return by how many bands the spectrum may have been rolled: what brings it back best."""
    back = [np.roll(mean, -by)[reference.bands] for by in range(4, len(mean) - 3)]
    far = [np.abs((each - reference.mean) / reference.scale).sum() for each in back]
    return [4 + int(k) for k in np.argsort(far)[:3]]


def _shifted(covariance: np.ndarray, mean: np.ndarray, reference: Reference, by: int) -> float:
    """Return the mean square where band c is compared with the usual band c - by."""
    size = len(mean)
    here = slice(by, size) if by > 0 else slice(0, size + by)
    there = slice(0, size - by) if by > 0 else slice(-by, size)
    apart = mean[here] - reference.mean[there]
    S = covariance[here, here] + np.outer(apart, apart)
    usual = reference.covariance[there, there]
    scale = reference.scale[there]
    correlation = usual / np.outer(scale, scale) + RIDGE * np.eye(len(scale))
    inverse = np.linalg.inv(correlation) / np.outer(scale, scale)
    return float(np.sum(inverse * S)) / len(apart)
