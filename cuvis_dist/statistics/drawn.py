"""Which pixels does a pass keep, so that what depends on its fits needs no other reading?

Every pixel has a rank, as in :mod:`~cuvis_dist.statistics.sample`. Of each frame those are kept
whose rank is at most a bound that the frame's own number of pixels fixes, so that about the wanted
number is kept of all frames together, and little travels. The sample of the archive is the pixels
whose rank is at most the smallest of these bounds: which they are depends on ranks alone, so that
given how many they are, any set of so many pixels is as likely as any other (a simple random sample
without replacement).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cuvis_dist.statistics.sample import ranks_of


@dataclass(frozen=True)
class Drawn:
    """All of ``n`` pixels of some frames whose rank is at most ``bound``.

    Attributes
    ----------
    n : int
        Number of pixels that they were drawn from.
    bound : float
        In (0, 1].
    rank : ndarray
        ``[K]`` float64, ascending but for a frame alone.
    frame : ndarray
        ``[K]`` int64, each pixel's frame by its position in the archive.
    values : dict of str to ndarray
        ``[K, ...]`` by name: what belongs to each pixel, in the type that it came in.
    constants : dict of str to object
        By name: what belongs to the frames as wholes.
    """

    n: int
    bound: float
    rank: np.ndarray
    frame: np.ndarray
    values: dict[str, np.ndarray] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    def copy(self) -> Drawn:
        """Return the same pixels in memory of their own."""
        values = {name: array.copy() for name, array in self.values.items()}
        return replace(self, rank=self.rank.copy(), frame=self.frame.copy(), values=values)

    def at(self, position: int) -> Drawn:
        """Return the pixels of one frame for another place of that frame in the archive."""
        return replace(self, frame=np.full(len(self.rank), position))

    def thinned(self, expected: float) -> Drawn:
        """Return those that :func:`draw` gives where fewer are expected; of one frame."""
        bound = min(1.0, expected / max(1, self.n))
        few = self.rank <= bound
        values = {name: array[few] for name, array in self.values.items()}
        return replace(self, bound=bound, rank=self.rank[few], frame=self.frame[few], values=values)

    def only(self, names: Collection[str]) -> Drawn:
        """Return the same pixels with only some of what belongs to them and to the frames."""
        values = {name: array for name, array in self.values.items() if name in names}
        constants = {name: value for name, value in self.constants.items() if name in names}
        return replace(self, values=values, constants=constants)

    @property
    def bytes(self) -> int:
        """Size of the pixels."""
        arrays = (self.rank, self.frame, *self.values.values())
        return sum(array.nbytes for array in arrays)


def draw(index: np.ndarray, seed: int, uid: str, expected: float) -> tuple[np.ndarray, Drawn]:
    """Draw about ``expected`` of one frame's pixels.

    Parameters
    ----------
    index : ndarray
        ``[N]`` int64: the indices in the frame of the pixels that count.
    seed : int
        Chooses among samples.
    uid : str
        Identity of the frame, which the ranks depend on.
    expected : float
        How many are drawn on average.

    Returns
    -------
    tuple of ndarray and Drawn
        The indices ``[K]`` of the chosen pixels, ascending, and their ranks.
    """
    bound = min(1.0, expected / max(1, len(index)))
    rank = ranks_of(index, seed, uid)
    chosen = np.flatnonzero(rank <= bound)
    nowhere = np.zeros(len(chosen), dtype=np.int64)
    return index[chosen], Drawn(len(index), bound, rank[chosen], nowhere)


def joined(parts: Sequence[Drawn]) -> Drawn:
    """Return what was drawn from all of these pixels together, in the order of the ranks.

    Raises
    ------
    ValueError
        If what belongs to the frames as wholes is not the same for all of them, or the pixels
        have other channels.
    """
    n, bound = sum(part.n for part in parts), min(part.bound for part in parts)
    full = _with_pixels(parts)
    if not full:
        return replace(parts[0], n=n, bound=bound)
    rank = np.concatenate([part.rank for part in full])
    order = _in_order(rank)
    order = order[rank[order] <= bound]
    values = {
        name: np.concatenate([part.values[name] for part in full]).take(order, axis=0)
        for name in full[0].values
    }
    frame = np.concatenate([part.frame for part in full])[order]
    return Drawn(n, bound, rank[order], frame, values, full[0].constants)


def _in_order(rank: np.ndarray) -> np.ndarray:
    """Return what a stable ``argsort`` does, by a faster one: ranks are hardly ever equal."""
    order = np.argsort(rank)
    if (np.diff(rank[order]) > 0).all():
        return order
    return np.argsort(rank, kind="stable")


def _with_pixels(parts: Sequence[Drawn]) -> list[Drawn]:
    """Return those that have pixels; raises ValueError unless they can be in one sample."""
    full = [part for part in parts if len(part.rank)]
    for part in full[1:]:
        require_alike(full[0], part)
    return full


def require_alike(a: Drawn, b: Drawn) -> None:
    """Raise ValueError unless two sets of pixels can be in one sample."""
    kinds = [{k: (v.shape[1:], v.dtype) for k, v in part.values.items()} for part in (a, b)]
    if kinds[0] != kinds[1]:
        raise ValueError("their pixels are not of one kind")
    for name in a.constants.keys() | b.constants.keys():
        here, there = (np.asarray(part.constants.get(name)) for part in (a, b))
        if not np.array_equal(here, there):
            raise ValueError(f"{name} is not the same for all frames")


class DrawnSample:
    """The sample of an archive, cut into random groups of about the same size.

    Parameters
    ----------
    parts : sequence of Drawn
        Those of the shards, each :func:`joined`, in their order; one at least.
    size : int
        Largest number of pixels: where more were drawn, the smallest ranks count.

    Attributes
    ----------
    n : int
        Number of pixels of the archive that count.
    k : int
        How many of them are in the sample.

    Raises
    ------
    ValueError
        As :func:`joined` does.
    """

    def __init__(self, parts: Sequence[Drawn], size: int) -> None:
        self.parts = _with_pixels(parts)
        self.n = sum(part.n for part in parts)
        ranks = np.concatenate([part.rank for part in parts])
        bound = min(part.bound for part in parts)
        ranks = ranks[ranks <= bound]
        if len(ranks) > size:
            bound = float(np.partition(ranks, size - 1)[size - 1])
        self.bound, self.k = bound, min(size, len(ranks))

    @property
    def fraction(self) -> float:
        """The part of the archive's pixels that is in the sample."""
        return self.k / self.n if self.n else 1.0

    def group(self, number: int, groups: int) -> tuple[dict[str, Tensor], np.ndarray]:
        """Return the pixels of one of so many groups, and the position of each one's frame.

        A group has the pixels of some range of ranks, in the order of their ranks, so that which
        pixels are in it, and in which order, depends on nothing but the ranks.
        """
        low, high = (self.bound * i / groups for i in (number, number + 1))
        if number + 1 == groups:
            high = self.bound
        if number == 0:
            low = -1.0  # a rank may be 0
        runs = [slice(*np.searchsorted(p.rank, (low, high), side="right")) for p in self.parts]
        order = np.argsort(self._together("rank", runs), kind="stable")
        values = {
            name: torch.from_numpy(
                np.concatenate([p.values[name][r] for p, r in zip(self.parts, runs, strict=True)])[
                    order
                ]
            )
            for name in self.parts[0].values
        }
        return values, self._together("frame", runs)[order]

    def _together(self, name: str, runs: Sequence[slice]) -> np.ndarray:
        parts = zip(self.parts, runs, strict=True)
        return np.concatenate([getattr(part, name)[run] for part, run in parts])


def expected_per_frame(size: int, frames: int) -> float:
    """Return how many pixels to draw of each frame, so that ``size`` of all are almost certain.

    Six standard deviations of their number are added; what is too much is left out in the end.
    """
    return (size + 6 * math.sqrt(size)) / frames


def error_of_mean(variance: Tensor, k: int, fraction: float) -> Tensor:
    """Return the standard error of a mean of k pixels, a simple random sample of N.

    ``sqrt((1 - k / N) s² / k)`` with the sample variance s² (divisor k - 1): W. G. Cochran,
    "Sampling Techniques", 3rd ed. 1977, theorem 2.2 and section 2.6. ``1 - k / N`` is the
    correction for a finite population: the mean of all of them has no error.

    Parameters
    ----------
    variance : Tensor
        s², of any shape.
    k : int
        Pixels in the sample.
    fraction : float
        ``k / N``.
    """
    return (variance * ((1 - fraction) / max(1, k))).sqrt()


def error_by_groups(without: Tensor, fraction: float) -> Tensor:
    """Return the standard error of a smooth function of a sample, by leaving out random groups.

    ``sqrt((1 - k / N) (G - 1) / G Σ (θ_g - θ̄)²)``, where ``θ_g`` is the function's value on
    the sample without the g-th of G random groups, and ``θ̄`` their mean: the delete-a-group
    jackknife (K. M. Wolter, "Introduction to Variance Estimation", 2nd ed. 2007, chapter 4, with
    the correction for a finite population of its section 4.3). The error is itself known to a
    part of about ``1 / sqrt(2 (G - 1))``.

    Parameters
    ----------
    without : Tensor
        ``[G, ...]`` the values without each group.
    fraction : float
        ``k / N``.
    """
    groups = len(without)
    squares = (without - without.mean(dim=0)).square().sum(dim=0)
    return (squares * ((1 - fraction) * (groups - 1) / groups)).sqrt()
