"""What tells one set of settings or files from another? Its SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


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
