"""How does a sample of each frame's pixels become a row of a table, and come back?"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from cuvis_dist.plain import NotPlainError, from_bytes, to_bytes
from cuvis_dist.statistics.columns import lists
from cuvis_dist.statistics.drawn import Drawn

#: What stands before the name of a value in that of its column, and of the one with its type.
_VALUE, _TYPE = "value:", "type:"


def to_table(drawn: Sequence[Drawn | None]) -> pa.Table:
    """Return a row for each frame's pixels; one without a bound where there are none to keep.

    What belongs to the frames as wholes must be plain (:mod:`cuvis_dist.plain`): where it is not,
    there are none.
    """
    written: dict[tuple[Any, ...], bytes] = {}
    kept = [_keepable(each, written) for each in drawn]
    names = sorted({name for each, _ in kept if each for name in each.values})
    columns: dict[str, Any] = {
        "n": pa.array([each.n if each else 0 for each, _ in kept]),
        "bound": pa.array([each.bound if each else None for each, _ in kept], pa.float64()),
        "rank": lists([each.rank if each else np.empty(0) for each, _ in kept]),
        "constants": pa.array([constants for _, constants in kept], pa.binary()),
    }
    for name in names:
        values = [each.values.get(name) if each else None for each, _ in kept]
        columns[_VALUE + name] = pa.array(
            [None if v is None else np.ascontiguousarray(v).tobytes() for v in values],
            pa.large_binary(),
        )
        types = [None if v is None else json.dumps([v.dtype.str, v.shape[1:]]) for v in values]
        columns[_TYPE + name] = pa.array(types, pa.string())
    return pa.table(columns)


def _keepable(
    drawn: Drawn | None, written: dict[tuple[Any, ...], bytes]
) -> tuple[Drawn | None, bytes | None]:
    """Return the pixels if they can be kept, and what belongs to the frame as a whole.

    ``written`` has what was written before, by the objects: many frames share them.
    """
    if not drawn or not drawn.constants:
        return drawn, None
    same = tuple((name, id(value)) for name, value in drawn.constants.items())
    try:
        if same not in written:
            written[same] = to_bytes(drawn.constants)
    except NotPlainError:
        return None, None
    return drawn, written[same]


def from_table(table: pa.Table, rows: Iterable[int]) -> list[Drawn | None]:
    """Return the pixels in some rows of what :func:`to_table` returned.

    Raises
    ------
    NotPlainError, ValueError, KeyError
        If they are not in the table.
    """
    few = table.take(pa.array([*rows], pa.int64())).to_pydict()
    names = [name.removeprefix(_VALUE) for name in few if name.startswith(_VALUE)]
    drawn: list[Drawn | None] = []
    for i, bound in enumerate(few["bound"]):
        if bound is None:
            drawn.append(None)
            continue
        values = {}
        for name in names:
            if (content := few[_VALUE + name][i]) is not None:
                kind, shape = json.loads(few[_TYPE + name][i])
                values[name] = np.frombuffer(content, kind).reshape(-1, *shape)
        constants = few["constants"][i]
        rank = np.array(few["rank"][i], dtype=np.float64)
        drawn.append(
            Drawn(
                few["n"][i],
                bound,
                rank,
                np.zeros(len(rank), dtype=np.int64),
                values,
                _constants(constants) if constants else {},
            )
        )
    return drawn


@functools.lru_cache(maxsize=64)
def _constants(content: bytes) -> dict[str, Any]:
    """Return what was written; most frames have the same, such as wavelengths."""
    value = from_bytes(content)
    if not isinstance(value, dict):
        raise NotPlainError("it is not what was written")
    return value
