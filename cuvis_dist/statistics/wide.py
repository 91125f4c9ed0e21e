"""How are whole numbers of more than 64 bits added in tensors, and read as Python's?

A tensor ``[2, ...]`` int64 holds a high and a low part of each number: ``high · 2⁶² + low`` with
``0 <= low < 2⁶²``, so that equal numbers have equal bits. 2¹²⁵ is far beyond any archive.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 62
_LOW = (1 << _BITS) - 1


def wide(values: Tensor) -> Tensor:
    """Return int64 ``[...]``, or float64 of whole numbers below 2⁶², as wide ``[2, ...]``."""
    whole = values.to(torch.int64)
    return _carried(torch.zeros_like(whole), whole)


def add(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a + b``."""
    return _carried(a[0] + b[0], a[1] + b[1])


def subtract(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a - b``; a negative number has a negative high part."""
    return _carried(a[0] - b[0], a[1] - b[1])


def as_ints(a: Tensor) -> list[int]:
    """Return the numbers of ``[2, N]`` as Python's, which have no limit."""
    return [(high << _BITS) + low for high, low in zip(*a.tolist(), strict=True)]


def _carried(high: Tensor, low: Tensor) -> Tensor:
    """Move what does not belong into the low part to the high one; low lies within ± 2⁶³."""
    return torch.stack([high + (low >> _BITS), low & _LOW])
