"""Which decoded frames does a node keep for later passes and epochs, and where?

One folder of a node, which all of its processes share that work for one driver: in memory
(``/dev/shm``) or on a disk. It is removed when the driver ends; where the driver was killed, the
next one on that node removes what nobody uses.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
import stat
import tempfile
import time
import uuid
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loguru import logger

from cuvis_dist.archive.frame_file import PackedFrame, read_frame
from cuvis_dist.errors import one_line
from cuvis_dist.storage import is_uri

#: Where Linux keeps files in memory. What Ray's object store may take of it by default is left.
_MEMORY, _SHARE_OF_MEMORY = Path("/dev/shm"), 1 / 3
#: Seconds that a folder which nobody uses is left alone: between two phases nobody does.
_LEFT_ALONE = 600.0
_LOCK, _BOOKS = ".lock", ".bytes"


class FrameCache:
    """Frames of one split that were decoded on this node, up to so many bytes.

    What is in stays in: every pass and epoch reads each frame once, so that a cache that made room
    for the frames read last would drop each one just before it is asked for again. On another node,
    it refers to that node's frames.

    Parameters
    ----------
    kind : str
        ``memory`` or ``disk``.
    limit : int
        Bytes that a node keeps at most, of all splits together.
    name : str
        What the frames of one data module share, and those of no other.
    split : str
        The split that the data module opened.

    Attributes
    ----------
    nodes : dict
        For whoever spreads the work: which node has computed what; it does not travel.
    """

    def __init__(self, kind: str, limit: int, name: str, split: str = "") -> None:
        self.kind, self.limit, self.name, self.split = kind, limit, name, split
        self.nodes: dict[tuple[Any, ...], str] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return FrameCache, (self.kind, self.limit, self.name, self.split)

    def of(self, split: str) -> FrameCache:
        """Return the cache for the frames of a split."""
        other = FrameCache(self.kind, self.limit, self.name, split)
        other.nodes = self.nodes
        return other

    @property
    def folder(self) -> Path:
        """Where this node keeps the frames of all splits; it need not be there."""
        in_memory = self.kind == "memory" and _MEMORY.is_dir()
        place = _MEMORY if in_memory else Path(tempfile.gettempdir())
        return place / f"cuvis-dist-{os.getuid()}-frames" / self.name

    def get(self, frame: Any, index: int) -> Any:
        """Return a frame's item, or None if it is not kept as its files are now.

        Parameters
        ----------
        frame : Frame
            Its identity.
        index : int
            Its place in the dataset of the split.
        """
        if not _shelf(self.folder, self.limit).ours:
            return None
        try:
            return read_frame(self.folder / self._file(frame, index))
        except OSError:
            return None

    def put(self, frame: Any, index: int, item: Any) -> None:
        """Keep a frame's item, as :meth:`get` will ask for it, if there is room for it."""
        shelf = _shelf(self.folder, self.limit)
        path = self.folder / self._file(frame, index)
        if shelf.full or path.exists():
            return
        try:
            packed = PackedFrame(item)
        except Exception as error:  # what a dataset of somebody's own gives cannot be pickled
            shelf.close(f"{frame} cannot be kept: {one_line(error)}")
            return
        if not shelf.take_room(packed.size):
            return
        part = path.with_suffix(f".{os.getpid()}")
        try:
            packed.write(part)
            os.replace(part, path)
        except OSError as error:  # a full disk
            part.unlink(missing_ok=True)
            shelf.give_back(packed.size)
            shelf.close(f"no more frames are kept in {self.folder}: {one_line(error)}")

    def held(self) -> int:
        """Return how many bytes this node keeps."""
        return _shelf(self.folder, self.limit).held()

    def clear(self) -> None:
        """Remove what this node keeps; who is about to read it, reads the frame itself."""
        shutil.rmtree(self.folder, ignore_errors=True)
        _shelf.cache_clear()

    def _file(self, frame: Any, index: int) -> str:
        """Return a name that changes where a frame's files do."""
        local = [name for name in frame.reads if not is_uri(name)]
        identity = self.split, index, frame.uid, [(name, _stamp(name)) for name in local]
        return f"{hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()}.frame"


class _Shelf:
    """The folder of a node's frames, as this process uses it, and the bytes taken there.

    It has a lock as long as it uses the folder, by which others know that somebody does.

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
            # Open until this process ends.
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(lock, fcntl.LOCK_SH)
            total = shutil.disk_usage(folder).total
        except OSError as error:
            self.full = True
            logger.warning(f"frames are decoded anew each time they are read: {one_line(error)}")
            return
        self.ours = True
        if _MEMORY in folder.parents:
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


@functools.lru_cache(maxsize=8)
def _shelf(folder: Path, limit: int) -> _Shelf:
    return _Shelf(folder, limit)


_caches: weakref.WeakKeyDictionary[Any, dict[str, FrameCache]] = weakref.WeakKeyDictionary()


def frame_cache(datamodule: Any, kind: str, limit: int) -> FrameCache | None:
    """Return where the frames of a data module are kept: the same for all that read it.

    They are removed from this node when nobody has the module any more.

    Parameters
    ----------
    datamodule : LightningDataModule
        The object as the driver has it. A module of which parameters are changed once frames of
        it are kept would be given those of before; make a new one.
    kind : str
        ``none``, ``memory`` or ``disk``.
    limit : int
        Bytes that a node keeps at most.
    """
    if kind == "none":
        return None
    known = _caches.setdefault(datamodule, {})
    if kind not in known:
        known[kind] = FrameCache(kind, limit, f"{os.getpid()}-{uuid.uuid4().hex}")
        weakref.finalize(datamodule, FrameCache.clear, known[kind])
    return known[kind]


def caches_in_use() -> list[FrameCache]:
    """Return the caches that this driver has."""
    return [cache for known in _caches.values() for cache in known.values()]


def clear_caches(caches: list[FrameCache]) -> None:
    """Remove from this node what it keeps for some caches."""
    for cache in caches:
        cache.clear()


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


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns
