"""Which groups hold pixels outside of the bulk, and what do these do to a fit?

The bulk is looked for in the sample of pixels that a store keeps, by concentration steps
(:mod:`cuvis_dist.statistics.bulk`), so that many outliers do not hide each other. Real pixels have
longer tails than χ², by which one of 40 would be outside: it is the differences between groups, and
what a fit without these pixels would be like, that say something.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri

from cuvis_dist.audit.stored import Stored
from cuvis_dist.initialization.drawing import kept_at
from cuvis_dist.initialization.robust import sampled
from cuvis_dist.statistics.bulk import PixelBulk, ellipsoid_of

#: The part of the pixels that is surely good: as many may be outliers as most archives ever have.
KEEP = 0.75
#: Added to variances in units of those of all pixels, so that bands that are the same do no harm.
_RIDGE = 1e-9


@dataclass(frozen=True)
class Outliers:
    """What is outside of the bulk of the pixels.

    Attributes
    ----------
    sample, of : int
        How many pixels were looked at, of how many.
    outside : float
        The part of them that is outside.
    shares : dict of str to float
        By group, the part of its sampled pixels that is outside, the largest first.
    pixels : dict of str to int
        By group, how many of its pixels are in the sample.
    affine_invariant : float
        The distance of the covariance of all pixels from that of the bulk: the root of the sum of
        squared logarithms of the factors by which variances differ.
    above, above_by_bulk : float
        The part of the pixels above the 97.5 % quantile of χ² by the mean and covariance of all
        pixels, and by those of the bulk.
    """

    sample: int
    of: int
    outside: float
    shares: dict[str, float]
    pixels: dict[str, int]
    affine_invariant: float
    above: float
    above_by_bulk: float

    @property
    def summary(self) -> str:
        """What is outside, and what that does to a fit, in a sentence."""
        return (
            f"{self.outside:.1%} of {self.sample:,} sampled pixels are outside of their bulk; with "
            f"them the covariance is {self.affine_invariant:.2f} away (affine-inv.), and "
            f"{self.above:.1%} of the pixels are above the 97.5 % quantile of χ², "
            f"{self.above_by_bulk:.1%} without"
        )

    def lines(self) -> list[str]:
        """Return what a person is told."""
        most = [(name, share) for name, share in self.shares.items() if share][:3]
        return [
            f"outside  {self.summary}",
            *(f"           {share:.1%}  {name}" for name, share in most),
        ]


def outliers(stored: Stored, groups: Mapping[str, str]) -> Outliers | str:
    """Return which groups hold pixels outside of the bulk; or why nobody can say.

    Parameters
    ----------
    stored : Stored
        What the store knows of the archive.
    groups : mapping of str to str
        By the uid of a frame, the name of its group.
    """
    node, _, port = stored.source.rpartition(".")
    name = kept_at("" if node == "batch" else node, port)
    try:
        sample = sampled(stored.drawn, name)
        values = sample.values[name].astype(np.float64)
        bulk = ellipsoid_of(values, KEEP)
    except ValueError as error:
        return str(error)
    assert stored.archive is not None
    outside = bulk.distance(values) > bulk.bound
    names = [groups[stored.archive.frames[i].uid] for i in sample.frame.tolist()]
    return _said(values, bulk, outside, names, sample.n)


def _said(
    values: np.ndarray, bulk: PixelBulk, outside: np.ndarray, names: Sequence[str], of: int
) -> Outliers:
    counts: dict[str, int] = defaultdict(int)
    out: dict[str, int] = defaultdict(int)
    for name, is_out in zip(names, outside.tolist(), strict=True):
        counts[name] += 1
        out[name] += is_out
    shares = {name: out[name] / n for name, n in counts.items()}
    quantile = chdtri(values.shape[1], 0.025)
    scale = np.where(values.std(axis=0) > 0, values.std(axis=0), 1.0)
    every, inside = _moments(values / scale), _moments(values[~outside] / scale)
    far = [(_squares(values / scale, *of) > quantile).mean() for of in (every, inside)]
    root = np.linalg.inv(np.linalg.cholesky(inside[1]))
    factors = np.linalg.eigvalsh(root @ every[1] @ root.T)
    return Outliers(
        len(values),
        of,
        float(outside.mean()),
        dict(sorted(shares.items(), key=lambda item: (-item[1], item[0]))),
        dict(counts),
        float(np.sqrt((np.log(factors) ** 2).sum())),
        float(far[0]),
        float(far[1]),
    )


def _moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    covariance = np.atleast_2d(np.cov(values.T))
    return values.mean(axis=0), covariance + _RIDGE * np.eye(len(covariance))


def _squares(values: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    white = (values - mean) @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    return np.einsum("nc,nc->n", white, white)
