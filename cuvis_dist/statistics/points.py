"""Which few pixels carry given moments exactly?

Source: the symmetric sigma-point set is that of S. J. Julier and J. K. Uhlmann, "A New Extension of
the Kalman Filter to Nonlinear Systems" (1997).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Pixels of :func:`single_points`, at least, and their values together where that is more: what is
#: off by a step of float32 in one of them is so many times smaller in a variance.
_FEWEST, _VALUES = 1 << 13, 1 << 20
#: Pairs of pixels that make up a variance there, each what float32 leaves over of the one before.
_PAIRS = 12


def sigma_points(mean: Tensor, covariance: Tensor) -> Tensor:
    """Return ``mean ± sqrt((2C - 1) / 2) · L_i`` for the columns of ``L Lᵀ = covariance``.

    Parameters
    ----------
    mean : Tensor
        ``[C]`` float64.
    covariance : Tensor
        ``[C, C]`` float64, or its diagonal ``[C]``.

    Returns
    -------
    Tensor
        ``[2C, C]`` float64, whose sample mean and covariance are these.
    """
    factor = covariance.sqrt().diag() if covariance.ndim == 1 else _factor(covariance)
    offsets = factor.T * math.sqrt((2 * len(mean) - 1) / 2)
    return torch.cat([mean + offsets, mean - offsets])


def single_points(mean: Tensor, variance: Tensor) -> Tensor:
    """Return pixels of float32 values whose sample mean and variance are these, per channel.

    Rounded sigma points have lost digits where a mean is many deviations: 65,535 ± 30 in steps of
    2⁻⁸. Here most pixels are the float32 next to the mean, some lie a step beside it to make up
    the mean, and pairs around it make up the variance, each as far out as what is missing allows.

    Parameters
    ----------
    mean, variance : Tensor
        ``[C]`` float64.

    Returns
    -------
    Tensor
        ``[K, C]`` float64, of values that float32 holds.
    """
    count = max(_FEWEST, _VALUES // len(mean))
    centre = mean.float().double()
    points = centre.expand(count, -1).clone()
    step = _next(centre, torch.inf) - centre
    beside = (count * (mean - centre) / step).round()
    # A band without variance that no float32 value is: the one next to it, as the node sees it.
    fits = beside.abs() * step**2 <= variance * (count - 1) + count * (mean - centre) ** 2
    beside, off = beside.where(fits, 0.0), (mean - centre).where(fits, 0.0)
    first = torch.arange(count)[:, None] < beside.abs()
    points += first * (beside.sign() * step)
    # What is missing of the sum, and of the sum of squares, around the centre.
    missing = count * off - beside * step
    squares = variance * (count - 1) + count * off**2 - beside.abs() * step**2
    for pair in range(1, 2 * _PAIRS, 2):
        above = (centre + (squares.clamp(min=0) / 2).sqrt()).float().double()
        for _ in range(3):  # what is too much cannot be taken back
            below = (2 * centre - above).float().double()
            of_both = (above - centre) ** 2 + (below - centre) ** 2
            above = above.where(of_both <= squares, _next(above, -torch.inf))
        below = (2 * centre - above).float().double()
        points[-pair], points[-pair - 1] = above, below
        missing = missing - ((above - centre) + (below - centre))
        squares = squares - ((above - centre) ** 2 + (below - centre) ** 2)
    points[-2 * _PAIRS - 1] = (centre + missing).float()
    points[-2 * _PAIRS - 2] += step * (squares > step**2 / 2)  # the last bit of it, off the mean
    return points


def _next(values: Tensor, towards: float) -> Tensor:
    """Return the neighbours of float32 values, as float64."""
    return torch.nextafter(values.float(), torch.tensor(towards)).double()


def _factor(covariance: Tensor) -> Tensor:
    """Return ``L`` with ``L Lᵀ = covariance``, also for a singular one."""
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info) == 0:
        return factor
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp(min=0).sqrt()
