"""Count, mean and centred second moment of pixels: exact where pixels are whole numbers.

Pixels that are whole numbers below 2¹⁶, as sensors give them, are summed without rounding
(:class:`ExactMoments`), others around an estimate of their mean (:class:`Moments`); measuring finds
out which of the two it is. Merged with the latter, the former become the latter.

Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Updating Formulae and a Pairwise Algorithm for
Computing Sample Variances", Stanford STAN-CS-79-773 (1979), eq. (2.1), in its matrix form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from cuvis_dist.statistics.blocks import (
    GPU_BLOCK,
    LONGEST_WHOLE,
    NotWholeError,
    shifted_sums,
    whole_sums,
)
from cuvis_dist.statistics.points import sigma_points, single_points
from cuvis_dist.statistics.statistic import Statistic
from cuvis_dist.statistics.wide import add, as_ints, subtract, wide


@dataclass(frozen=True)
class Moments(Statistic):
    """Count n, mean ``[C]`` and ``M2 = Σ (x - mean)(x - mean)ᵀ``, rounded to float64.

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

    exact: ClassVar[bool] = False

    @classmethod
    def measure(cls, pixels: Tensor, diagonal: bool = False) -> Moments | ExactMoments:
        """Measure the moments of ``pixels`` ``[N, C]``, block by block, in float64.

        They are exact where all pixels are whole numbers in [0, 2¹⁶), and where there are none.
        """
        try:
            return ExactMoments.measure(pixels, diagonal)
        except NotWholeError:
            return cls.measure_rounded(pixels, diagonal)

    @classmethod
    def measure_rounded(cls, pixels: Tensor, diagonal: bool = False) -> Self:
        """Measure any pixels ``[N, C]`` with rounding, as if they were no whole numbers."""
        if not len(pixels) or pixels.device.type != "cpu":
            result = cls.empty(pixels.shape[-1], diagonal)
            for block in pixels.detach().split(max(1, GPU_BLOCK // pixels.shape[-1])):
                result = result.merge(cls._measure_block(block, diagonal))
            return result
        n = len(pixels)
        shift, sums, products = shifted_sums(pixels, diagonal)
        offset = sums / n
        square = offset * offset if diagonal else torch.outer(offset, offset)
        return cls(n, shift + offset, products - n * square)

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

    def merge(self, other: Moments | ExactMoments) -> Self:
        """Merge by Chan, Golub & LeVeque (1979); raises ValueError on unlike channels."""
        _require_alike(self, other)
        if other.n == 0:
            return self
        theirs = other.rounded() if isinstance(other, ExactMoments) else other
        if self.n == 0:
            return type(self)(theirs.n, theirs.mean, theirs.M2)
        n = self.n + theirs.n
        delta = theirs.mean - self.mean
        square = delta * delta if self.diagonal else torch.outer(delta, delta)
        return type(self)(
            n,
            self.mean + delta * (theirs.n / n),
            self.M2 + theirs.M2 + square * (self.n * (theirs.n / n)),
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
        """Return the moments of ``A x + b``; those of a diagonal need a full covariance.

        The products are added in one order, so that no processor has bits of its own.
        """
        if self.diagonal:
            raise ValueError("variances alone do not give the moments of mapped pixels")
        A = A.double()
        mean = _product(A, self.mean[:, None])[:, 0] + b.double()
        return type(self)(self.n, mean, _product(A, _product(A, self.M2).T))

    def only_diagonal(self) -> Self:
        """Return the moments with the variances alone."""
        return self if self.diagonal else type(self)(self.n, self.mean, self.M2.diagonal().clone())

    def surrogate(self, single: bool = False) -> Tensor:
        """Return pixels whose sample mean and covariance are these.

        Below two pixels there is no covariance to carry: the surrogate is then the one pixel
        itself, or none, so that a node says what it always says about too little data.

        Parameters
        ----------
        single : bool
            For a node that casts to float32: of values that float32 holds. Of the variances alone.
        """
        return _surrogate(self, single)


@dataclass(frozen=True)
class ExactMoments(Statistic):
    """The sums of pixels that are whole numbers in [0, 2¹⁶), without rounding.

    They have the same bits for any order, partition, thread, processor or GPU, and pixels can be
    taken out again. ``mean``, ``M2`` and ``covariance`` are computed when they are asked for: each
    entry is the float64 next to the true value.

    Attributes
    ----------
    n : int
        Number of pixels.
    diagonal : bool
        Whether only the variances are kept.
    sums : Tensor
        ``Σ x``, ``[2, C]`` int64 (see :mod:`~cuvis_dist.statistics.wide`).
    products : Tensor
        ``Σ x xᵀ``: its rows from the diagonal on, one after another, ``[2, C (C + 1) / 2]`` int64;
        or the diagonal, ``[2, C]``.
    """

    n: int
    diagonal: bool
    sums: Tensor
    products: Tensor

    exact: ClassVar[bool] = True

    @classmethod
    def measure(cls, pixels: Tensor, diagonal: bool = False) -> Self:
        """Measure ``pixels`` ``[N, C]``; raises NotWholeError if they are not whole numbers."""
        result: Self | None = None
        for part in pixels.detach().split(LONGEST_WHOLE):
            sums, products = whole_sums(part, diagonal)
            if not diagonal:
                products = products[*_half(len(sums))]
            one = cls(len(part), diagonal, wide(sums), wide(products))
            result = result._with(one) if result else one
        assert result is not None  # also no pixels are a part
        return result

    def merge(self, other: Moments | ExactMoments) -> Moments | ExactMoments:
        """Add the sums up, or merge what is rounded: see :meth:`Moments.merge`.

        Raises ValueError on unlike channels.
        """
        _require_alike(self, other)
        if isinstance(other, Moments):
            return self.rounded().merge(other) if self.n else other
        return self._with(other)

    def _with(self, other: ExactMoments) -> Self:
        return type(self)(
            self.n + other.n,
            self.diagonal,
            add(self.sums, other.sums),
            add(self.products, other.products),
        )

    def without(self, other: ExactMoments) -> Self:
        """Return the moments of these pixels without those of ``other``, as never measured.

        Raises
        ------
        ValueError
            If the pixels of ``other`` cannot be among these.
        """
        _require_alike(self, other)
        left = type(self)(
            self.n - other.n,
            self.diagonal,
            subtract(self.sums, other.sums),
            subtract(self.products, other.products),
        )
        negative = left.n < 0 or bool((left.sums[0] < 0).any() | (left.products[0] < 0).any())
        if negative or (left.n == 0 and bool(left.products.any())):
            raise ValueError(
                f"{other.n} pixels cannot be taken out of {self.n} that they are not among"
            )
        return left

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.sums.shape[1]

    @property
    def mean(self) -> Tensor:
        """``[C]`` float64, zeros when ``n`` is 0."""
        return _quotients(as_ints(self.sums), self.n)

    @property
    def M2(self) -> Tensor:  # noqa: N802
        """``Σ (x - mean)(x - mean)ᵀ``, ``[C, C]`` float64, or its diagonal ``[C]``."""
        return self._square(_quotients(self._centred(), self.n))

    @property
    def covariance(self) -> Tensor:
        """Sample covariance (divisor n - 1), ``[C, C]`` or ``[C]``; needs two pixels."""
        return self._square(_quotients(self._centred(), self.n * (self.n - 1)))

    def rounded(self) -> Moments:
        """Return the same moments in float64."""
        return Moments(self.n, self.mean, self.M2)

    def affine(self, A: Tensor, b: Tensor) -> Moments:
        """Return the moments of ``A x + b``; those of a diagonal need a full covariance."""
        return self.rounded().affine(A, b)

    def only_diagonal(self) -> Self:
        """Return the moments with the variances alone."""
        if self.diagonal:
            return self
        row, column = _half(self.channels)
        return type(self)(self.n, True, self.sums, self.products[:, row == column])

    def surrogate(self, single: bool = False) -> Tensor:
        """Return pixels that carry the moments: see :meth:`Moments.surrogate`."""
        return _surrogate(self, single)

    def _centred(self) -> list[int]:
        """Return ``n Σ x xᵀ - Σ x (Σ x)ᵀ``, in the order of ``products``."""
        sums, products = as_ints(self.sums), as_ints(self.products)
        if self.diagonal:
            return [self.n * xx - x * x for xx, x in zip(products, sums, strict=True)]
        pairs = zip(products, *_half(self.channels).tolist(), strict=True)
        return [self.n * xy - sums[i] * sums[j] for xy, i, j in pairs]

    def _square(self, half: Tensor) -> Tensor:
        if self.diagonal:
            return half
        row, column = _half(self.channels)
        whole = half.new_empty(self.channels, self.channels)
        whole[row, column] = whole[column, row] = half
        return whole


def _require_alike(a: Moments | ExactMoments, b: Moments | ExactMoments) -> None:
    if (a.channels, a.diagonal) != (b.channels, b.diagonal):
        kept = [
            f"{each.channels} channels" + " (variances alone)" * each.diagonal for each in (a, b)
        ]
        raise ValueError(f"cannot merge moments of {kept[0]} and {kept[1]}")


def _half(channels: int) -> Tensor:
    """Return rows and columns of the upper half of a matrix, its diagonal included, ``[2, K]``."""
    return torch.triu_indices(channels, channels)


def _quotients(numerators: list[int], denominator: int) -> Tensor:
    """Return ``[K]`` float64, each rounded once: Python promises that of its whole numbers."""
    # All sums of no pixels are 0.
    return torch.tensor([a / (denominator or 1) for a in numerators], dtype=torch.float64)


def _product(A: Tensor, B: Tensor) -> Tensor:
    """Return ``A @ B``, added in the order of the columns of A; BLAS has one for each processor."""
    used = A != 0
    if int(used.sum(dim=1).max()) <= 1:  # scaled or chosen channels: one product each
        first = used.to(torch.uint8).argmax(dim=1)
        return A.gather(1, first[:, None]) * B[first]
    total = A.new_zeros(A.shape[0], B.shape[1])
    for column, row in zip(A.T, B, strict=True):
        total += column[:, None] * row
    return total


def _surrogate(moments: Moments | ExactMoments, single: bool) -> Tensor:
    if moments.n < 2:
        return moments.mean.expand(moments.n, -1).clone()
    if single and not moments.diagonal:
        raise ValueError("float32 pixels carry variances alone")
    return (single_points if single else sigma_points)(moments.mean, moments.covariance)
