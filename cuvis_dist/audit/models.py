"""Which gain, offset, slope or noise explains how a group's mean spectrum and noise are off?

Generalised least squares in units of the spread between groups, so that content, which spreads
them, weighs little. A further parameter must explain a part of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cuvis_dist.audit.features import Features

#: What a model may consist of. The first of two that explain as much is taken.
_MODELS = (
    ("gain",),
    ("offset",),
    ("slope",),
    ("noise",),
    ("gain", "offset"),
    ("gain", "slope"),
    ("offset", "slope"),
    ("offset", "ramp"),
    ("gain", "curve"),
)
#: What a further parameter must explain: in squared spreads, and as a part of the whole.
_PENALTY, _PART = 20.0, 0.05
#: A little more noise is more often that of a gain than noise alone: in squared spreads.
_UNLIKELY = 9.0
#: Mean square of deviations that is not far from usual, and what may be left of larger ones.
_USUAL, _REST = 4.0, 0.2
#: With fewer bands a curve fits too much.
_BANDS_OF_A_CURVE = 8
#: In the spread of means along the middle one: a direction along which content moves them.
_WIDE = 2.0
#: A rough deviation: how much of it lies in narrow directions, and how alike neighbours are.
_ROUGH, _SMOOTH = 0.7, 0.6


@dataclass(frozen=True)
class Fit:
    """A model and what it explains.

    Attributes
    ----------
    values : dict of str to float
        ``gain`` minus 1, ``offset`` in the data's units, ``slope``: relative change from the
        middle to the end of the spectrum, ``ramp``: change of the offset from there to there,
        ``curve``: change of the gain where a band is e times as bright as the middle one,
        ``noise``: relative change of the noise alone.
    explained : float
        Part of the squared deviation beyond the usual one, in [0, 1].
    left : float
        Root mean square of what is left, in spreads.
    """

    values: dict[str, float]
    explained: float
    left: float


def stacked(features: Features, mean: np.ndarray | None = None) -> np.ndarray:
    """Return ``[B + 2]``: deviations of the mean, of the noise's level and tilt, in spreads."""
    level, tilt = _linear(features)
    spread = _spreads(features)
    return np.concatenate(
        [features.mean if mean is None else mean, np.nan_to_num([level, tilt]) / spread]
    )


def _linear(features: Features) -> tuple[float, float]:
    """Return the gain minus 1 and the slope that level and tilt of the noise stand for."""
    times = float(np.exp(np.clip(features.level, -20, 20)))
    return times - 1, times * features.tilt


def _spreads(features: Features) -> np.ndarray:
    times = float(np.exp(np.clip(np.nan_to_num(features.level), -20, 20)))
    return np.array([features.level_spread, features.tilt_spread]) * max(times, 1e-3)


def atoms(features: Features, mean: np.ndarray, axis: np.ndarray) -> dict[str, np.ndarray]:
    """Return ``[B + 2]`` by name: what one unit of each parameter adds to :func:`stacked`.

    Parameters
    ----------
    mean : ndarray
        ``[B]`` the usual spectrum.
    axis : ndarray
        ``[B]`` places of the bands in [-1, 1].
    """
    heard = np.isfinite(features.level) / _spreads(features)

    def atom(spectrum: np.ndarray, level: float = 0, tilt: float = 0) -> np.ndarray:
        mean = spectrum @ features.reference.atoms / features.units
        return np.concatenate([mean, np.array([level, tilt]) * heard])

    return {
        "gain": atom(mean, level=1),
        "offset": atom(np.ones_like(mean)),
        "slope": atom(mean * axis, tilt=1),
        "ramp": atom(axis),
        "curve": atom(bent(mean), level=1) * (len(mean) >= _BANDS_OF_A_CURVE),
        "noise": atom(np.zeros_like(mean), level=1),
    }


def bent(mean: np.ndarray) -> np.ndarray:
    """Return ``[B]`` what a gain that grows with the logarithm of brightness adds to a spectrum.

    To first order a power, such as a display's gamma, is a gain and this.
    """
    positive = np.maximum(mean, 1e-3 * np.abs(mean).max() + 1e-300)
    return mean * np.log(positive / np.median(positive))


def evidence(features: Features, known: dict[str, np.ndarray]) -> dict[str, float]:
    """Return by name how many spreads a group is off in the direction of each parameter."""
    y = stacked(features)
    return {name: float(a @ y / max(np.linalg.norm(a), 1e-300)) for name, a in known.items()}


def holds(features: Features, design: np.ndarray) -> bool:
    """Whether a model explains more than the one direction in which a group is farthest off.

    Along a direction in which pixels hardly differ, as where two bands are nearly the same, a fault
    is thousands of spreads: any model has a size that explains this, and most of the whole. The
    right one explains the rest, too, by the same size.

    Parameters
    ----------
    design : ndarray
        ``[B + 2, P]``: what its parameters add to :func:`stacked`; ``[B, P]`` to the mean alone.
    """
    y = stacked(features)[: len(design)]
    top = int(np.argmax(np.abs(features.mean)))
    rest = np.arange(len(y)) != top
    others = float(y[rest] @ y[rest])
    if y[top] ** 2 <= others or others <= _USUAL * len(y):
        return True
    values = np.linalg.lstsq(design, y, rcond=None)[0]
    left = (y - design @ values)[rest]
    return float(left @ left) < _REST * others


def excess(features: Features, usual: float) -> float:
    """Return the squared deviation of a group beyond that of a usual one.

    Parameters
    ----------
    usual : float
        Mean square of the usual groups' deviations, in spreads.
    """
    y = stacked(features)
    total = float(y @ y)
    return max(total - usual * len(y), 0.05 * total, 1e-300)


def fit(features: Features, known: dict[str, np.ndarray], usual: float) -> Fit:
    """Return the model that explains a group best, for its number of parameters."""
    y = stacked(features)
    total, more = float(y @ y), excess(features, usual)
    best: tuple[float, Fit] | None = None
    for names in _MODELS:
        design = np.stack([known[name] for name in names], axis=1)
        if not np.all(np.linalg.norm(design, axis=0) > 0) or not holds(features, design):
            continue
        values = np.linalg.lstsq(design, y, rcond=None)[0]
        rest = y - design @ values
        left = float(rest @ rest)
        cost = left + len(names) * (_PENALTY + _PART * more) + _UNLIKELY * (names == ("noise",))
        if best is None or cost < best[0] - 1e-9 * total:
            found = Fit(
                dict(zip(names, map(float, values), strict=True)),
                min(1.0, (total - left) / more),
                float(np.sqrt(left / len(y))),
            )
            best = cost, found
    return best[1] if best else Fit({}, 0.0, float(np.sqrt(total / max(1, len(y)))))


def alone(features: Features, known: dict[str, np.ndarray], name: str) -> Fit:
    """Return the fit of one parameter, whatever it explains."""
    y, a = stacked(features), known[name]
    value = float(a @ y / max(float(a @ a), 1e-300))
    rest = y - value * a
    return Fit({name: value}, 0.0, float(np.sqrt((rest @ rest) / len(y))))


def shifted_band(features: Features, usual: float) -> tuple[int, float, float]:
    """Return the band whose shift alone explains the mean best, that shift, and its part."""
    lengths = np.einsum("cb,cb->c", features.atoms, features.atoms)
    along = features.atoms @ features.mean
    gains = along**2 / np.maximum(lengths, 1e-300)
    band = int(np.argmax(gains))
    part = min(1.0, float(gains[band]) / excess(features, usual))
    part *= holds(features, features.atoms[[band]].T)
    return band, float(along[band] / lengths[band]), part


@dataclass(frozen=True)
class Some:
    """Neighbouring bands that are off together: which, what of, by how much, and its part."""

    bands: slice
    what: str
    value: float
    explained: float


def some_bands(features: Features, mean: np.ndarray, usual: float) -> Some:
    """Return the neighbouring bands whose gain or offset explains the mean best.

    The sums over all ranges of bands are differences of two running sums, so that a range costs
    nothing to look at.
    """
    y, best = features.mean, Some(slice(0, 0), "gain", 0.0, 0.0)
    more = excess(features, usual)
    for what, spectrum in (("gain", mean), ("offset", np.ones_like(mean))):
        rows = spectrum[:, None] * features.atoms
        sums = np.concatenate([np.zeros((1, len(y))), np.cumsum(rows, axis=0)])
        products, along = sums @ sums.T, sums @ y
        square = products.diagonal()
        lengths = square[:, None] + square[None, :] - 2 * products
        steps = along[None, :] - along[:, None]
        far = np.triu(lengths > 1e-9 * square.max(), 1)
        gains = np.where(far, steps**2 / np.where(far, lengths, 1), 0)
        i, j = map(int, np.unravel_index(int(np.argmax(gains)), gains.shape))
        part = min(1.0, float(gains[i, j]) / more)
        if part > best.explained + 0.02:
            best = Some(slice(i, j), what, float(steps[i, j] / lengths[i, j]), part)
    spectrum = mean if best.what == "gain" else np.ones_like(mean)
    design = spectrum[best.bands] @ features.atoms[best.bands]
    return best if holds(features, design[:, None]) else Some(slice(0, 0), "gain", 0.0, 0.0)


def heard(features: Features, some: Some) -> bool:
    """Whether the noise of some bands is that of their gain, and plainly not the usual one."""
    if some.what != "gain" or some.value <= -1 or some.bands.stop <= some.bands.start:
        return False
    louder = float(np.median(features.noise[some.bands])) - features.level
    plain = abs(louder) > 2 * float(np.median(features.bands_spread[some.bands]))
    return plain and abs(louder - np.log1p(some.value)) < abs(louder) / 2


def rough(features: Features, mean: np.ndarray) -> float:
    """Return by which part of the usual spectrum bands are off, if each is in its own way; else 0.

    Content moves neighbours alike, and along the directions in which pixels differ most: a third of
    them at most, and fewer where the others are noise alone.
    """
    units = features.reference.spread
    first = min(-(-len(mean) // 3), int((units > _WIDE * np.median(units)).sum()))
    narrow = np.where(np.arange(len(mean)) < first, 0, features.mean)
    if len(mean) < 6 or (narrow @ narrow) < _ROUGH * (features.mean @ features.mean):
        return 0.0
    reference = features.reference
    apart = np.linalg.solve(reference.whiten.T, narrow * features.units) * reference.scale
    part = apart / np.maximum(np.abs(mean), 1e-3 * np.abs(mean).max() + 1e-300)
    if part[1:] @ part[:-1] > _SMOOTH * (part @ part):
        return 0.0
    return float(np.sqrt(np.median(part**2)) * 1.4826)
