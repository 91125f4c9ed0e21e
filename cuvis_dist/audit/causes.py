"""What is the likely cause, in words, of how a group stands out?"""

from __future__ import annotations

import numpy as np

from cuvis_dist.audit import models
from cuvis_dist.audit.bands import exchanged
from cuvis_dist.audit.compared import Cause, Compared
from cuvis_dist.audit.facts import FACT, named, percent, signed
from cuvis_dist.audit.features import OUTSIDE, Features, relative_covariance
from cuvis_dist.audit.reference import Reference
from cuvis_dist.statistics.spread import LEAST_OTHERS

#: A model that explains less of what is unusual is no explanation, or a guess where the latter
#: is so many times the limit that noise makes no difference.
_EXPLAINS, _SURE, _PLAINLY = 0.5, 0.8, 2.0
#: What explains less is given up for bands that are off each in its own way; of some bands, less
#: than nearly all.
_BETTER, _SURELY = 0.65, 0.95
#: Foreign pixels that explain enough are preferred to a model that explains no more than this.
_WHOLLY = 0.9
#: What is so many times as bright or dark is in other units, and so much less noise is smoothed.
_UNITS, _SMOOTHED = 20.0, -0.3
#: Two bands have so little noise, beside the usual, where one predicts the other.
_ALIKE = 0.05
#: With too few others, exchanged bands are named where pixels are so much farther off than usual.
_PLAIN = 5.0
#: Below this part of the usual brightness a recording is called dark.
_DARK = 0.2
#: Squared cosine between the direction in which pixels spread most and that of a gain or offset.
_ALONG = 0.6
#: The noise of one band is unusual by itself if it is so many times as far off as that of others.
_LOCAL = 4.0
#: What is so far off, in units of the limit, tells causes apart where something else is unusual.
_HINT = 0.5
#: Evidence of a gain, an offset or a slope that is this part of another's is as strong.
_AS_MUCH = 0.8
#: From here on a cause is given, as a guess.
_PERHAPS = 0.8


def causes_of(
    compared: Compared,
    away: dict[str, float],
    context: tuple[int, float, float],
    wavelengths: np.ndarray | None,
) -> list[Cause]:
    """Return likely causes of what is unusual about a group, besides what is known of it.

    Parameters
    ----------
    compared : Compared
        The group beside the others.
    away : dict of str to float
        By name of the measure: how far it is off, in units of the limit.
    context : tuple of int, float and float
        How many usual groups it was compared with, and their mean squares of whitened pixels and
        of the deviations of the mean.
    wavelengths : ndarray or None
        ``[C]`` in nm.
    """
    features, reference, group = compared.features, compared.reference, compared.group
    if features is None or reference is None:
        return []
    largest = max(away.values())
    if _PERHAPS < largest <= 1:
        as_unusual = {name: value * 1.001 / largest for name, value in away.items()}
        return [
            cause.guessed(largest)
            for cause in causes_of(compared, as_unusual, context, wavelengths)
        ]
    others, usual_trace, usual = context
    few = others < LEAST_OTHERS
    if largest > 1 or (few and features.trace > _PLAIN * max(1.0, usual_trace)):
        what, places = exchanged(group, reference, max(1.0, usual_trace))
        if what == "rolled":
            places = places[0], len(group.mean) - places[0]
        if what:
            weight = largest if largest > 1 else FACT
            return [_places(what, reference.bands, places, weight, wavelengths)]
    if largest <= 1:
        return []
    return [_likeliest(compared, features, away, usual, wavelengths)]


def _likeliest(
    compared: Compared,
    features: Features,
    away: dict[str, float],
    usual: float,
    wavelengths: np.ndarray | None,
) -> Cause:
    assert compared.reference is not None
    largest = max(away.values())
    fit = models.fit(features, compared.atoms, usual)
    band, by, of_band = models.shifted_band(features, usual)
    some = models.some_bands(features, compared.reference.mean, usual)
    most = max(fit.explained, of_band, some.explained)
    place = named(compared.reference.bands[[band]], wavelengths)
    foreign = _foreign(features, away, usual)
    in_mean = max(away[name] for name in ("gain", "offset", "slope", "mean", "level"))
    explained = most >= _EXPLAINS and away["noise"] < in_mean
    lone = away["mean"] <= 1 and away["offset"] <= 1
    if lone and max(away["noise"], away["level"]) > 1 and _some_noisy(features).any():
        return _noisy(compared, features, away, wavelengths)
    if away["noise"] > 1 and _is_local(features) and not explained:
        return _noisy(compared, features, away, wavelengths)
    plain = max(_EXPLAINS, fit.explained - 0.1 if fit.explained > _WHOLLY else 0)
    if foreign is not None and (in_mean <= 1 or foreign >= plain):
        share = features.outside - OUTSIDE
        return Cause("foreign", f"{percent(share)} foreign pixels", largest)
    if away["noise"] > 1 and (in_mean <= 1 or most < _EXPLAINS):
        return _noisy(compared, features, away, wavelengths)
    if away["stripes"] > _HINT and (stripes := _varying(compared, features, "offset")):
        return Cause("varying", stripes, largest)
    best = max(fit.explained, of_band)
    heard = models.heard(features, some)
    in_some = 1 < some.bands.stop - some.bands.start < len(features.mean)
    least = max(_EXPLAINS, best + 0.02) if heard else max(_SURE, best + 0.1)
    in_some = in_some and some.explained > least
    along = max(away[name] for name in ("gain", "offset", "slope", "mean"))
    if features.level > 0 and away["level"] > max(1, _PLAINLY * along) and most < _EXPLAINS:
        words = f"noise {np.exp(features.level):.3g} times the usual in most bands"
        return Cause("noise", words, largest)
    unlike = away["mean"] > 1 or (along > 1 and fit.explained < _EXPLAINS)
    rough = models.rough(features, compared.reference.mean) if unlike else 0.0
    if in_mean > 1:
        if in_some and (heard or not rough or some.explained > _SURELY):
            return _in_some(compared, some, largest, wavelengths)
        if of_band > max(_EXPLAINS, fit.explained + 0.05):
            return Cause("band", f"{place} shifted by {signed(by, 4)}", largest)
        if fit.explained > _EXPLAINS and not (rough and fit.explained < _BETTER):
            words = _words(compared, fit)
            if fit.explained < _SURE and largest > _PLAINLY:
                words = f"perhaps {words}"
            return Cause("+".join(fit.values), words, largest)
    if features.relative[-1] > 2 and (contrast := _varying(compared, features, "gain")):
        return Cause("varying", contrast, largest)
    if rough:
        words = f"bands differ by {percent(rough)}, each in its own way: another calibration?"
        return Cause("calibration", words, largest)
    if found := _few(compared, features):
        return Cause("foreign", found, largest)
    simple = ("gain", "offset", "slope")  # the first of those that stand out about as much
    first = max(away[name] for name in simple)
    single = next(name for name in simple if away[name] >= _AS_MUCH * first)
    if away[single] > max(1, away["mean"]):  # it is what stands out, beside much that does not
        alone = models.alone(features, compared.atoms, single)
        return Cause(single, f"perhaps {_words(compared, alone)}", largest)
    if in_mean > 1:
        words = (
            f"another mean spectrum, {np.sqrt((features.mean**2).mean()):.2g} times the usual "
            "spread: other content, or a fault of no simple form"
        )
        return Cause("mean", words, largest)
    return Cause("covariance", "other correlations between bands: other content?", largest)


def _in_some(
    compared: Compared,
    some: models.Some,
    largest: float,
    wavelengths: np.ndarray | None,
) -> Cause:
    """Say that neighbouring bands are off together."""
    assert compared.reference is not None
    where = named(compared.reference.bands[some.bands], wavelengths)
    change = f"{1 + some.value:.3g}" if some.what == "gain" else signed(some.value)
    return Cause("band", f"{some.what} {change} in {where}", largest)


def _foreign(features: Features, away: dict[str, float], usual: float) -> float | None:
    """Return what foreign pixels explain of the mean's deviation; None if there are none."""
    if features.cleaned is None or not 0.5 < features.bulk < 2:
        return None
    before, after = models.stacked(features), models.stacked(features, features.cleaned)
    part = min(1.0, float(before @ before - after @ after) / models.excess(features, usual))
    # Where content makes more pixels foreign here and there, they must explain the more.
    seen = away["foreign"] > _HINT or (features.outside > 2 * OUTSIDE and part > _SURE)
    return part if seen else None


def _places(
    what: str,
    bands: np.ndarray,
    places: tuple[int, ...],
    weight: float,
    wavelengths: np.ndarray | None,
) -> Cause:
    """Say how bands have changed places."""
    if what == "swapped":
        return Cause("swapped", f"{named(bands[list(places)], wavelengths)} swapped", weight)
    if what == "reversed":
        return Cause("spectral shift", "bands in reversed order", weight)
    if what == "rolled":
        words = f"the first {places[0]} and the last {places[1]} bands exchanged"
        return Cause("spectral shift", words, weight)
    by = places[0]
    words = f"spectrum shifted by {abs(by)} band{'s' * (abs(by) > 1)} "
    words += "towards the last" if by > 0 else "towards the first"
    return Cause("spectral shift", words, weight)


def _some_noisy(features: Features) -> np.ndarray:
    """Return ``[B]`` bool: the bands with unusual noise, if most have the usual; else none."""
    apart = np.nan_to_num(np.abs(features.noise / features.bands_spread))
    unusual = apart > max(apart.max() / 2, 3)
    if unusual.mean() > 0.5 or np.median(apart) > apart.max() / _LOCAL:
        return np.zeros_like(unusual)
    return unusual


def _noisy(
    compared: Compared,
    features: Features,
    away: dict[str, float],
    wavelengths: np.ndarray | None,
) -> Cause:
    assert compared.reference is not None
    largest = max(away.values())
    some = _some_noisy(features)
    left = features.noise
    everywhere = not some.any()
    if everywhere:
        worst = np.abs(features.bands_noise)
        some = worst > max(worst.max() / 2, 1)
        left = left - features.level - features.tilt * compared.axis
    where = named(compared.reference.bands[some], wavelengths)
    most = left[some][np.abs(left[some]).argmax()] if some.any() else 0.0
    if everywhere and away["level"] > 1 and most * features.level < 0:
        # These bands are only nearer to the usual noise than the others.
        words = f"noise {np.exp(features.level):.3g} times the usual in most bands"
        return Cause("noise", words, largest)
    what = "noisy" if most > 0 else "with little noise"
    pair = np.flatnonzero(some)
    if len(pair) == 2 and np.exp(most) < _ALIKE:
        return Cause("noisy", f"{where} nearly the same: one is a copy?", largest)
    return Cause("noisy", f"{where} {what}: {np.exp(most):.2g} times the usual noise", largest)


def _words(compared: Compared, fit: models.Fit) -> str:
    """Return what a model's parameters mean; the last band is where the slope ends."""
    assert compared.reference is not None
    parts = []
    values = fit.values
    usual = float(compared.reference.mean.mean())
    here = float(compared.group.mean[compared.reference.bands].mean())
    times = here / usual if usual else 1.0
    assert compared.features is not None
    if times > 0 and not 1 / _UNITS < times < _UNITS:
        apart = abs(compared.features.level - np.log(times))
        if apart < 0.3 * abs(np.log(times)):  # they are those of the noise, too
            return f"values {times:.2g} times the usual: other units?"
    if usual > 0 and 0 <= here < _DARK * usual:
        return f"dark: {percent(times)} of the usual brightness"
    if "curve" in values:
        spectrum = compared.reference.mean
        bent = models.bent(spectrum)[[spectrum.argmin(), spectrum.argmax()]]
        ends = bent / np.array([spectrum.min(), spectrum.max()])
        dark, bright = 1 + values["gain"] + values["curve"] * ends
        return f"gain {dark:.3g} where it is dark, {bright:.3g} where bright: gamma, or not linear?"
    if "slope" in values:
        middle = 1 + values.get("gain", 0.0)
        ends = [middle + sign * values["slope"] for sign in (-1, 1)]
        parts.append(
            f"slope over the wavelengths, from gain {ends[0]:.3f} to {ends[1]:.3f}: another lamp"
        )
    elif "gain" in values:
        parts.append(f"gain {1 + values['gain']:.3g} over all bands")
    if "ramp" in values:
        ends = [values["offset"] + sign * values["ramp"] for sign in (-1, 1)]
        first, last = map(signed, ends)
        parts.append(f"offset from {first} in the first band to {last} in the last")
    elif "offset" in values:
        parts.append(f"offset {signed(values['offset'])} over all bands")
    if "noise" in values:
        parts.append(f"noise {1 + values['noise']:.3g} times the usual in all bands")
        if values["noise"] < _SMOOTHED:
            parts[-1] += ": smoothed, or another bandwidth?"
    return ", ".join(parts)


def _varying(compared: Compared, features: Features, what: str) -> str:
    """Say so if the pixels spread along the direction of a gain or an offset."""
    assert compared.reference is not None
    reference = compared.reference
    way = reference.whitened(reference.mean if what == "gain" else np.ones(len(reference.mean)))
    length = float(np.linalg.norm(way))
    more = float(features.relative[-1] - np.median(features.relative))
    if not length or (_widest(compared, reference) @ way / length) ** 2 < _ALONG:
        return ""
    return (
        f"{'a gain' if what == 'gain' else 'an offset'} that varies from pixel to pixel by "
        f"{np.sqrt(more) / length:.3g}: stripes, or some frames"
    )


def _widest(compared: Compared, reference: Reference) -> np.ndarray:
    """Return ``[B]`` the direction in which pixels spread most, relative to the usual."""
    return np.linalg.eigh(relative_covariance(compared.group, reference))[1][:, -1]


def _few(compared: Compared, features: Features) -> str:
    """Say so if pixels of one other kind explain both the mean's shift and the larger spread.

    A part p of the pixels at a distance a moves the mean by p a, and adds p (1 - p) a² to the
    variance along it. No sample is needed, which one pixel in thousands would not be in.
    """
    assert compared.reference is not None
    shift = features.mean * compared.reference.units(compared.group.n)
    along = float(shift @ _widest(compared, compared.reference))
    if along**2 < _ALONG * float(shift @ shift) or features.relative[-1] < 2:
        return ""
    part = along**2 / (along**2 + float(features.relative[-1]) - 1)
    count = part * compared.group.n
    if part > 0.3:
        return ""
    if count < 10:
        return f"about {max(1, round(count))} of {compared.group.n} pixels are extreme"
    return f"{percent(part)} foreign pixels"


def _is_local(features: Features) -> bool:
    """Whether the noise of few bands, and not of most, is unusual."""
    worst = np.sort(np.abs(features.bands_noise))[::-1]
    few = max(1, len(worst) // 10)
    return len(worst) > few and worst[0] > _LOCAL * worst[few]
