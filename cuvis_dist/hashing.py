"""What tells one set of settings, files or fitted nodes from another? Its SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from cuvis_ai_core.node.node import Node


def hash_settings(value: Any) -> str:
    """Return the hash of what JSON can say; of anything else in it, as a string."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_files(*paths: Path) -> str:
    """Return one hash of the bytes of some files."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def hash_state(nodes: Iterable[Node]) -> str:
    """Return one hash of every buffer and parameter, by node and name."""
    digest = hashlib.sha256()
    for node in nodes:
        for name, value in sorted(node.state_dict().items()):
            digest.update(f"{node.name}.{name}{tuple(value.shape)}{value.dtype}".encode())
            flat = value.detach().cpu().reshape(-1).contiguous()
            digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
