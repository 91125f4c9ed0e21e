"""How does a node's cache stay within its bytes?

Room for a file is reserved before it is fetched, and the files used least recently make way, none
that is being read. The bytes in use are counted in one file for all processes of the node.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from pyarrow.fs import FileInfo

from cuvis_dist.staging.disk import CacheDisk
from cuvis_dist.staging.entries import Entry, LockedEntry, State, stamp_of

#: With more entries than these, eviction makes more room than it must: it reads them all.
_MANY_ENTRIES = 256


class NoRoomError(Exception):
    """There is no room now: everything that could be evicted is being read."""


@dataclass
class Counters:
    """What a node's cache holds and did so far, by all processes together.

    Attributes
    ----------
    bytes : int
        Bytes that are in use or reserved.
    fetched, fetched_bytes : int
        Files that were fetched, and their bytes.
    evicted : int
        Whole files that were evicted.
    """

    bytes: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    evicted: int = 0

    def save(self, file: int) -> None:
        """Write over what an open file says, in one call."""
        os.pwrite(file, json.dumps(asdict(self)).ljust(256).encode(), 0)


class Room:
    """The bytes that a node's cache may take.

    Parameters
    ----------
    disk : CacheDisk
        The cache's folder.
    limit : int
        Bytes that the files may take.
    """

    def __init__(self, disk: CacheDisk, limit: int) -> None:
        self.disk = disk
        self.limit = limit

    def reserve(self, uri: str, locked: LockedEntry, info: FileInfo) -> None:
        """Make room for a file; its entry counts from now on, whatever happens.

        Raises
        ------
        NoRoomError
            If too much is being read.
        """
        with self.books() as (counters, file):
            self._forget(uri, locked, counters)
            free = self.limit - info.size
            if counters.bytes > free:
                self._evict(counters, free)
            if counters.bytes > free:
                raise NoRoomError
            counters.bytes += info.size
            with self.disk.writing(what=uri):
                counters.save(file)  # first: a death in between counts too much, not too little
                locked.write(Entry(uri, info.size, stamp_of(info)))

    def release(self, uri: str, locked: LockedEntry) -> None:
        """Give back the room of a file that could not be fetched."""
        with self.books() as (counters, _):
            self._forget(uri, locked, counters)

    def settle(self, locked: LockedEntry, entry: Entry) -> None:
        """Count a file that is whole now."""
        with self.books() as (counters, _):
            with self.disk.writing(what=entry.uri):
                locked.write(entry)
            counters.fetched += 1
            counters.fetched_bytes += entry.size

    def empty(self) -> None:
        """Evict all that is not being read."""
        with self.books() as (counters, _):
            self._evict(counters, 0)

    def counters(self) -> Counters:
        """Return what the cache holds and did so far."""
        with self.books() as (counters, _):
            return counters

    @contextmanager
    def books(self) -> Iterator[tuple[Counters, int]]:
        """Let the block read and change the counters, alone.

        The block is also given a descriptor of the file that they are in. They are saved when it
        ends, however that happens.
        """
        self.disk.prepare()
        with self.disk.writing():
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            file = os.open(self.disk.state, flags, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                counters = Counters(**json.loads(os.pread(file, 4096, 0)))
            except (ValueError, TypeError):  # a new cache, or one whose books were lost
                counters = Counters()
                self._evict(counters, self.limit)
            try:
                yield counters, file
            finally:
                with self.disk.writing():
                    counters.save(file)
        finally:
            os.close(file)

    def _forget(self, uri: str, locked: LockedEntry, counters: Counters) -> None:
        """Remove what is here of a file, and count it no longer."""
        if (entry := locked.read()).state is not State.REMOTE:
            self.disk.remove(uri)
            counters.bytes -= entry.size
            locked.clear()

    def _evict(self, counters: Counters, most: int) -> None:
        """Remove the files used least recently until ``most`` bytes are left, none being read.

        The bytes in use are counted anew from the entries.
        """
        entries = []
        for path in self.disk.index.glob("*/*"):
            with suppress(OSError):
                size = Entry.parse(path.read_bytes()).size
                entries.append((path.stat().st_mtime_ns, size, path))
        counters.bytes = sum(size for _, size, _ in entries)
        if len(entries) > _MANY_ENTRIES:
            most = max(0, most - self.limit // 16)
        for _, _, path in sorted(entries):
            if counters.bytes <= most:
                return
            locked = LockedEntry.take_to_evict(path)
            if locked is None:
                continue
            try:
                if (entry := locked.read()).state is not State.REMOTE:
                    self.disk.remove(entry.uri)
                    counters.bytes -= entry.size
                    counters.evicted += entry.state is State.WHOLE
                path.unlink()
            finally:
                locked.close()
