"""Which frames are there, and how does a worker read a shard?"""

from cuvis_dist.archive.frames import Archive, Frame, Shard, batch_bytes, open_archive, open_split

__all__ = ["Archive", "Frame", "Shard", "batch_bytes", "open_archive", "open_split"]
