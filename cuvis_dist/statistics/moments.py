"""Count, mean and centred second moment of pixels.

Sources: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", Stanford STAN-CS-79-773 (1979), eq. (2.1), in its matrix form; the
shifted data of a block are the corrected two-pass algorithm of the same authors, "Algorithms
for Computing the Sample Variance", The American Statistician 37(3) (1983), eq. (1.7). The
surrogate is the symmetric sigma-point set of S. J. Julier and J. K. Uhlmann (1997).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from cuvis_dist.statistics.statistic import Statistic

#: Float64 values in one block of :meth:`Moments.measure`: 1 MiB, which a core's cache holds; a
#: GPU wants larger ones.
_BLOCK_VALUES = {"cpu": 1 << 17, "cuda": 1 << 25}


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

        A block is shifted by its own mean before the one matrix product, and what rounding
        left of the mean in the shifted block is taken out again, so that neither a large mean
        nor a long frame costs digits. One thread computes it, since several would add up in an
        order that depends on how many they are.
        """
        channels = pixels.shape[-1]
        result = cls.empty(channels, diagonal)
        rows = max(1, _BLOCK_VALUES.get(pixels.device.type, 1 << 17) // channels)
        with _one_thread():
            for block in pixels.detach().split(rows):
                result = result.merge(cls._measure_block(block, diagonal))
        return result

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
    """Compute with one thread; how many there were comes back in the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _factor(covariance: Tensor) -> Tensor:
    """Return ``L`` with ``L Lᵀ = covariance``, also for a singular one."""
    factor, info = torch.linalg.cholesky_ex(covariance)
    if int(info) == 0:
        return factor
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp(min=0).sqrt()
