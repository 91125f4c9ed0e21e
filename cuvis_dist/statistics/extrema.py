"""Smallest and largest value of each channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor

from cuvis_dist.statistics.statistic import Statistic, as_array

#: Values that are compared side by side: the bands of one pixel are too few for a fast loop.
_ROW_VALUES = 1 << 12
#: Bytes that a core fetches at a time.
_LINE = 64
#: Values of which both extrema are found before the next ones: a core's cache holds them.
_BLOCK_VALUES = 1 << 16


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
        if pixels.device.type == "cpu":
            return cls(pixels.shape[0], *_reduce(as_array(pixels)))
        found = (_reduce_on_gpu(pixels, by) for by in (torch.amin, torch.amax))
        return cls(pixels.shape[0], *found)

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

    def affine(self, A: Tensor, b: Tensor) -> Self:
        """Return the extrema of ``A x + b``; every row of A may use one channel at most."""
        if int((A != 0).sum(dim=1).max()) > 1:
            raise ValueError("extrema of mixed channels do not follow from those of each channel")
        A = A.double()
        # One product per row is not zero; 0 · inf of an empty archive must not become NaN.
        low, high = (
            torch.where(A != 0, A * x, 0.0).sum(dim=1) for x in (self.minimum, self.maximum)
        )
        return type(self)(self.n, torch.minimum(low, high) + b, torch.maximum(low, high) + b)

    def surrogate(self) -> Tensor:
        """Return two pixels, the minimum and the maximum; the one or none below that."""
        return torch.stack([self.minimum, self.maximum])[: self.n]


@dataclass(frozen=True)
class FrameQuantiles(Extrema):
    """The smallest low quantile and the largest high quantile of any frame, per channel.

    Percentile bounds as cuvis.ai's display normalizers accumulate them: each measurement is of
    one whole frame (a batch of one), and merging takes the outermost. Not the quantiles of all
    frames together.
    """

    whole_frame: ClassVar[bool] = True
    #: A quantile is interpolated in float32.
    exact: ClassVar[bool] = False

    @classmethod
    def measure(cls, pixels: Tensor, low: float = 0.005, high: float = 0.995) -> Self:
        """Measure one frame ``[N, C]`` by ``torch.quantile``, in float32 as the nodes do."""
        if not pixels.shape[0]:
            return super().measure(pixels)
        flat = pixels.detach().float()
        bounds = (torch.quantile(flat, q, dim=0).double().cpu() for q in (low, high))
        return cls(pixels.shape[0], *bounds)

    def affine(self, A: Tensor, b: Tensor) -> Self:
        """Refuse: rounding in the nodes decides which pixel a quantile falls on."""
        raise ValueError("frame quantiles are measured where they are used")

    def surrogate(self) -> Tensor:
        """Return a frame whose low quantile (below 0.49) and high one (above 0.51) these are."""
        return torch.cat([self.minimum.expand(64, -1), self.maximum.expand(64, -1)])[
            : 128 * bool(self.n)
        ]


def _reduce(pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the minimum and the maximum of ``[N, C]`` over its rows.

    Rows are made many pixels wide on the way, and go block by block, so that the maximum finds in
    the core's cache what the minimum has brought there. A glance at each line of the memory brings
    it there faster than the minimum itself would.
    """
    count, channels = pixels.shape
    width = max(1, _ROW_VALUES // channels)
    wide = pixels[: count // width * width].reshape(-1, width * channels)
    lows, highs = [pixels[len(wide) * width :]], [pixels[len(wide) * width :]]
    rows = max(1, _BLOCK_VALUES // (width * channels))
    for start in range(0, len(wide), rows):
        block = wide[start : start + rows]
        block.reshape(-1)[:: _LINE // block.itemsize].max()
        lows.append(block.min(axis=0).reshape(width, channels))
        highs.append(block.max(axis=0).reshape(width, channels))
    lowest, highest = np.concatenate(lows).min(axis=0), np.concatenate(highs).max(axis=0)
    return torch.from_numpy(lowest.astype(np.float64)), torch.from_numpy(highest.astype(np.float64))


def _reduce_on_gpu(pixels: Tensor, by: Callable[..., Tensor]) -> Tensor:
    pixels = pixels.detach().contiguous()
    count, channels = pixels.shape
    width = 32 if count >= 1024 else 1
    whole = count // width * width
    rows = by(pixels[:whole].view(-1, width * channels), dim=0).view(width, channels)
    return by(torch.cat([rows, pixels[whole:]]), dim=0).double().cpu()
