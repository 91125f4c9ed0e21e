"""What of a run is kept for its report? Plain values in ``<output_dir>/report/``.

The report can be written again without the archive, without torch's pickles and on any machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from loguru import logger

from cuvis_dist.errors import InputError, one_line
from cuvis_dist.plain import NotPlainError, from_bytes, to_bytes
from cuvis_dist.storage import OutputFolder

#: The page about a run.
PAGE = "report.html"
#: The folder of these files, and of the CSV files of ``--data``.
FOLDER = "report"
#: The splits that are evaluated.
SPLITS = ("val", "test")
#: A file each: what phase 1 measured, what the nodes have learnt, what was seen of the frames that
#: were evaluated, and what happened when.
PARTS = ("measured", "nodes", "seen", "diary")


@dataclass(frozen=True)
class Kept:
    """What there is to show of a run; a part that is not there is empty.

    Attributes
    ----------
    place : str
        Path or URI of its output folder.
    record : dict
        Its ``run.json``.
    measured, nodes, seen : dict
        See :mod:`~cuvis_dist.report.noting`, which writes them.
    diary : list of dict
        See :class:`~cuvis_dist.report.diary.Diary`.
    """

    place: str
    record: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
    nodes: dict[str, Any] = field(default_factory=dict)
    seen: dict[str, Any] = field(default_factory=dict)
    diary: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """What the run is called where there are two: the last parts of its folder."""
        parts = PurePosixPath(self.place.replace("\\", "/")).parts
        return "/".join(parts[-2:]) if len(parts) > 1 else self.place

    @property
    def wavelengths(self) -> np.ndarray | None:
        """Those of its frames in nm, ``[C]``."""
        for part in (self.nodes, *self.seen.values()):
            if (found := part.get("wavelengths")) is not None:
                return np.asarray(found, dtype=float)
        return None

    @property
    def trained(self) -> bool:
        """Whether it ended with a training, whatever there is to show of its nodes."""
        return "trained" in self.nodes or bool(self.record.get("epochs"))

    def axis(self, channels: int, bands: bool = True) -> tuple[np.ndarray, str]:
        """Return where channels stand on an axis, ascending or descending, and its name."""
        known = self.wavelengths
        if bands and known is not None and len(known) == channels:
            steps = np.diff(known)  # of many bands some are the same to a nanometre
            if channels == 1 or (steps.any() and ((steps >= 0).all() or (steps <= 0).all())):
                return known, "wavelength in nm"
        return np.arange(channels, dtype=float), "band" if bands else "channel"

    def has_anomalies(self, split: str) -> bool:
        """Whether a pixel of a split is annotated as an anomaly."""
        part = self.seen.get(split, {})
        counted = (np.asarray(each["counts"]) for each in part.get("counts", {}).values())
        return any(int(counts[:, 1].sum()) > 0 for counts in counted) or any(
            picture["anomalies"] for picture in part.get("pictures", [])
        )


def read_kept(output: OutputFolder) -> Kept:
    """Return what a run has left.

    Raises
    ------
    InputError
        If there is no ``run.json``.
    ClusterError
        If a store does not answer.
    """
    try:
        record = json.loads(output.read("run.json"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{output} has no run.json: give the output folder of a run, init or train"
        ) from None
    except ValueError as error:
        raise InputError(f"{output.at('run.json')} is damaged: {one_line(error)}") from error
    if not isinstance(record, dict) or "trainrun" not in record:
        raise InputError(f"{output.at('run.json')} is not the record of a run")
    return kept_of(output, record)


def kept_of(output: OutputFolder, record: dict[str, Any]) -> Kept:
    """Return what a run has left, given its record; without what another phase 1 has measured."""
    parts = read_parts(output)
    if parts.get("measured", {}).get("initialized") != record.get("initialized"):
        parts.pop("measured", None)
    return Kept(str(output), record, **parts)


def forget(output: OutputFolder, *names: str) -> None:
    """Remove some of the parts; raises as :func:`keep` does."""
    output.remove(*map(_file, names))


def read_parts(output: OutputFolder) -> dict[str, Any]:
    """Return the parts that are there and can be read, by name."""
    parts: dict[str, Any] = {}
    for name in PARTS:
        try:
            value = from_bytes(output.read(_file(name)))
        except FileNotFoundError:
            continue
        except NotPlainError as error:
            logger.warning(f"{output.at(_file(name))} is not used for the report: {error}")
            continue
        if isinstance(value, list if name == "diary" else dict):
            parts[name] = value
    return parts


def keep(output: OutputFolder, name: str, value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write one of the parts; raises InputError or ClusterError if it cannot be written."""
    output.write(_file(name), to_bytes(value))


def _file(name: str) -> str:
    return f"{FOLDER}/{name}.state"
