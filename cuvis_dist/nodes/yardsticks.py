"""In what is a change of a fitted buffer measured, so that a person can judge it?

A mean that moved by 0.01 may be nothing or everything. It is told in standard deviations; a bound
in widths of the range; a covariance in products of two standard deviations, in which it is a
correlation. Which buffers of which class have such a measure says
:mod:`~cuvis_dist.nodes.catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Yardstick:
    """What one unit of change is.

    Attributes
    ----------
    unit : str
        In words, for more than one of them.
    of : callable
        Returns its size, given the state of a node in float64: a tensor of the buffer's shape, or
        one that is broadcast to it.
    """

    unit: str
    of: Callable[[State], Tensor]


def mean_and_covariance(mean: str, covariance: str) -> dict[str, Yardstick]:
    """Return the yardsticks of a mean ``[C]`` and a covariance ``[C, C]`` of these names."""

    def deviations(state: State) -> Tensor:
        return state[covariance].diagonal().clamp(min=0).sqrt()

    def products(state: State) -> Tensor:
        return deviations(state).outer(deviations(state))

    return {
        mean: Yardstick("standard deviations", deviations),
        covariance: Yardstick("products of two standard deviations", products),
    }


def mean_and_deviation(mean: str, deviation: str) -> dict[str, Yardstick]:
    """Return the yardsticks of a mean ``[C]`` and a standard deviation ``[C]`` of these names."""
    both = Yardstick("standard deviations", lambda state: state[deviation])
    return {mean: both, deviation: both}


def bounds(low: str = "running_min", high: str = "running_max") -> dict[str, Yardstick]:
    """Return the yardsticks of bounds of these names, of any shape."""
    width = Yardstick("widths of the range", lambda state: state[high] - state[low])
    return {low: width, high: width}
