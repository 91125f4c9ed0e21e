"""Which statistics are kept from run to run?

A store is a folder, or a place at a URI, of what was measured of frames: see
:class:`~cuvis_dist.store.store.Store`.
"""

from cuvis_dist.store.files import DamagedFileError, Entry, Identity, StoredFile, UnusableFileError
from cuvis_dist.store.identity import Key, Keys
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
