"""Which files do tests plant in a results folder? Pickles that touch a marker when read."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import torch


class Touch:
    """An object whose unpickling makes a file."""

    def __init__(self, marker: Path | str) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return _touch, (self.marker,)


def _touch(marker: str) -> dict:
    Path(marker).touch()
    return {"epoch": 1, "state_dict": {}}


def pickles(marker: Path) -> dict[str, bytes]:
    """Return such files, by their kind: of Python, of torch, and behind a checksum."""
    buffer = io.BytesIO()
    torch.save({"state_dict": Touch(marker), "epoch": 1}, buffer)
    plain = pickle.dumps(Touch(marker))
    return {
        "pickle": plain,
        "torch": buffer.getvalue(),
        "checksum": hashlib.sha256(plain).digest() + plain,
    }
