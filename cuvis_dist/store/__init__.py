"""Which statistics are kept from run to run?

A store is a folder, or a place at a URI, of what was measured of frames: see
:class:`~cuvis_dist.store.store.Store`.

Names are loaded when they are first asked for: who looks into a store needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuvis_dist.lazy import found_in

if TYPE_CHECKING:
    from cuvis_dist.store.files import (
        DamagedFileError,
        Entry,
        Identity,
        Key,
        StoredFile,
        UnusableFileError,
    )
    from cuvis_dist.store.identity import Keys
    from cuvis_dist.store.store import Found, Store, identity_of

__all__ = [
    "DamagedFileError",
    "Entry",
    "Found",
    "Identity",
    "Key",
    "Keys",
    "Store",
    "StoredFile",
    "UnusableFileError",
    "identity_of",
]

__getattr__ = found_in(
    __name__,
    {
        "DamagedFileError": "files",
        "Entry": "files",
        "Found": "store",
        "Identity": "files",
        "Key": "files",
        "Keys": "identity",
        "Store": "store",
        "StoredFile": "files",
        "UnusableFileError": "files",
        "identity_of": "store",
    },
)
