"""How does a remote recording come to lie where the SDK can open it?

The SDK and upstream's readers open local paths. So a node keeps copies of remote files in one
folder that its worker processes share (:mod:`~cuvis_dist.staging.disk`), of bounded size
(:mod:`~cuvis_dist.staging.room`). A file is fetched by one process while the others wait
(:mod:`~cuvis_dist.staging.fetching`), and held by whoever reads it, so that nobody evicts it
meanwhile (:mod:`~cuvis_dist.staging.entries`).

A file in the cache is compared with the store (size, time of change) when a process first reads
it, and fetched again if it changed.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from pyarrow.fs import FileInfo, FileSelector, FileType

from cuvis_dist.errors import ClusterError
from cuvis_dist.staging.disk import CacheDisk, FullDiskError
from cuvis_dist.staging.entries import LockedEntry
from cuvis_dist.staging.fetching import Fetcher
from cuvis_dist.staging.room import Counters, NoRoomError, Room
from cuvis_dist.staging.uris import fetched, join, look, remote

#: On a node, wins over the setting ``stage_dir``: nodes may have their fast disks elsewhere.
STAGE_DIR = "CUVIS_DIST_STAGE_DIR"
#: Readers wait for so many seconds for room that others hold.
PATIENCE = 40.0
#: Readers who wait read at most so many bytes at a time of what is being fetched.
_SEEN = 2**17


class Staging:
    """Copies of remote files on this node.

    When pickled to another node, it refers to that node's cache instead of this one's.

    Parameters
    ----------
    folder : Path
        Made when it is first used; must be this user's alone.
    limit : int
        Bytes that the files may take.

    Attributes
    ----------
    configured : str or None
        The folder as the settings name it, for other nodes.
    disk : CacheDisk
        The folder.
    room : Room
        Its bytes.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.disk = CacheDisk(folder)
        self.room = Room(self.disk, limit)
        self.configured: str | None = str(folder)
        self._fetcher = Fetcher(self.room)

    def __reduce__(self) -> tuple[Any, ...]:
        return staging_here, (self.configured, self.room.limit)

    @property
    def files(self) -> Path:
        """The folder below which the copies lie."""
        return self.disk.files

    # ---- names ---------------------------------------------------------------------------

    def path_of(self, uri: str) -> Path:
        """Return where the file lies while it is held; raises InputError for an unsafe key."""
        return self.disk.path_of(uri)

    def uri_of(self, path: str | PurePath) -> str | None:
        """Return the URI whose copy, or rewritten list, a path of the cache is; else None."""
        return self.disk.uri_of(path)

    def uris_in(self, text: str) -> str:
        """Return ``text`` with the URIs in place of paths of the cache."""
        return self.disk.uris_in(text)

    # ---- reading -------------------------------------------------------------------------

    @contextmanager
    def held(self, uris: Iterable[str]) -> Iterator[None]:
        """Have the files at :meth:`path_of`, whole, as long as the block lasts.

        Raises
        ------
        DataError
            If a file does not exist or cannot be fetched.
        InputError
            If it is larger than the cache.
        ClusterError
            If this node's disk is full or the cache cannot be written, or other readers hold
            all of it for long.
        """
        wanted = list(dict.fromkeys(uris))
        locks: list[LockedEntry] = []
        patience = time.monotonic() + PATIENCE
        try:
            while True:
                try:
                    for uri in wanted[len(locks) :]:
                        locks.append(self._hold(uri))
                    break
                except NoRoomError:
                    while locks:  # others may be waiting for these
                        locks.pop().close()
                    if time.monotonic() > patience:
                        raise ClusterError(
                            f"the cache {self.disk.folder} on {socket.gethostname()} has no room: "
                            f"all of its {self.room.limit} bytes are being read. Raise "
                            "stage_bytes, or use fewer workers per node"
                        ) from None
                    _pause()
            yield
        finally:
            for lock in locks:
                lock.close()

    def read(self, uri: str) -> bytes:
        """Return the content of a file, fetched for the purpose; raises as :meth:`held` does."""
        with self.held([uri]):
            return self.path_of(uri).read_bytes()

    def counters(self) -> Counters:
        """Return what the cache holds and did so far."""
        return self.room.counters()

    def _hold(self, uri: str) -> LockedEntry:
        """Return the file's entry with a shared lock, once the file is here; fetch it if need be.

        Raises
        ------
        NoRoomError
            If there is no room for it now.
        """
        seen = 0
        while True:
            for how in (fcntl.LOCK_SH, fcntl.LOCK_EX):
                locked, held = self._take(uri, how), False
                if locked is None:  # another process fetches it, or is about to
                    seen = self._see(uri, seen)
                    _pause()
                    break
                try:
                    usable = self._fetcher.is_usable(uri, locked)
                    if usable and how == fcntl.LOCK_SH:
                        locked.note_use()
                        held = True
                        return locked
                    if not usable and how == fcntl.LOCK_EX:
                        self._fetcher.fetch(uri, locked)
                finally:
                    if not held:
                        locked.close()

    def _take(self, uri: str, how: int) -> LockedEntry | None:
        """Return the file's entry as :meth:`LockedEntry.take` does; others go if it has no room."""
        try:
            return LockedEntry.take(self.disk, uri, how)
        except FullDiskError:
            self.room.empty()
            return LockedEntry.take(self.disk, uri, how)

    def _see(self, uri: str, seen: int) -> int:
        """Read some of what another process has fetched meanwhile; return how much it has.

        A training worker that waits is known to be alive by what it reads.
        """
        try:
            with open(self.disk.part_of(uri), "rb", buffering=0) as part:
                size = part.seek(0, os.SEEK_END)
                if size != seen:
                    part.seek(max(0, size - _SEEN))
                    part.read(_SEEN)
                return size
        except OSError:
            return seen

    # ---- listing -------------------------------------------------------------------------

    def look(self, uri: str) -> FileInfo:
        """Return what lies at a URI; raises DataError if the store does not answer."""
        return look(uri)

    def place(self, uri: str) -> Path:
        """Let a file show in its folder, without content as long as it is not held."""
        path = self.path_of(uri)
        self.disk.mark_listed(path.parent)
        self.disk.show(path)
        return path

    def forget(self, uri: str) -> None:
        """Let a file show no longer."""
        self.disk.unlink(self.path_of(uri))

    def place_folder(self, uri: str, recursive: bool) -> Path:
        """Let all files of a remote folder show, and none that are not there; return it.

        Raises
        ------
        DataError
            If the store does not answer.
        """
        filesystem, key = remote(uri)
        found = fetched(
            uri, lambda: filesystem.get_file_info(FileSelector(key, recursive=recursive))
        )
        there = set()
        for info in found:
            if info.type == FileType.File:
                inside = info.path.removeprefix(key.rstrip("/")).lstrip("/")
                there.add(self.place(join(uri, inside)))
        folder = self.path_of(uri)
        self.disk.mark_listed(folder)
        for path in self.disk.unlisted(folder, there, recursive):
            self.disk.unlink(path)
        return folder

    def rewrite(self, uri: str, content: bytes) -> Path:
        """Keep another content for a file; return its path, which stands for ``uri``."""
        path = self.disk.rewritten_of(uri)
        part = self.disk.part_of(uri)
        part = part.with_name(f"{part.name}.{os.getpid()}")
        with self.disk.writing():
            self.disk.make_folder(path.parent)
            part.write_bytes(content)
            os.replace(part, path)
        return path


def _pause() -> None:
    """Wait a moment, not the same one as other processes that wait."""
    time.sleep(random.uniform(0.02, 0.1))


_here: dict[tuple[Path, int], Staging] = {}


def staging_here(configured: str | None, limit: int) -> Staging:
    """Return the cache of this node: one object per process, folder and limit.

    Parameters
    ----------
    configured : str or None
        The folder of the settings; :data:`STAGE_DIR` in this node's environment wins over it, and
        without either the cache lies below the folder for temporary files.
    limit : int
        Bytes that the files may take.
    """
    chosen = os.environ.get(STAGE_DIR) or configured
    folder = Path(chosen or f"{tempfile.gettempdir()}/cuvis-dist-{os.getuid()}-staged")
    folder = folder.expanduser().absolute()
    if (folder, limit) not in _here:
        _here[folder, limit] = Staging(folder, limit)
        _here[folder, limit].configured = configured
    return _here[folder, limit]


def stagings() -> list[Staging]:
    """Return the caches that this process uses; none where nothing is remote."""
    return list(_here.values())
