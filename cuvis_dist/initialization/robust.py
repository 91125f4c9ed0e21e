"""Which frames does phase 1 leave out, so that it is fitted on the bulk of an archive?

Those whose pixels are far from the bulk's, by concentration steps over the statistics of frames
(:mod:`cuvis_dist.statistics.bulk`). A store has these, so that no cube is read for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cuvis_dist.errors import InputError
from cuvis_dist.initialization.plan import Measurement, Pass
from cuvis_dist.initialization.stored import StoredPass
from cuvis_dist.statistics import ExactMoments, Moments
from cuvis_dist.statistics.bulk import bulk_of_frames


def frames_outside(stored: StoredPass, positions: Sequence[int], keep: float) -> dict[int, float]:
    """Return the positions of the frames that are not of the bulk, each with its distance.

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
    dict of int to float
        The distance is the mean squared Mahalanobis distance of a frame's pixels, by the number of
        bands: about 1 for frames of the bulk.

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
    return {i: float(bulk.distance[k]) for k, i in enumerate(order) if not bulk.kept[k]}


def moments_of(this_pass: Pass) -> Measurement:
    """Return the measurement whose covariance is to be the bulk's; raises InputError if none."""
    found = [m for m in this_pass.measurements if m.recipe.statistic is Moments]
    if not found:
        raise InputError(
            "measuring.robust needs a node that the first pass fits on moments, such as RXGlobal, "
            "and this pipeline has none (cuvis-dist plan): leave the setting out"
        )
    return min(found, key=lambda m: bool(m.recipe.options))  # with a full covariance, if there is
