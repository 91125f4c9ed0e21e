"""Which rows of a port's value belong to which frame?

A value is compared for a batch of two frames and for the first of them alone: a tensor of which
the two have twice as many rows has a fixed number of rows per frame. Lists and dictionaries are
looked into, since a port may take several values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

SAME = 0
"""The value has no rows of frames: weights, a centre, a loss."""
RAGGED = -1
"""How many rows there are depends on what is in the frames."""

Rows = int | list[Any] | dict[str, Any]
"""Rows per frame, :data:`SAME` or :data:`RAGGED`; for a list or dictionary, of each value in it."""


def rows_of(two: Any, one: Any) -> Rows:
    """Return the rows per frame, given the value for two frames and that for one."""
    if _has_rows(two) and _has_rows(one):
        lengths = len(two), len(one)
        if lengths[0] == 2 * lengths[1] > 0:
            return lengths[1]
        if lengths[0] != lengths[1]:
            return RAGGED
        if isinstance(two, list | tuple):
            return _or_same([rows_of(a, b) for a, b in zip(two, one, strict=True)])
    if isinstance(two, dict) and isinstance(one, dict) and two.keys() == one.keys():
        return _or_same({key: rows_of(two[key], one[key]) for key in two})
    return SAME


def _or_same(rows: Rows) -> Rows:
    return rows if has_frames(rows) or is_ragged(rows) else SAME


def _has_rows(value: Any) -> bool:
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.ndim > 0
    return isinstance(value, list | tuple)


def _flat(rows: Rows) -> list[int]:
    if isinstance(rows, int):
        return [rows]
    inner = rows.values() if isinstance(rows, dict) else rows
    return [each for value in inner for each in _flat(value)]


def has_frames(rows: Rows) -> bool:
    """Whether anything in the value has rows per frame."""
    return any(each > 0 for each in _flat(rows))


def is_ragged(rows: Rows) -> bool:
    """Whether anything in the value has rows that do not follow the frames."""
    return RAGGED in _flat(rows)


def map_rows(value: Any, rows: Rows, change: Callable[[Any, int], Any]) -> Any:
    """Return ``value`` with ``change(part, rows per frame)`` for each part that has frames."""
    if isinstance(rows, dict):
        return {key: map_rows(part, rows[key], change) for key, part in value.items()}
    if isinstance(rows, list):
        parts = [map_rows(part, each, change) for part, each in zip(value, rows, strict=True)]
        return type(value)(parts)
    return change(value, rows) if rows > 0 else value


def frame_of(value: Any, rows: Rows, index: int) -> Any:
    """Return the value for one frame of a batch alone."""
    return map_rows(value, rows, lambda part, each: part[index * each : (index + 1) * each])


def bytes_per_frame(value: Any, rows: Rows) -> int:
    """Return the size of one frame's part of a value, as far as it consists of arrays."""
    total = 0

    def add(part: Any, each: int) -> Any:
        nonlocal total
        array = part[:each]
        if isinstance(array, torch.Tensor):
            total += array.numel() * array.element_size()
        elif isinstance(array, np.ndarray):
            total += array.nbytes
        return part

    map_rows(value, rows, add)
    return total
