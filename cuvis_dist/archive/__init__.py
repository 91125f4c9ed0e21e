"""Which frames are there, and how does a worker read a shard?"""

from cuvis_dist.archive.batching import NamingCollate, Numbered
from cuvis_dist.archive.frames import Archive, Frame, NamedFrames, Shard, batch_bytes
from cuvis_dist.archive.opening import open_archive, open_split, setup_error

__all__ = [
    "Archive",
    "Frame",
    "NamedFrames",
    "NamingCollate",
    "Numbered",
    "Shard",
    "batch_bytes",
    "open_archive",
    "open_split",
    "setup_error",
]
