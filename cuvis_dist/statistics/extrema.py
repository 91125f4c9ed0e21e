"""Smallest and largest value of each channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cuvis_dist.statistics.statistic import Statistic


@dataclass(frozen=True)
class Extrema(Statistic):
    """Minimum and maximum ``[C]`` of ``n`` pixels; +inf and -inf when ``n`` is 0.

    Attributes
    ----------
    n : int
        Number of pixels.
    minimum, maximum : Tensor
        ``[C]`` float64.
    """

    n: int
    minimum: Tensor
    maximum: Tensor

    @classmethod
    def measure(cls, pixels: Tensor) -> Self:
        """Measure the extrema of ``pixels`` ``[N, C]``; a NaN makes its channel NaN."""
        channels = pixels.shape[-1]
        if pixels.shape[0] == 0:
            infinity = torch.full((channels,), torch.inf, dtype=torch.float64)
            return cls(0, infinity, -infinity)
        low, high = torch.aminmax(pixels.detach(), dim=0)
        return cls(pixels.shape[0], low.double().cpu(), high.double().cpu())

    def merge(self, other: Self) -> Self:
        """Return the extrema of both; raises ValueError on unlike channels."""
        if self.channels != other.channels:
            raise ValueError(
                f"cannot merge extrema of {self.channels} and {other.channels} channels"
            )
        return type(self)(
            self.n + other.n,
            torch.minimum(self.minimum, other.minimum),
            torch.maximum(self.maximum, other.maximum),
        )

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.minimum.shape[0]

    def surrogate(self) -> Tensor:
        """Return two pixels, the minimum and the maximum; the one or none below that."""
        return torch.stack([self.minimum, self.maximum])[: self.n]
