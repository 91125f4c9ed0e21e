"""Count, mean and centred second moment of pixels.

Sources: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", Stanford STAN-CS-79-773 (1979), eq. (2.1), in its matrix form; shifted
data, corrected by the sum of what is left, are those of the same authors, "Algorithms for Computing
the Sample Variance", The American Statistician 37(3) (1983), eq. (1.7) and their section on shifts
by an estimate of the mean. The surrogate is the symmetric sigma-point set of S. J. Julier and J. K.
Uhlmann (1997).
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from cuvis_dist.statistics.statistic import Statistic, as_array

#: Float64 values in one block of :meth:`Moments.measure` on a CPU: 1 MiB, which a core's cache
#: holds. A GPU wants larger blocks.
_CPU_BLOCK, _GPU_BLOCK = 1 << 17, 1 << 25
#: Pixels in one block at most: a sum over more of them, one after another, would cost a digit.
_LONGEST = 1 << 12
#: Values that NumPy shifts in one inner loop: the bands of one pixel are too few.
_ROW_VALUES = 1 << 11
#: One pixel of so many, or of fewer where there are few, is in the estimate of the mean.
_EVERY = 64
#: How many threads BLAS has is a matter of the whole process.
_blas = threading.Lock()


@dataclass(frozen=True)
class Moments(Statistic):
    """Count n, mean ``[C]`` and ``M2 = Σ (x - mean)(x - mean)ᵀ``.

    Attributes
    ----------
    n : int
        Number of pixels.
    mean : Tensor
        ``[C]`` float64, zeros when ``n`` is 0.
    M2 : Tensor
        ``[C, C]`` float64, or ``[C]`` when only the diagonal is kept.
    """

    n: int
    mean: Tensor
    M2: Tensor

    @classmethod
    def measure(cls, pixels: Tensor, diagonal: bool = False) -> Self:
        """Measure the moments of ``pixels`` ``[N, C]``, block by block, in float64.

        On a CPU all blocks are shifted by one estimate of the mean, and the product of a block with
        itself is a symmetric one (BLAS ``dsyrk``), half of the arithmetic. The estimate is the mean
        of every 64th pixel: by Cauchy and Schwarz the sum of squares around it is at most 65 times
        that around the mean, whatever the pixels, so that neither a large mean nor a long frame
        costs digits. One thread computes it, since several would add up in an order that depends
        on how many they are.
        """
        if pixels.device.type == "cpu":
            # Whoever measures asks whether the result is finite.
            with _one_thread(), np.errstate(invalid="ignore", over="ignore"):
                return cls._measure_on_cpu(as_array(pixels), diagonal)
        result = cls.empty(pixels.shape[-1], diagonal)
        for block in pixels.detach().split(max(1, _GPU_BLOCK // pixels.shape[-1])):
            result = result.merge(cls._measure_block(block, diagonal))
        return result

    @classmethod
    def _measure_on_cpu(cls, pixels: np.ndarray, diagonal: bool) -> Self:
        n, channels = pixels.shape
        if n == 0:
            return cls.empty(channels, diagonal)
        shift = _estimated_mean(pixels)
        sums, products = _around(pixels, shift, diagonal)
        offset = sums / n
        products -= n * (offset * offset if diagonal else np.outer(offset, offset))
        return cls(n, torch.from_numpy(shift + offset), torch.from_numpy(products))

    @classmethod
    def empty(cls, channels: int, diagonal: bool = False) -> Self:
        """Return the moments of no pixels, the identity of :meth:`merge`."""
        shape = (channels,) if diagonal else (channels, channels)
        zeros = torch.zeros(channels, dtype=torch.float64)
        return cls(0, zeros, torch.zeros(shape, dtype=torch.float64))

    @classmethod
    def _measure_block(cls, block: Tensor, diagonal: bool) -> Self:
        n = block.shape[0]
        if n == 0:
            return cls.empty(block.shape[-1], diagonal)
        centred = block.to(torch.float64, copy=True)
        shift = centred.mean(dim=0)
        centred -= shift
        residual = centred.mean(dim=0)
        if diagonal:
            M2 = (centred * centred).sum(dim=0) - n * residual * residual
        else:
            M2 = centred.T @ centred - n * torch.outer(residual, residual)
        return cls(n, (shift + residual).cpu(), M2.cpu())

    def merge(self, other: Self) -> Self:
        """Merge by Chan, Golub & LeVeque (1979); raises ValueError on unlike channels."""
        if self.M2.shape != other.M2.shape:
            raise ValueError(
                f"cannot merge moments of {self.channels} and {other.channels} channels "
                f"(M2 {tuple(self.M2.shape)} and {tuple(other.M2.shape)})"
            )
        if other.n == 0:
            return self
        if self.n == 0:
            return other
        n = self.n + other.n
        delta = other.mean - self.mean
        square = delta * delta if self.diagonal else torch.outer(delta, delta)
        return type(self)(
            n,
            self.mean + delta * (other.n / n),
            self.M2 + other.M2 + square * (self.n * (other.n / n)),
        )

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.mean.shape[0]

    @property
    def diagonal(self) -> bool:
        """Whether only the variances are kept."""
        return self.M2.ndim == 1

    @property
    def covariance(self) -> Tensor:
        """Sample covariance (divisor n - 1), ``[C, C]`` or ``[C]``; needs two pixels."""
        return self.M2 / (self.n - 1)

    def affine(self, A: Tensor, b: Tensor) -> Self:
        """Return the moments of ``A x + b``; those of a diagonal need a full covariance."""
        if self.diagonal:
            raise ValueError("variances alone do not give the moments of mapped pixels")
        A = A.double()
        return type(self)(self.n, A @ self.mean + b.double(), A @ self.M2 @ A.T)

    def only_diagonal(self) -> Self:
        """Return the moments with the variances alone."""
        return self if self.diagonal else type(self)(self.n, self.mean, self.M2.diagonal().clone())

    def surrogate(self, means: int = 0) -> Tensor:
        """Return K = 2C + ``means`` pixels whose sample mean and covariance are these.

        The pixels are ``mean ± sqrt((K - 1) / 2) · L_i`` for the columns ``L_i`` of a factor
        ``L Lᵀ`` of the covariance, and copies of the mean. With copies the others lie farther
        out, so that rounding them to float32 costs less where the mean is large. Below two
        pixels there is no covariance to carry: the surrogate is then the one pixel itself, or
        none, so that a node says what it always says about too little data.
        """
        if self.n < 2:
            return self.mean.expand(self.n, -1).clone()
        factor = self.covariance.sqrt().diag() if self.diagonal else _factor(self.covariance)
        offsets = factor.T * math.sqrt((2 * self.channels + means - 1) / 2)
        return torch.cat(
            [self.mean + offsets, self.mean - offsets, self.mean.expand(means, self.channels)]
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let BLAS compute with one thread; how many there were comes back in the end."""
    with _blas, _blas_libraries().limit(limits=1, user_api="blas"):
        yield


@functools.cache
def _blas_libraries() -> ThreadpoolController:
    """Find the libraries once, which takes milliseconds; NumPy's has been loaded with NumPy."""
    return ThreadpoolController().select(user_api="blas")


def _estimated_mean(pixels: np.ndarray) -> np.ndarray:
    """Return ``[C]`` float64; it is exact in a channel where all pixels are the same."""
    few = pixels[:: max(1, min(_EVERY, len(pixels) // _EVERY))].astype(np.float64)
    first = few[0].copy()
    few -= first
    return first + few.mean(axis=0)


def _around(pixels: np.ndarray, shift: np.ndarray, diagonal: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return ``Σ (x - shift)`` ``[C]``, and ``Σ (x - shift)(x - shift)ᵀ`` or its diagonal."""
    channels = len(shift)
    sums = np.zeros(channels)
    products = np.zeros(channels if diagonal else (channels, channels))
    for block in _shifted(pixels, shift):
        ones = np.ones(len(block))
        sums += ones @ block
        if diagonal:
            np.multiply(block, block, out=block)
            products += ones @ block
        else:
            products += block.T @ block
    return sums, products


def _shifted(pixels: np.ndarray, shift: np.ndarray) -> Iterator[np.ndarray]:
    """Yield ``x - shift`` in float64, block by block, each in the memory of the one before."""
    n, channels = pixels.shape
    width = max(1, _ROW_VALUES // channels)
    rows = max(1, min(_CPU_BLOCK // channels, _LONGEST) // width) * width
    wide = np.tile(shift, width)
    memory = np.empty((min(n, rows), channels))
    for start in range(0, n, rows):
        part = pixels[start : start + rows]
        block = memory[: len(part)]
        block[...] = part
        whole = len(part) // width * width
        rows_of_many = block[:whole].reshape(-1, len(wide))
        rows_of_many -= wide
        block[whole:] -= shift
        yield block


def _factor(covariance: Tensor) -> Tensor:
    """Return ``L`` with ``L Lᵀ = covariance``, also for a singular one."""
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info) == 0:
        return factor
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp(min=0).sqrt()
