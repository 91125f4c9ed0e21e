"""Which frames are there, and how does a worker read a shard?"""

from cuvis_dist.archive.frames import (
    Archive,
    Frame,
    NamedFrames,
    Shard,
    batch_bytes,
    open_archive,
    open_split,
    setup_error,
)
from cuvis_dist.archive.remote import fetched_when_opened, localize, portable

__all__ = [
    "Archive",
    "Frame",
    "NamedFrames",
    "Shard",
    "batch_bytes",
    "fetched_when_opened",
    "localize",
    "open_archive",
    "open_split",
    "portable",
    "setup_error",
]
