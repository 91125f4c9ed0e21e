"""Which frames, and which pixels, does phase 1 leave out, so that it is fitted on the bulk?

Those that are far from the bulk, by concentration steps over the statistics of frames, or over a
sample of pixels (:mod:`cuvis_dist.statistics.bulk`). A store has both, so that no cube is read to
find them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cuvis_dist.errors import InputError
from cuvis_dist.initialization.drawing import kept_at
from cuvis_dist.initialization.from_store import Filler
from cuvis_dist.initialization.inside import Inside
from cuvis_dist.initialization.plan import Measurement, Pass
from cuvis_dist.initialization.stored import StoredPass
from cuvis_dist.scaling import Measuring
from cuvis_dist.statistics import Drawn, ExactMoments, Moments
from cuvis_dist.statistics.bulk import bulk_of_frames, ellipsoid_of
from cuvis_dist.statistics.drawn import joined
from cuvis_dist.store import UnusableFileError

#: Pixels of which the bulk is looked for, at most: 200 bands of them take some seconds.
MOST_PIXELS = 1 << 14


def bulk_of(filler: Filler, measuring: Measuring) -> tuple[dict[int, str], Inside | None]:
    """Return what :func:`frames_outside` and then :func:`pixels_inside` do, as far as asked for.

    Parameters
    ----------
    filler : Filler
        It measures what the store lacks of the first pass.
    measuring : Measuring
        Its ``robust`` and ``robust_pixels`` say what to look for.
    """
    stored = filler.stored
    while True:
        try:
            usable = filler.fill()
            outside: dict[int, str] = {}
            if measuring.robust is not None:
                outside = frames_outside(stored, usable, measuring.robust)
            if measuring.robust_pixels is None:
                return outside, None
            kept = [position for position in usable if position not in outside]
            return outside, pixels_inside(stored, kept, measuring.robust_pixels)
        except UnusableFileError:  # it does not count any more: measure what was in it
            continue


def frames_outside(stored: StoredPass, positions: Sequence[int], keep: float) -> dict[int, str]:
    """Return the positions of the frames that are not of the bulk, each with how far it is off.

    Parameters
    ----------
    stored : StoredPass
        The first pass; the store has what it measures of the frames.
    positions : sequence of int
        The frames' positions in the archive.
    keep : float
        The part of the frames that is surely good.

    Returns
    -------
    dict of int to str
        In words. The distance is the mean squared Mahalanobis distance of a frame's pixels, by the
        number of bands: about 1 for frames of the bulk.

    Raises
    ------
    InputError
        If the pass measures no moments, or frames have other channels.
    UnusableFileError
        If a file is damaged, and then set aside, or cannot be read any more.
    """
    key = moments_of(stored.this_pass).key
    # By position: files come in an order of their own, and the starts depend on the order.
    measured: dict[int, Moments] = {}
    for position, statistic, _ in stored.statistics(key, positions):
        if isinstance(statistic, ExactMoments):
            statistic = statistic.rounded()
        assert isinstance(statistic, Moments)
        measured[position] = statistic
    order = sorted(measured)
    if len({measured[i].channels for i in order}) > 1:
        raise InputError("frames have unlike numbers of channels: no bulk of them can be found")
    squares = [measured[i].M2.numpy() for i in order]
    bulk = bulk_of_frames(
        [measured[i].n for i in order],
        np.stack([measured[i].mean.numpy() for i in order]),
        np.stack([np.diag(square) if square.ndim == 1 else square for square in squares]),
        keep,
    )
    return {
        i: f"{bulk.distance[k]:.3g} times as far as the bulk, most unlike in band {bulk.band[k]}"
        for k, i in enumerate(order)
        if not bulk.kept[k]
    }


def pixels_inside(stored: StoredPass, positions: Sequence[int], keep: float) -> Inside:
    """Return where the bulk of some frames' pixels lies, from the sample that the store has.

    Parameters
    ----------
    stored : StoredPass
        The first pass, which the store has of the frames.
    positions : sequence of int
        The frames' positions in the archive.
    keep : float
        The part of the pixels that is surely good.

    Raises
    ------
    InputError
        If the pass measures no moments, or the store has no sample of their pixels, or too few.
    UnusableFileError
        If a file is damaged, and then set aside, or cannot be read any more.
    """
    measurement, frames = moments_of(stored.this_pass), stored.archive.frames
    by_position = {i: drawn and drawn.at(i) for i, drawn in stored.pixels(positions)}
    name, _, port = measurement.source.rpartition(".")
    name = kept_at("" if name == "batch" else name, port)
    try:
        sample = sampled(list(map(by_position.__getitem__, sorted(by_position))), name)
        bulk = ellipsoid_of(sample.values[name], keep)
    except ValueError as error:
        raise InputError(
            f"measuring.robust_pixels cannot be used at {measurement.source}: {error}"
        ) from error
    outside = bulk.distance(sample.values[name]) > bulk.bound
    counts: dict[str, list[int]] = {}
    for position, out in zip(sample.frame.tolist(), outside.tolist(), strict=True):
        of = counts.setdefault(frames[position].recording, [0, 0])
        of[0], of[1] = of[0] + 1, of[1] + out
    shares = {recording: out / n for recording, (n, out) in counts.items() if out}
    return Inside(
        measurement.node.name,
        measurement.recipe.port,
        measurement.source,
        bulk,
        len(sample.rank),
        sample.n,
        dict(sorted(shares.items(), key=lambda item: (-item[1], item[0]))),
    )


def sampled(drawn: Sequence[Drawn | None], name: str, most: int = MOST_PIXELS) -> Drawn:
    """Return the pixels that a store has of some frames as one sample: any is as likely to be in.

    Parameters
    ----------
    drawn : sequence of Drawn or None
        What was kept of each frame's pixels, in the archive's order.
    name : str
        Which of their values is wanted; pixels with one that is not finite are left out.
    most : int
        How many pixels there are, at most.

    Raises
    ------
    ValueError
        If a frame has none of these, or they do not fit each other.
    """
    kept = [each.only([name]) for each in drawn if each is not None]
    if len(kept) < len(drawn) or any(len(d.rank) and name not in d.values for d in kept):
        raise ValueError(
            "the store has no sample of pixels there, since nodes before it do not map each pixel "
            "by itself, or a frame has images of several sizes"
        )
    whole = joined([joined([each]) for each in kept])
    values = whole.values.get(name, np.empty((0, 1)))
    values = values.reshape(len(values), -1)
    rows = np.flatnonzero(np.isfinite(values).all(axis=1))[:most]
    return Drawn(whole.n, whole.bound, whole.rank[rows], whole.frame[rows], {name: values[rows]})


def moments_of(this_pass: Pass) -> Measurement:
    """Return the measurement whose covariance is to be the bulk's; raises InputError if none."""
    found = [m for m in this_pass.measurements if m.recipe.statistic is Moments]
    if not found:
        raise InputError(
            "measuring.robust and robust_pixels need a node that the first pass fits on moments, "
            "such as RXGlobal, and this pipeline has none (cuvis-dist plan): leave them out"
        )
    return min(found, key=lambda m: bool(m.recipe.options))  # with a full covariance, if there is
