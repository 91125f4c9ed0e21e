"""Which frames are there, and how does a worker read a shard?

Names are loaded when they are first asked for: who looks into a store needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuvis_dist.lazy import found_in

if TYPE_CHECKING:
    from cuvis_dist.archive.batching import NamingCollate, Numbered
    from cuvis_dist.archive.contents import Contents, in_words, read_contents, write_contents
    from cuvis_dist.archive.frame_cache import FrameCache, caches_in_use, clear_caches
    from cuvis_dist.archive.frames import Archive, Frame, NamedFrames, Shard, batch_bytes
    from cuvis_dist.archive.opening import open_archive, open_split, setup_error
    from cuvis_dist.archive.patience import Patience, Reader, be_patient

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
    "in_words",
    "open_archive",
    "open_split",
    "read_contents",
    "setup_error",
    "write_contents",
]

__getattr__ = found_in(
    __name__,
    {
        "Archive": "frames",
        "Contents": "contents",
        "Frame": "frames",
        "FrameCache": "frame_cache",
        "NamedFrames": "frames",
        "NamingCollate": "batching",
        "Numbered": "batching",
        "Patience": "patience",
        "Reader": "patience",
        "Shard": "frames",
        "batch_bytes": "frames",
        "be_patient": "patience",
        "caches_in_use": "frame_cache",
        "clear_caches": "frame_cache",
        "in_words": "contents",
        "open_archive": "opening",
        "open_split": "opening",
        "read_contents": "contents",
        "setup_error": "opening",
        "write_contents": "contents",
    },
)
