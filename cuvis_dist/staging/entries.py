"""What does a node's cache know of a file, and who may use or change the file now?

The index has one entry per file, a small file of its own. Its lock (``flock``, which the kernel
releases when a process dies) is the file's lock: shared by those who read the file, exclusive for
the one who fetches or evicts it.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from dataclasses import asdict, dataclass
from enum import Enum, auto
from pathlib import Path

from pyarrow.fs import FileInfo

from cuvis_dist.staging.disk import CacheDisk


class State(Enum):
    """What the cache has of a file."""

    #: Nothing: the file has no entry, or an empty one.
    REMOTE = auto()
    #: Room, and perhaps a part of it in ``fetching/``. A process that has the exclusive lock
    #: fetches it; if none has, the one that did was killed.
    FETCHING = auto()
    #: The whole file, as the store had it at the time of the entry's stamp.
    WHOLE = auto()


@dataclass(frozen=True)
class Entry:
    """What the index knows of a file; by default that it is :attr:`State.REMOTE`.

    Attributes
    ----------
    uri : str
        The file.
    size : int
        Bytes that are reserved for it.
    stamp : str
        What the store said of its time of change.
    mtime_ns : int
        Time of change of the copy, once it is whole.
    whole : bool
        Whether the copy is whole.
    """

    uri: str = ""
    size: int = 0
    stamp: str = ""
    mtime_ns: int = 0
    whole: bool = False

    @classmethod
    def parse(cls, content: bytes) -> Entry:
        """Return the entry that a file of the index has, which may be empty or damaged."""
        try:
            return cls(**json.loads(content))
        except (ValueError, TypeError):
            return cls()

    @property
    def state(self) -> State:
        """What the cache has of the file."""
        if not self.uri:
            return State.REMOTE
        return State.WHOLE if self.whole else State.FETCHING

    def is_of(self, info: FileInfo) -> bool:
        """Whether this is the file that the store says it has."""
        return (self.size, self.stamp) == (info.size, stamp_of(info))

    def has_copy(self, path: Path) -> bool:
        """Whether the file at a path is the copy as it was when it became whole."""
        try:
            found = os.lstat(path)
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (
            self.size,
            self.mtime_ns,
        )


def stamp_of(info: FileInfo) -> str:
    """Return what an entry keeps of the time of change that a store tells."""
    return str(info.mtime_ns)


class LockedEntry:
    """A file of the index, open and locked until it is closed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    @classmethod
    def take(cls, disk: CacheDisk, uri: str, how: int) -> LockedEntry | None:
        """Open and lock a file's entry, which may be a new one.

        Parameters
        ----------
        disk : CacheDisk
            The cache's folder.
        uri : str
            The file.
        how : int
            ``fcntl.LOCK_SH`` or ``fcntl.LOCK_EX``.

        Returns
        -------
        LockedEntry or None
            None if others have it.
        """
        path = disk.entry_of(uri)
        while True:
            with disk.writing():
                disk.make_folder(path.parent)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            locked = cls(descriptor)
            try:
                fcntl.flock(descriptor, how | fcntl.LOCK_NB)
                if locked._is_still(path):
                    return locked
            except BlockingIOError:
                locked.close()
                return None
            except BaseException:
                locked.close()
                raise
            locked.close()  # it was evicted before the lock was had

    @classmethod
    def take_to_evict(cls, path: Path) -> LockedEntry | None:
        """Open and lock, exclusively, a file of the index that is there and that nobody has."""
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:  # what it spoke of could not be fetched
            return None
        locked = cls(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if locked._is_still(path):
                return locked
        except BlockingIOError:  # the file is being read or fetched
            pass
        except BaseException:
            locked.close()
            raise
        locked.close()
        return None

    def _is_still(self, path: Path) -> bool:
        """Whether the locked file is the one that the path names."""
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.lstat(path))
        except FileNotFoundError:
            return False

    def read(self) -> Entry:
        """Return the entry."""
        return Entry.parse(os.pread(self._descriptor, 65536, 0))

    def write(self, entry: Entry) -> None:
        """Write over the entry before in one call, so that it is never half of each."""
        content = json.dumps(asdict(entry)).encode()
        os.pwrite(self._descriptor, content.ljust(os.fstat(self._descriptor).st_size), 0)

    def clear(self) -> None:
        """Make the file :attr:`State.REMOTE`."""
        os.ftruncate(self._descriptor, 0)

    def note_use(self) -> None:
        """Note that the file is used now: those used longest ago are evicted first."""
        os.utime(self._descriptor)

    def close(self) -> None:
        """Release the lock."""
        os.close(self._descriptor)
