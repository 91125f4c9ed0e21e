"""What is a statistic by definition? In exact arithmetic, and with the error that float64 may make.

For ``tests/statistics/test_conformance.py``; slow, and without any of the tricks of the package.
"""

from __future__ import annotations

import hashlib
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EPS = 2.0**-53
EPS_32 = 2.0**-24
#: Pixels that a sample of the tests keeps: fewer than an archive of the tests may have.
SIZE = 9
SEED = 3


class Piece(NamedTuple):
    """Some pixels ``[N, C]`` of one frame, from pixel ``start`` on."""

    pixels: Tensor
    frame: int = 0
    start: int = 0


class Bound(NamedTuple):
    """The exact value of one field, and how far float64 may be from it, element by element."""

    value: Tensor
    tolerance: Tensor | float = 0.0

    def holds(self, found: Tensor) -> bool:
        """Whether ``found`` is within the tolerance; NaN and infinities are equal to themselves."""
        found = found.double()
        if found.shape != self.value.shape:
            return False
        tolerance = torch.as_tensor(self.tolerance)
        near = (found - self.value).abs() <= tolerance
        equal = (found == self.value) | (found.isnan() & self.value.isnan())
        return bool((near | equal | tolerance.isinf()).all())


def whole(pieces: list[Piece]) -> Tensor:
    """All pixels, in the order of the archive."""
    ordered = sorted(pieces, key=lambda piece: (piece.frame, piece.start))
    return torch.cat([piece.pixels.double() for piece in ordered])


def exact_moments(pieces: list[Piece], diagonal: bool = False) -> dict[str, Bound]:
    """Mean and M2 in rational arithmetic, rounded once.

    The tolerance of M2 is that of algorithms whose error grows with the condition κ of a
    variance (κ = max|x|·sqrt(n / M2)), as Chan, Golub and LeVeque show for theirs; sums of
    squares lose κ² and are not within it. Where a value is not finite nothing is asked for.
    """
    pixels = whole(pieces)
    n, channels = pixels.shape
    finite = torch.isfinite(pixels).all(dim=0)
    rows = [[Fraction(float(v)) for v in row] for row in pixels.where(finite, 0.0)]
    mean = [sum(row[i] for row in rows) / max(n, 1) for i in range(channels)]
    centred = [[v - m for v, m in zip(row, mean, strict=True)] for row in rows]
    M2 = [
        [float(sum(row[i] * row[j] for row in centred)) for j in range(channels)]
        for i in range(channels)
    ]
    exact = torch.tensor(M2, dtype=torch.float64).reshape(channels, channels)
    largest = pixels.where(finite, 0.0).abs().amax(0) if n else torch.zeros(channels).double()
    spread, level = exact.diagonal().sqrt(), largest * max(n, 1) ** 0.5
    units = spread[:, None] * spread + 4 * (level[:, None] * spread + spread[:, None] * level)
    units += level[:, None] * level * EPS * 16
    anything = torch.where(finite, 0.0, torch.inf)
    tolerance = 8 * EPS * units + anything[:, None] + anything + 1e-290
    means = torch.tensor([float(m) for m in mean], dtype=torch.float64)
    return {
        "mean": Bound(means, 8 * EPS * largest + anything + 1e-290),
        "M2": Bound(exact.diagonal(), tolerance.diagonal())
        if diagonal
        else Bound(exact, tolerance),
    }


def rounded_moments(pieces: list[Piece], diagonal: bool = False) -> dict[str, Bound]:
    """Mean and M2 of whole numbers in rational arithmetic, rounded once: no tolerance."""
    rows = [[int(v) for v in row] for piece in pieces for row in piece.pixels.tolist()]
    n, channels = len(rows), pieces[0].pixels.shape[1]
    mean = [Fraction(sum(row[i] for row in rows), max(n, 1)) for i in range(channels)]
    M2 = [
        [
            float(sum((row[i] - mean[i]) * (row[j] - mean[j]) for row in rows))
            for j in range(channels)
        ]
        for i in range(channels)
    ]
    exact = torch.tensor(M2, dtype=torch.float64).reshape(channels, channels)
    return {
        "mean": Bound(torch.tensor([float(m) for m in mean], dtype=torch.float64)),
        "M2": Bound(exact.diagonal() if diagonal else exact),
    }


def exact_extrema(pieces: list[Piece]) -> dict[str, Bound]:
    """Python's own comparisons; a NaN makes its channel NaN."""
    columns = whole(pieces).T.tolist()

    def pick(choose, neutral):
        values = [
            torch.nan if any(v != v for v in column) else choose(column, default=neutral)
            for column in columns
        ]
        return Bound(torch.tensor(values, dtype=torch.float64))

    return {"minimum": pick(min, torch.inf), "maximum": pick(max, -torch.inf)}


def exact_frame_quantiles(pieces: list[Piece]) -> dict[str, Bound]:
    """The outermost quantile of any frame, interpolated in rational arithmetic.

    The tolerance is that of float32, in which the nodes interpolate, and this is about them.
    """
    channels = pieces[0].pixels.shape[1]
    found = {}
    for name, q, choose, neutral in (
        ("minimum", 0.005, min, torch.inf),
        ("maximum", 0.995, max, -torch.inf),
    ):
        values, tolerances = [], []
        for channel in range(channels):
            columns = [piece.pixels[:, channel].float().sort().values.tolist() for piece in pieces]
            columns = [column for column in columns if column]
            finite = all(np.isfinite(column).all() for column in columns)
            quantiles = [_quantile(column, q) for column in columns] if finite else []
            values.append(float(choose(quantiles, default=neutral)))
            rounding = [max(map(abs, c)) + len(c) * (c[-1] - c[0]) for c in columns]
            rounded = 4 * EPS_32 * max(rounding, default=0.0) + 2.0**-149  # its smallest number
            tolerances.append(rounded if finite else torch.inf)
        found[name] = Bound(
            torch.tensor(values, dtype=torch.float64), torch.tensor(tolerances).double()
        )
    return found


def _quantile(column: list[float], q: float) -> Fraction:
    place = Fraction(q) * (len(column) - 1)
    below = Fraction(column[int(place)])
    above = Fraction(column[min(int(place) + 1, len(column) - 1)])
    return below + (place - int(place)) * (above - below)


def exact_sample(pieces: list[Piece]) -> dict[str, Bound]:
    """The definition: all ranks in whole numbers, sorted; pixels that are not finite first."""

    def rank(frame: int, index: int) -> float:
        start = hashlib.blake2b(f"{SEED}:rec#{frame}".encode(), digest_size=8).digest()
        z = (int.from_bytes(start, "little") + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return ((z ^ z >> 31) >> 11) * 2.0**-53

    listed = []
    for pixels, frame, start in pieces:
        for offset, pixel in enumerate(pixels.double()):
            index = start + offset
            finite = bool(torch.isfinite(pixel).all())
            listed.append((rank(frame, index) if finite else -1.0, frame, index, pixel.tolist()))
    ranked = sorted(listed, key=lambda row: row[:3])
    chosen = sorted(ranked[:SIZE], key=lambda row: row[1:3])
    channels = pieces[0].pixels.shape[1]
    unequal = torch.inf if len(ranked) > SIZE and ranked[SIZE][0] == -1 else 0.0
    as_tensor = lambda rows, *shape: torch.tensor(rows, dtype=torch.float64).reshape(shape)  # noqa: E731
    return {
        "rank": Bound(as_tensor([row[0] for row in ranked[:SIZE]], -1)),
        # Which of too many pixels that are not finite are kept depends on the order.
        "pixels": Bound(as_tensor([row[3] for row in chosen], -1, channels), unequal),
    }
