"""Which frames are there, and how does a worker read a shard?"""

from cuvis_dist.archive.batching import NamingCollate, Numbered
from cuvis_dist.archive.contents import Contents, in_words, read_contents, write_contents
from cuvis_dist.archive.frame_cache import (
    FrameCache,
    caches_in_use,
    clear_caches,
    frame_cache,
)
from cuvis_dist.archive.frames import Archive, Frame, NamedFrames, Shard, batch_bytes
from cuvis_dist.archive.opening import open_archive, open_split, setup_error
from cuvis_dist.archive.patience import Patience, Reader, be_patient, patience

__all__ = [
    "Archive",
    "Contents",
    "Frame",
    "FrameCache",
    "NamedFrames",
    "NamingCollate",
    "Numbered",
    "Patience",
    "Reader",
    "Shard",
    "batch_bytes",
    "be_patient",
    "caches_in_use",
    "clear_caches",
    "frame_cache",
    "in_words",
    "open_archive",
    "open_split",
    "patience",
    "read_contents",
    "setup_error",
    "write_contents",
]
