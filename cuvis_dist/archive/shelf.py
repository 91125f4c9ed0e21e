"""How do the processes of a node share a folder of bounded size that lasts as long as a run?

Whoever uses it holds a lock until the process ends, by which others know that somebody does. What a
driver that was killed has left is removed by the next one, once nobody holds the lock.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loguru import logger

from cuvis_dist.errors import one_line

#: Where Linux keeps files in memory.
MEMORY = Path("/dev/shm")
#: What part of it may be taken: Ray's object store, which lies there too, has more by default.
_SHARE_OF_MEMORY = 1 / 3
#: Seconds that a folder which nobody uses is left alone: between two phases nobody does.
_LEFT_ALONE = 600.0
_LOCK, _BOOKS = ".lock", ".bytes"


class Shelf:
    """The folder as this process uses it, and the bytes that are taken there.

    Parameters
    ----------
    folder : Path
        It is made, and others beside it that nobody uses are removed.
    limit : int
        Bytes that may be taken.

    Attributes
    ----------
    ours : bool
        Whether the folder is this user's alone, so that what is read there was written by them.
    full : bool
        Whether no more frames are kept.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.full, self.ours = folder, limit, False, False
        try:
            _make_private(folder.parent)
            _make_private(folder)
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            weakref.finalize(self, os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_SH)
            total = shutil.disk_usage(folder).total
        except OSError as error:
            self.full = True
            logger.warning(f"frames are decoded anew each time they are read: {one_line(error)}")
            return
        self.ours = True
        if MEMORY in folder.parents:
            self.limit = min(limit, int(total * _SHARE_OF_MEMORY))
        _remove_unused(folder)

    def take_room(self, size: int) -> bool:
        """Count the bytes of a file that is to be written, unless they are too many."""
        try:
            with self._books() as file:
                held = int(file.read() or 0)
                if held + size > self.limit:
                    return False
                _write(file, held + size)
        except (OSError, ValueError) as error:  # another process has ended the run
            self.close(f"no more frames are kept: {one_line(error)}")
            return False
        return True

    def give_back(self, size: int) -> None:
        """Count the bytes of a file no more that could not be written."""
        with suppress(OSError, ValueError), self._books() as file:
            _write(file, max(0, int(file.read() or 0) - size))

    def held(self) -> int:
        """Return how many bytes are taken."""
        try:
            with self._books() as file:
                return int(file.read() or 0)
        except (OSError, ValueError):
            return 0

    def close(self, why: str) -> None:
        """Keep no more frames from now on, and say why, unless the driver has ended the run."""
        self.full = True
        if self.folder.is_dir():
            logger.warning(why)

    @contextmanager
    def _books(self) -> Iterator[Any]:
        with open(self.folder / _BOOKS, "a+", encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file


def _make_private(folder: Path) -> None:
    """Make a folder that nobody else can write to; raises OSError if it is somebody else's."""
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{folder} is not a folder of this user")
    folder.chmod(0o700)


def _remove_unused(used: Path) -> None:
    """Remove what drivers that were killed have left beside the folder that is in use."""
    for folder in used.parent.iterdir():
        with suppress(OSError):
            recent = time.time() - folder.stat().st_mtime < _LEFT_ALONE
            if folder == used or recent:
                continue
            with open(folder / _LOCK, "wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _write(file: Any, held: int) -> None:
    file.seek(0)
    file.truncate()
    file.write(str(held))
