"""A stand-in for the CUVIS SDK: sessions are zip files of arrays, the rest behaves as the SDK.

Only what cuvis-ai-dataloader calls. ``tests/archive/test_standin.py`` checks names and
signatures against the real ``cuvis`` package. Every processing context appends a line
``<pid> <path>`` to the file that ``CUVIS_STANDIN_LOG`` names.
"""

from __future__ import annotations

import os
from enum import IntEnum
from pathlib import Path
from types import SimpleNamespace

import numpy as np


class SDKException(Exception):
    pass


class ReferenceType(IntEnum):
    Dark = 0
    White = 1


class ProcessingMode(IntEnum):
    Preview = 0
    Raw = 1
    DarkSubtract = 2
    Reflectance = 3
    SpectralRadiance = 4


class SdkSettings:
    def __init__(self, *args, force_gpu_mode: str | None = None, **kwargs) -> None:
        self.force_gpu_mode = force_gpu_mode


def init(settings_path=".", global_loglevel=None, logfile_name=None) -> None:
    pass


class Measurement:
    def __init__(self, raw: np.ndarray, wavelength: np.ndarray) -> None:
        self.raw, self.wavelength = raw, wavelength
        self.data: dict = {}

    @property
    def cube(self):
        return self.data["cube"]


class SessionFile:
    def __init__(self, base: Path | str) -> None:
        base = Path(base).with_suffix(".cu3s")  # as the SDK does, whatever was asked for
        if not base.exists():
            raise FileNotFoundError("Could not open SessionFile File! File not found!")
        try:
            with np.load(base) as content:
                self._cubes, self._wavelength = content["cubes"], content["wavelength"]
        except Exception:
            raise SDKException("Session File format unkown.") from None
        self.path = str(base)
        self._pc = None

    def get_size(self, itemtype=None) -> int:
        return len(self._cubes)

    def __len__(self) -> int:
        return self.get_size()

    @property
    def fps(self) -> float:
        return 15.0

    def get_measurement(self, frameNo: int = 0, itemtype=None) -> Measurement | None:
        if frameNo >= len(self._cubes):
            return None
        return Measurement(self._cubes[frameNo], self._wavelength)

    def get_reference(self, frameNo: int, reftype: ReferenceType) -> Measurement | None:
        level = 4000 if reftype is ReferenceType.White else 0
        return Measurement(np.full_like(self._cubes[0], level), self._wavelength)


class ProcessingContext:
    def __init__(self, base: SessionFile | Measurement, load_references: bool = True) -> None:
        self.processing_mode = ProcessingMode.Raw
        if log := os.environ.get("CUVIS_STANDIN_LOG"):
            with open(log, "a", encoding="utf-8") as file:
                file.write(f"{os.getpid()} {base.path}\n")

    def apply(self, mesu: Measurement) -> Measurement:
        cube = mesu.raw
        if self.processing_mode is ProcessingMode.Reflectance:
            cube = (cube * np.float32(10000 / 4000)).astype(np.uint16)
        mesu.data["cube"] = SimpleNamespace(array=cube, wavelength=mesu.wavelength)
        return mesu

    def set_reference(self, data: Measurement, refType: ReferenceType) -> None:
        pass

    def get_reference(self, refType: ReferenceType) -> Measurement | None:
        return None


def write_session(path: Path, cubes: np.ndarray, wavelength: np.ndarray) -> None:
    """Write ``cubes`` ``[N, H, W, C]`` uint16 as a session that this module opens."""
    with open(path, "wb") as file:
        np.savez(file, cubes=cubes, wavelength=wavelength)
