"""What was found about one group, before anybody has judged whether it is unusual?"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cuvis_dist.audit import models
from cuvis_dist.audit.features import Features
from cuvis_dist.audit.groups import Group
from cuvis_dist.audit.reference import Reference

#: What is looked at, and whether less than usual is unusual, too.
MEASURES = {
    "gain": True,
    "offset": True,
    "slope": True,
    "level": True,
    "mean": False,
    "noise": False,
    "pixels": False,
    "covariance": False,
    "stripes": False,
    "foreign": False,
}
#: Measures in units of the spread between groups, which are spread by a little more than 1.
IN_SPREADS = {"gain": 1.2, "offset": 1.2, "slope": 1.2, "level": 1.2}


@dataclass(frozen=True)
class Cause:
    """A likely cause in words; its weight orders them, and is above 1 where it is no guess."""

    kind: str
    words: str
    weight: float

    def __str__(self) -> str:
        return self.words

    def guessed(self, weight: float) -> Cause:
        """Return it as a guess of such a weight."""
        words = self.words if "perhaps " in self.words else f"perhaps {self.words}"
        return Cause(self.kind, words, weight)


@dataclass(frozen=True)
class Compared:
    """A group beside the usual others.

    Attributes
    ----------
    group : Group
        The group.
    facts : list of Cause
        What is wrong with it whatever the others are like.
    reference, axis, features, atoms
        See :mod:`~cuvis_dist.audit.features` and :mod:`~cuvis_dist.audit.models`; None and empty
        where there is nothing to compare it with.
    """

    group: Group
    facts: list[Cause]
    reference: Reference | None = None
    axis: np.ndarray = field(default_factory=lambda: np.empty(0))
    features: Features | None = None
    atoms: dict[str, np.ndarray] = field(default_factory=dict)

    def measures(self) -> dict[str, tuple[float, float]]:
        """Return by name each value to judge, and what sampling alone spreads it by."""
        if self.features is None or self.reference is None:
            return dict.fromkeys(MEASURES, (np.nan, 0.0))
        f, n = self.features, self.group.n
        along = models.evidence(f, self.atoms)
        sampled = min(len(self.group.pixels), 2000)
        comparable = n > self.reference.n / 2
        return {
            "gain": (along["gain"], 0.5),
            "offset": (along["offset"], 0.5),
            "slope": (along["slope"], 0.5),
            "level": (f.level / f.level_spread, 0.5),
            "mean": (_log((f.mean**2).mean()), 0.1),
            "noise": (_log(np.abs(f.bands_noise).max()), 0.1),
            "pixels": (_log(f.trace), 0.01 + np.sqrt(2 / max(1, n))),
            # The distance of covariances of few pixels is large by itself.
            "covariance": (_log(_as_of(self)) if comparable else np.nan, 0.05),
            "stripes": (_log(f.striped), 2 * np.sqrt(2 / max(1, n))),
            # The root of a share is spread alike wherever it lies.
            "foreign": (float(np.sqrt(f.outside)), 0.5 / np.sqrt(max(1, sampled))),
        }

    def figures(self) -> dict[str, float]:
        """Return what people and programs may want to see of it."""
        group = self.group
        known = {"mean": float(group.mean.mean())}
        if group.minimum is not None and group.maximum is not None:
            known["minimum"] = float(group.minimum.min())
            known["maximum"] = float(group.maximum.max())
        if self.features is None or self.reference is None:
            return known
        f = self.features
        gain, offset, rest = line_between(self.reference.mean, group.mean[self.reference.bands])
        known |= {
            "mean_shift": float(np.sqrt((f.mean**2).mean())),
            "gain": gain,
            "offset": offset,
            "left": rest,
            "noise": float(np.exp(f.level)),
            "affine_invariant": f.affine_invariant,
            "bhattacharyya": f.bhattacharyya,
            "condition": f.condition,
            "outside": f.outside,
        }
        return known

    def noise(self) -> np.ndarray | None:
        """Return ``[C]`` each band's noise in that of the others; NaN where it is not known."""
        if self.features is None or self.reference is None:
            return None
        result = np.full(len(self.group.mean), np.nan)
        result[self.reference.bands] = np.exp(self.features.noise)
        return result


def _as_of(compared: Compared) -> float:
    """Return the affine-invariant distance as if the group had as many pixels as a usual one.

    Sampling n pixels of B bands adds ``B (B + 1) / n`` to its square.
    """
    assert compared.features is not None
    assert compared.reference is not None
    size, square = len(compared.reference.bands), compared.features.affine_invariant**2
    fewer = 1 / max(1, compared.group.n) - 1 / max(1.0, compared.reference.n)
    return float(np.sqrt(max(square - size * (size + 1) * fewer, square / 4)))


def _log(value: float) -> float:
    return float(np.log(max(float(value), 1e-12)))


def line_between(usual: np.ndarray, mean: np.ndarray) -> tuple[float, float, float]:
    """Return gain and offset that lead from one spectrum to the other, and what is left (RMS).

    By least absolute residuals, so that a few bands of their own do not bend the line.
    """
    if len(mean) < 2 or not np.ptp(usual):
        return 1.0, float((mean - usual).mean()), 0.0
    design = np.stack([usual, np.ones_like(usual)], axis=1)
    line = np.linalg.lstsq(design, mean, rcond=None)[0]
    least = 1e-6 * float(np.abs(mean).max() or 1)
    for _ in range(20):
        weights = 1 / np.sqrt(np.maximum(np.abs(mean - design @ line), least))
        line = np.linalg.lstsq(design * weights[:, None], mean * weights, rcond=None)[0]
    rest = mean - design @ line
    return float(line[0]), float(line[1]), float(np.sqrt((rest**2).mean()))
