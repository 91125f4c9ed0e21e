"""How do the statistics of many frames become the columns of one Arrow table, and come back?

A column for each field of the class; a tensor is a list of its values, with its shape in a column
beside it, so that tensors of any size stand in one table, and other programs can read it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cuvis_dist.statistics.statistic import Statistic, statistic_class

_SHAPE = ".shape"


def to_table(statistics: Sequence[Statistic]) -> pa.Table:
    """Return one row for each of some statistics, all of one class.

    Parameters
    ----------
    statistics : sequence of Statistic
        One at least.
    """
    columns: dict[str, Any] = {}
    for field in fields(statistics[0]):
        values = [getattr(statistic, field.name) for statistic in statistics]
        if isinstance(values[0], Tensor):
            columns[field.name] = lists([value.reshape(-1).numpy() for value in values])
            shapes = [list(value.shape) for value in values]
            columns[field.name + _SHAPE] = pa.array(shapes, type=pa.list_(pa.int32()))
        else:
            columns[field.name] = pa.array(values)
    return pa.table(columns)


def lists(arrays: Sequence[np.ndarray]) -> pa.LargeListArray:
    """Return a column with the values ``[N]`` of each array; one at least, all of one dtype."""
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int64)
    # One copy: pa.array takes several times as long for a list of arrays.
    return pa.LargeListArray.from_arrays(ends, np.concatenate(arrays))


def from_table(table: pa.Table, name: str, rows: Sequence[int]) -> list[Statistic]:
    """Return the statistics in some rows of what :func:`to_table` returned.

    Parameters
    ----------
    table : Table
        It may have further columns.
    name : str
        Name of the class of the statistics.
    rows : sequence of int
        Which rows.

    Raises
    ------
    ValueError, KeyError
        If they are not in the table.
    """
    cls = statistic_class(name)
    columns = [_values(table, field.name, rows) for field in fields(cls)]
    return [cls(*values) for values in zip(*columns, strict=True)]


def _values(table: pa.Table, name: str, rows: Sequence[int]) -> list[Any]:
    if name + _SHAPE not in table.column_names:
        every = table.column(name).to_pylist()
        return [every[row] for row in rows]
    column = pa.concat_arrays(table.column(name).chunks)
    offsets = column.offsets.to_numpy()
    flat = torch.from_numpy(np.array(column.values.to_numpy(zero_copy_only=False)))
    shapes = table.column(name + _SHAPE).to_pylist()
    return [flat[offsets[row] : offsets[row + 1]].reshape(shapes[row]) for row in rows]
