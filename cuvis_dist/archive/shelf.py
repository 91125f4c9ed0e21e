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
from typing import BinaryIO

from loguru import logger

from cuvis_dist.errors import one_line

#: Where Linux keeps files in memory.
MEMORY = Path("/dev/shm")
#: What part of it may be taken: Ray's object store, which lies there too, has more by default.
_SHARE_OF_MEMORY = 1 / 3
#: Seconds that a folder which nobody uses is left alone: between two phases nobody does.
_LEFT_ALONE = 600.0
_LOCK, _BOOKS, _BEGUN, _DIGITS = ".lock", ".bytes", ".begun", 20


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
            (folder / _BEGUN).mkdir(exist_ok=True)
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

    def begin(self, name: str, size: int) -> BinaryIO | None:
        """Return a file for the bytes of one that is to be kept, unless they are too many.

        It becomes that file by :meth:`finish`. As long as it is open it is locked: what a process
        that was killed has begun is not, so that the next one gives its room back.

        Parameters
        ----------
        name : str
            The name of the file in the folder; if it is there or begun, it is not begun again.
        size : int
            How many bytes it will have.
        """
        try:
            with self._books() as books:
                held = self._give_back_killed(books)
                if held + size > self.limit:
                    return None
                part = open(self.folder / _BEGUN / name, "xb")  # noqa: SIM115
                fcntl.flock(part, fcntl.LOCK_EX)
                os.ftruncate(part.fileno(), size)
                if (self.folder / name).exists():
                    os.unlink(part.name)
                    return None
                # Last, so that what a process killed here has begun is there to be given back.
                _write(books, held + size)
                return part
        except FileExistsError:
            return None
        except (OSError, ValueError) as error:  # another process has ended the run
            self.close(f"no more frames are kept in {self.folder}: {one_line(error)}")
            return None

    def finish(self, part: BinaryIO) -> None:
        """Let all see a file whose bytes have been written; raises OSError if the disk is full."""
        part.flush()
        os.replace(part.name, self.folder / Path(part.name).name)
        part.close()

    def drop(self, part: BinaryIO) -> None:
        """Remove a file that could not be written, and give its room back."""
        with suppress(OSError):  # what is still to be written of it
            part.close()
        self.held()

    def held(self) -> int:
        """Return how many bytes are taken."""
        try:
            with self._books() as books:
                return self._give_back_killed(books)
        except (OSError, ValueError):
            return 0

    def close(self, why: str) -> None:
        """Keep no more frames from now on, and say why, unless the driver has ended the run."""
        self.full = True
        if self.folder.is_dir():
            logger.warning(why)

    def _give_back_killed(self, books: int) -> int:
        """Return how many bytes are taken, without what killed processes have begun."""
        found = list((self.folder / _BEGUN).iterdir())
        killed = [part for part in found if not _in_use(part)]
        held = int(os.pread(books, _DIGITS, 0) or 0)
        if killed:
            # They may have been killed before or after their bytes were counted.
            sizes = {part.name: _size(part) for part in found if part not in killed}
            sizes |= {file.name: _size(file) for file in self.folder.glob("[!.]*")}
            held = sum(sizes.values())
            _write(books, held)
            for part in killed:
                part.unlink(missing_ok=True)
        return held

    @contextmanager
    def _books(self) -> Iterator[int]:
        books = os.open(self.folder / _BOOKS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(books, fcntl.LOCK_EX)
            yield books
        finally:
            os.close(books)


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


def remove(folder: Path) -> None:
    """Remove a folder at once for all who use it, who then write nothing more there."""
    away = folder.with_name(f"{folder.name}.removed")
    with suppress(OSError):
        folder.rename(away)
        shutil.rmtree(away)


def _in_use(part: Path) -> bool:
    """Return whether some process writes a file that was begun, or has just finished it."""
    try:
        with open(part, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # finished meanwhile
        return 0


def _write(books: int, held: int) -> None:
    """Write a number in one piece, which is there as a whole or not at all."""
    os.pwrite(books, f"{held:0{_DIGITS}}".encode(), 0)
