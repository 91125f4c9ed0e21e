"""Can a universe CSV be read, and if not, which row is wrong and what is to be done?

The universe lists the frames of a data module: see ``cuvis_ai_dataloader``. What it refuses is
refused here, in words that name the row.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping

from cuvis_dist.errors import InputError, one_line

#: The data modules that read a universe, and whether an index may be a range there, as ``0-49``.
MODULES = {"npz_multi": False, "cu3s_multi": True}
_REQUIRED = ("source", "index")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_universe(
    content: bytes, place: str, data_module: str
) -> tuple[list[str], list[dict[str, str]]]:
    """Return the columns and rows of a universe.

    Parameters
    ----------
    content : bytes
        The CSV file.
    place : str
        Where it lies, for messages.
    data_module : str
        The data module that reads it.

    Raises
    ------
    InputError
        If it is no UTF-8 text, lacks a column, or has a row without a usable index.
    """
    if content.startswith(_UTF16):
        raise InputError(f"{place} is UTF-16 text: save it as UTF-8")
    reader = csv.DictReader(io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    try:
        columns = list(reader.fieldnames or ())
        _refuse_columns(columns, place)
        rows = []
        for row in reader:
            rows.append(row)
            _refuse_index(row, f"{place}, line {reader.line_num}", MODULES.get(data_module, False))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise InputError(
            f"{place} is no UTF-8 text (byte {content[error.start]:#04x}, line {line}): save it as "
            "UTF-8"
        ) from error
    except csv.Error as error:
        raise InputError(f"{place}, line {reader.line_num + 1}: {one_line(error)}") from error
    return columns, rows


def _refuse_columns(columns: list[str], place: str) -> None:
    missing = [name for name in _REQUIRED if name not in columns]
    if not missing:
        return
    lacks = f"{place} has no column {' and no column '.join(missing)}"
    if columns and columns[0].startswith("\ufeff"):
        raise InputError(f"{lacks}: it begins with a byte order mark; save it as UTF-8 without one")
    for sign, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if any(sign in column for column in columns):
            raise InputError(f"{lacks}: its columns are parted by {name}; save it with commas")
    first = f"its first line is {','.join(columns)!r}" if columns else "it is empty"
    raise InputError(f"{lacks}: {first}; the first line must name {', '.join(_REQUIRED)}")


def _refuse_index(row: Mapping[str, str], where: str, ranges: bool) -> None:
    cell = str(row["index"]).strip()
    if ranges and "-" in cell:
        return  # upstream's to read
    try:
        int(cell)
    except ValueError as error:
        said = f"is {cell!r}" if row["index"] else "is missing"
        raise InputError(
            f"{where}: the index of source {row['source']!r} {said}; it must be the whole number "
            "of a frame, counted from 0"
        ) from error
