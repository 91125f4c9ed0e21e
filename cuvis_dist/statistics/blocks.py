"""How are the pixels of a frame added up in float64, block by block, on one core or on a GPU?

Whole numbers below 2¹⁶ as they are: sums and products of at most :data:`LONGEST_WHOLE` pixels stay
below 2⁵³, so that float64 holds each of them exactly, whatever the order, the threads and the
kernel that add them. Other values shifted by an estimate of their mean, and by one thread: several
would add up in an order that depends on how many they are.

Source: shifted data, corrected by the sum of what is left, are those of T. F. Chan, G. H. Golub and
R. J. LeVeque, "Algorithms for Computing the Sample Variance", The American Statistician 37(3)
(1983), eq. (1.7) and their section on shifts by an estimate of the mean.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from cuvis_dist.statistics.statistic import as_array

#: So many pixels of values below 2¹⁶ have sums of products below 2³² · 2²¹ = 2⁵³.
LONGEST_WHOLE = 1 << 21
#: Float64 values in one shifted block on a CPU: 1 MiB, which a core's cache holds. Blocks that need
#: no shift may be longer, which is good for many bands. A GPU wants larger ones.
_CPU_BLOCK, _WHOLE_BLOCK, GPU_BLOCK = 1 << 17, 1 << 18, 1 << 25
#: Pixels in one shifted block at most: a sum over more of them, one after another, would cost a
#: digit.
_LONGEST = 1 << 12
#: Values that NumPy shifts in one inner loop: the bands of one pixel are too few.
_ROW_VALUES = 1 << 11
#: One pixel of so many, or of fewer where there are few, is in the estimate of the mean.
_EVERY = 64
#: So many pixels tell of most cubes that they are no whole numbers, before any is converted.
_FIRST = 16
#: Types that hold nothing else than whole numbers below 2¹⁶.
_SMALL = (torch.bool, torch.uint8, torch.uint16)
#: How many threads BLAS has is a matter of the whole process.
_blas = threading.Lock()


class NotWholeError(ValueError):
    """Some pixels are no whole numbers in [0, 2¹⁶)."""


def whole_sums(pixels: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """Return ``Σ x`` ``[C]`` and ``Σ x xᵀ`` ``[C, C]`` (or its diagonal ``[C]``), without rounding.

    Parameters
    ----------
    pixels : Tensor
        ``[N, C]`` of any real dtype, ``N`` at most :data:`LONGEST_WHOLE`.

    Raises
    ------
    NotWholeError
        If not all values are whole numbers in [0, 2¹⁶); found out block by block.
    """
    if pixels.device.type != "cpu":
        return _whole_sums_in_torch(pixels, diagonal)
    # One thread leaves the other cores to other workers; it would not change a bit.
    with one_thread(), np.errstate(invalid="ignore"):
        array = as_array(pixels)
        sums, products = _added(_whole(array, pixels.dtype in _SMALL), array.shape[1], diagonal)
    return torch.from_numpy(sums), torch.from_numpy(products)


def shifted_sums(pixels: Tensor, diagonal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return a shift ``[C]``, ``Σ (x - shift)`` and ``Σ (x - shift)(x - shift)ᵀ`` of CPU pixels.

    The shift is the mean of every 64th pixel: by Cauchy and Schwarz the sum of squares around it
    is at most 65 times that around the mean, whatever the pixels, so that neither a large mean nor
    a long frame costs digits.

    Parameters
    ----------
    pixels : Tensor
        ``[N, C]`` of any real dtype, ``N`` not 0.
    """
    # Whoever measures asks whether the result is finite.
    with one_thread(), np.errstate(invalid="ignore", over="ignore"):
        array = as_array(pixels)
        shift = _estimated_mean(array)
        sums, products = _added(_shifted(array, shift), len(shift), diagonal)
    return torch.from_numpy(shift), torch.from_numpy(sums), torch.from_numpy(products)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let BLAS compute with one thread; how many there were comes back in the end."""
    with _blas, _blas_libraries().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _blas_libraries() -> ThreadpoolController:
    """Find the libraries once, which takes milliseconds; NumPy's has been loaded with NumPy."""
    return ThreadpoolController().select(user_api="blas")


def _added(
    blocks: Iterable[np.ndarray], channels: int, diagonal: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Add up blocks ``[N, C]``, which are overwritten; a product is a symmetric one (``dsyrk``)."""
    sums = np.zeros(channels)
    products = np.zeros(channels if diagonal else (channels, channels))
    for block in blocks:
        ones = np.ones(len(block))
        sums += ones @ block
        if diagonal:
            np.multiply(block, block, out=block)
            products += ones @ block
        else:
            products += block.T @ block
    return sums, products


def _cut(pixels: np.ndarray, rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield parts of the pixels with their float64 copies, each in the memory of the one before."""
    n, channels = pixels.shape
    memory = np.empty((min(n, rows), channels))
    for start in range(0, n, rows):
        part = pixels[start : start + rows]
        block = memory[: len(part)]
        torch.from_numpy(block).copy_(torch.from_numpy(part))  # faster than NumPy's conversion
        yield part, block


def _whole(pixels: np.ndarray, known: bool) -> Iterator[np.ndarray]:
    """Yield the pixels in float64; what uint16 cannot hold comes back from it as another value."""
    if not known:
        _require_whole(pixels[:_FIRST])
    for part, block in _cut(pixels, max(1, _WHOLE_BLOCK // pixels.shape[1])):
        if not known:
            _require_whole(part)
        yield block


def _require_whole(pixels: np.ndarray) -> None:
    if not np.array_equal(pixels.astype(np.uint16), pixels):
        raise NotWholeError


def _estimated_mean(pixels: np.ndarray) -> np.ndarray:
    """Return ``[C]`` float64; it is exact in a channel where all pixels are the same."""
    few = pixels[:: max(1, min(_EVERY, len(pixels) // _EVERY))].astype(np.float64)
    first = few[0].copy()
    few -= first
    return first + few.mean(axis=0)


def _shifted(pixels: np.ndarray, shift: np.ndarray) -> Iterator[np.ndarray]:
    """Yield ``x - shift`` in float64."""
    width = max(1, _ROW_VALUES // len(shift))
    rows = max(1, min(_CPU_BLOCK // len(shift), _LONGEST) // width) * width
    wide = np.tile(shift, width)
    for _, block in _cut(pixels, rows):
        many = len(block) // width * width
        rows_of_many = block[:many].reshape(-1, len(wide))
        rows_of_many -= wide
        block[many:] -= shift
        yield block


def _whole_sums_in_torch(pixels: Tensor, diagonal: bool) -> tuple[Tensor, Tensor]:
    """:func:`whole_sums` where the pixels are, in blocks of the size that a GPU wants."""
    channels = pixels.shape[1]
    sums = torch.zeros(channels, dtype=torch.float64)
    products = torch.zeros((channels,) if diagonal else (channels, channels), dtype=torch.float64)
    for part in pixels.detach().split(max(1, GPU_BLOCK // channels)):
        block = part.to(torch.float64)
        if part.dtype not in _SMALL:
            fits = (block >= 0) & (block < 1 << 16) & (block == block.floor())
            if not bool(fits.all()):
                raise NotWholeError
        sums += block.sum(dim=0).cpu()
        products += ((block * block).sum(dim=0) if diagonal else block.T @ block).cpu()
    return sums, products
