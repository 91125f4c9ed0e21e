"""How does a remote recording come to lie where the SDK can open it?

The SDK and upstream's readers open local paths. So a node keeps copies of remote files in one
folder that its worker processes share: of bounded size, the least recently used going first. A
file is fetched by one process while the others wait, under a temporary name, compared with what
the store says of it, and held by whoever reads it, so that nobody evicts it meanwhile. All of
this rests on ``flock``, which the kernel releases when a process dies::

    <folder>/files/<scheme>/<authority>/<key>   whole files
    <folder>/index/                             one entry per file; its lock is the file's lock
    <folder>/fetching/                          what is being fetched
    <folder>/rewritten/                         lists of files in which paths stand for URIs
    <folder>/state.json                         bytes in use and counters; its lock guards both

A file in the cache is compared with the store (size, time of change) when a process first reads
it, and fetched again if it changed.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import random
import re
import socket
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from loguru import logger
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from cuvis_dist.errors import ClusterError, InputError, one_line
from cuvis_dist.staging.uris import fetched, join, parts_of, remote, uri_of_parts

#: On a node, wins over the setting ``stage_dir``: nodes may have their fast disks elsewhere.
STAGE_DIR = "CUVIS_DIST_STAGE_DIR"

PATIENCE = 40.0  # seconds to wait for room that other readers hold
_CHUNK = 8 * 2**20
_LISTED = ".listed"


@dataclass
class _Entry:
    """What the index knows of a file."""

    uri: str
    size: int
    stamp: str
    mtime_ns: int = 0
    whole: bool = False


@dataclass
class Counters:
    """What a node's cache holds and did so far, by all processes together."""

    bytes: int = 0
    fetched: int = 0
    fetched_bytes: int = 0
    evicted: int = 0

    def save(self, file: int) -> None:
        """Write over what an open file says, in one call."""
        os.pwrite(file, json.dumps(asdict(self)).ljust(256).encode(), 0)


class _NoRoomError(Exception):
    """Everything that could be evicted is being read."""


class _FullDiskError(ClusterError):
    """There is less space on the disk than the cache may use."""


class Staging:
    """Copies of remote files on this node.

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
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = Path(os.path.realpath(folder.parent)) / folder.name
        self.limit = limit
        self.configured: str | None = str(folder)
        self.files, self._index = self.folder / "files", self.folder / "index"
        self._fetching, self._rewritten = self.folder / "fetching", self.folder / "rewritten"
        self._checked: set[str] = set()
        self._plain_etags: dict[str, bool] = {}
        self._prepared = False

    def __reduce__(self) -> tuple[Any, ...]:
        """Mean, on another node, the cache of that node."""
        return staging_here, (self.configured, self.limit)

    # ---- names ---------------------------------------------------------------------------

    def path_of(self, uri: str) -> Path:
        """Return where the file lies while it is held; raises InputError for an unsafe key."""
        return self.files.joinpath(*parts_of(uri))

    def uri_of(self, path: str | PurePath) -> str | None:
        """Return the URI whose copy, or rewritten list, a path of the cache is; else None."""
        for tree in (self.files, self._rewritten):
            inside = str(path).removeprefix(f"{tree}{os.sep}")
            if inside != str(path):
                return uri_of_parts(*inside.split(os.sep))
        return None

    def uris_in(self, text: str) -> str:
        """Return ``text`` with the URIs in place of paths of the cache."""
        trees = "|".join(re.escape(str(tree)) for tree in (self.files, self._rewritten))
        return re.sub(
            rf"(?:{trees})/[^\s'\",;)]*[^\s'\",;).:]", lambda m: self.uri_of(m[0]) or "", text
        )

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
        locks: list[int] = []
        patience = time.monotonic() + PATIENCE
        try:
            while True:
                try:
                    for uri in wanted[len(locks) :]:
                        locks.append(self._hold(uri))
                    break
                except _NoRoomError:
                    while locks:  # others may be waiting for these
                        os.close(locks.pop())
                    if time.monotonic() > patience:
                        raise ClusterError(
                            f"the cache {self.folder} on {socket.gethostname()} has no room: all "
                            f"of its {self.limit} bytes are being read. Raise stage_bytes, or use "
                            "fewer workers per node"
                        ) from None
                    time.sleep(random.uniform(0.02, 0.1))
            yield
        finally:
            for lock in locks:
                os.close(lock)

    def read(self, uri: str) -> bytes:
        """Return the content of a file, fetched for the purpose."""
        with self.held([uri]):
            return self.path_of(uri).read_bytes()

    def counters(self) -> Counters:
        """Return what the cache holds and did so far."""
        with self._books() as (counters, _):
            return counters

    # ---- listing -------------------------------------------------------------------------

    def look(self, uri: str) -> FileInfo:
        """Return what lies at a URI; raises DataError if the store does not answer."""
        filesystem, key = remote(uri)
        return fetched(uri, lambda: filesystem.get_file_info(key))

    def place(self, uri: str) -> Path:
        """Let a file show in its folder, without content as long as it is not held."""
        path = self.path_of(uri)
        self._mark_listed(path.parent)
        with suppress(FileExistsError), self._writing(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        return path

    def forget(self, uri: str) -> None:
        """Let a file show no longer."""
        self._unlink(self.path_of(uri))

    def place_folder(self, uri: str, recursive: bool) -> Path:
        """Let all files of a remote folder show, and none that are not there; return it."""
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
        self._mark_listed(folder)
        for path in list(folder.rglob("*") if recursive else folder.glob("*")):
            if path.name != _LISTED and not path.is_dir() and path not in there:
                self._unlink(path)
        return folder

    def rewrite(self, uri: str, content: bytes) -> Path:
        """Keep another content for a file; return its path, which stands for ``uri``."""
        path = self._rewritten.joinpath(*parts_of(uri))
        part = self._fetching / f"{_name(uri)}.{os.getpid()}"
        with self._writing():
            self._make_folder(path.parent)
            part.write_bytes(content)
            os.replace(part, path)
        return path

    def _mark_listed(self, folder: Path) -> None:
        with self._writing():
            self._make_folder(folder)
            (folder / _LISTED).touch(mode=0o600)

    # ---- holding and fetching ------------------------------------------------------------

    def _hold(self, uri: str) -> int:
        """Return a descriptor that holds the file until it is closed."""
        seen = 0
        while True:
            for how in (fcntl.LOCK_SH, fcntl.LOCK_EX):
                lock, held = self._lock(uri, how), False
                if lock is None:  # another process fetches it, or is about to
                    seen = self._see(uri, seen)
                    time.sleep(random.uniform(0.02, 0.1))
                    break
                try:
                    usable = self._usable(uri, lock)
                    if usable and how == fcntl.LOCK_SH:
                        os.utime(lock)
                        held = True
                        return lock
                    if not usable and how == fcntl.LOCK_EX:
                        self._fetch(uri, lock)
                finally:
                    if not held:
                        os.close(lock)

    def _lock(self, uri: str, how: int) -> int | None:
        """Open and lock a file's entry, or return None if others have it."""
        path = self._entry_path(uri)
        while True:
            with self._writing():
                self._make_folder(path.parent)
                lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(lock, how | fcntl.LOCK_NB)
                if _is_still(lock, path):
                    return lock
            except BlockingIOError:
                os.close(lock)
                return None
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # it was evicted before the lock was had

    def _see(self, uri: str, seen: int) -> int:
        """Read some of what another process has fetched meanwhile; return how much it has.

        A training worker that waits is known to be alive by what it reads.
        """
        try:
            with open(self._fetching / _name(uri), "rb", buffering=0) as part:
                size = part.seek(0, os.SEEK_END)
                if size != seen:
                    part.seek(max(0, size - 2**17))
                    part.read(2**17)
                return size
        except OSError:
            return seen

    def _usable(self, uri: str, lock: int) -> bool:
        """Whether the file is here, whole, and the one that the store has."""
        entry = _read_entry(lock)
        if entry is None or not entry.whole:
            return False
        try:
            found = os.lstat(self.path_of(uri))
        except OSError:
            return False
        if not stat.S_ISREG(found.st_mode) or (found.st_size, found.st_mtime_ns) != (
            entry.size,
            entry.mtime_ns,
        ):
            return False
        if uri not in self._checked:
            info = self.look(uri)
            if (info.size, _stamp(info)) != (entry.size, entry.stamp):
                return False
            self._checked.add(uri)
        return True

    def _fetch(self, uri: str, lock: int) -> None:
        """Fetch a file whose entry this process alone has locked."""
        filesystem, key = remote(uri)
        damaged: set[str] = set()

        def attempt() -> None:
            info = filesystem.get_file_info(key)
            if info.type != FileType.File:
                raise FileNotFoundError(f"{uri} does not exist")
            if info.size > self.limit:
                raise InputError(
                    f"{uri} has {info.size} bytes, more than the cache of a node may take "
                    f"({self.limit}); raise stage_bytes"
                )
            self._reserve(uri, lock, info)
            try:
                mtime_ns = self._copy(uri, filesystem, key, info, damaged)
                with self._books() as (counters, _):
                    _write_entry(lock, _Entry(uri, info.size, _stamp(info), mtime_ns, True))
                    counters.fetched += 1
                    counters.fetched_bytes += info.size
            except BaseException:
                self._release(uri, lock)
                raise
            self._checked.add(uri)

        started = time.perf_counter()
        try:
            try:
                fetched(uri, attempt)
            except _FullDiskError:
                with self._books() as (counters, _):
                    self._evict(counters, 0)
                fetched(uri, attempt)
        except BaseException:
            self._entry_path(uri).unlink(missing_ok=True)
            raise
        logger.debug(f"staged {uri} in {time.perf_counter() - started:.2f} s")

    def _copy(
        self, uri: str, filesystem: FileSystem, key: str, info: FileInfo, damaged: set[str]
    ) -> int:
        """Copy and verify; return the time of change of the copy."""
        part, path = self._fetching / _name(uri), self.path_of(uri)
        size, digest = 0, hashlib.md5(usedforsecurity=False)
        with filesystem.open_input_stream(key) as source:
            etag = (source.metadata() or {}).get("ETag", b"").decode().strip('"')
            flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW
            with self._writing():
                target = os.open(part, flags, 0o600)
            try:
                while chunk := source.read(_CHUNK):
                    with self._writing(what=uri):
                        _write_all(target, chunk)
                    digest.update(chunk)
                    size += len(chunk)
                with self._writing(what=uri):
                    os.fsync(target)
            finally:
                os.close(target)
        if size != info.size:
            raise OSError(f"{size} of {info.size} bytes arrived")
        if not self._verified(uri, etag, digest.digest(), damaged):
            again = filesystem.get_file_info(key)
            if (again.size, _stamp(again)) != (info.size, _stamp(info)):
                raise OSError("it was changed while it was fetched")
        with self._writing():
            self._make_folder(path.parent)
            os.replace(part, path)
            return os.lstat(path).st_mtime_ns

    def _verified(self, uri: str, etag: str, md5: bytes, damaged: set[str]) -> bool:
        """Whether an ETag vouches for the content; raises OSError if it speaks against it.

        The ETag of an object on S3 is its MD5, or ``MD5(MD5)-1`` if it was uploaded in one
        part; that of several parts depends on their sizes. Nor is it the MD5 of one encrypted
        with a managed key: then the same content comes twice.
        """
        root = uri[: uri.find("/", uri.find("://") + 3)]
        if not re.fullmatch(r"[0-9a-f]{32}(-1)?", etag) or not self._plain_etags.get(root, True):
            return False
        parts = hashlib.md5(md5, usedforsecurity=False).hexdigest() + "-1"
        if etag == (parts if etag.endswith("-1") else md5.hex()):
            return True
        if md5.hex() in damaged:
            logger.debug(f"{root} has ETags that are no checksums")
            self._plain_etags[root] = False
            return False
        damaged.add(md5.hex())
        raise OSError(f"what arrived has the MD5 {md5.hex()}, the store says {etag}")

    # ---- room ----------------------------------------------------------------------------

    def _reserve(self, uri: str, lock: int, info: FileInfo) -> None:
        """Make room for a file; its entry counts from now on, whatever happens."""
        with self._books() as (counters, file):
            if (before := _read_entry(lock)) is not None:
                self._remove(uri)
                counters.bytes -= before.size
                os.ftruncate(lock, 0)
            free = self.limit - info.size
            if counters.bytes > free:
                self._evict(counters, free)
            if counters.bytes > free:
                raise _NoRoomError
            counters.bytes += info.size
            counters.save(file)  # first: a death in between counts too much, not too little
            _write_entry(lock, _Entry(uri, info.size, _stamp(info)))

    def _release(self, uri: str, lock: int) -> None:
        with self._books() as (counters, _):
            if (entry := _read_entry(lock)) is not None:
                self._remove(uri)
                counters.bytes -= entry.size
                os.ftruncate(lock, 0)

    def _evict(self, counters: Counters, most: int) -> None:
        """Remove the files used least recently until ``most`` bytes are left, none being read."""
        entries = []
        for path in self._index.glob("*/*"):
            with suppress(OSError):
                entry = _parse_entry(path.read_bytes())
                entries.append((path.stat().st_mtime_ns, entry.size if entry else 0, path))
        counters.bytes = sum(size for _, size, _ in entries)
        if len(entries) > 256:  # finding the oldest means reading them all
            most = max(0, most - self.limit // 16)
        for _, _, path in sorted(entries):
            if counters.bytes <= most:
                return
            try:
                lock = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
            except FileNotFoundError:  # could not be fetched
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _is_still(lock, path):
                    continue
                entry = _read_entry(lock)
                if entry is not None:
                    self._remove(entry.uri)
                    counters.bytes -= entry.size
                    counters.evicted += entry.whole
                path.unlink()
            except BlockingIOError:
                pass  # being read or fetched
            finally:
                os.close(lock)

    def _remove(self, uri: str) -> None:
        """Remove a file; in a folder that was listed an empty one stays in its place."""
        path, part = self.path_of(uri), self._fetching / _name(uri)
        with self._writing():
            part.unlink(missing_ok=True)
            if (path.parent / _LISTED).exists() and path.exists():
                part.touch(mode=0o600)
                os.replace(part, path)
            else:
                self._unlink(path)

    def _unlink(self, path: Path) -> None:
        """Remove a file of the cache, not one that a linked folder shows there."""
        if os.path.realpath(path.parent) == str(path.parent):
            with self._writing():
                path.unlink(missing_ok=True)

    @contextmanager
    def _books(self) -> Iterator[tuple[Counters, int]]:
        """Read and change the counters, alone; also gives the file that they are in."""
        self._prepare()
        with self._writing():
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
            file = os.open(self.folder / "state.json", flags, 0o600)
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
                counters.save(file)
        finally:
            os.close(file)

    # ---- the disk ------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make the folders when they are first used, so that whoever reads hears of errors."""
        if self._prepared:
            return
        with self._writing():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.lstat(self.folder)
            if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                raise ClusterError(
                    f"the cache folder {self.folder} on {socket.gethostname()} is a link, belongs "
                    "to someone else, or is writable by others; set stage_dir to a folder that is "
                    "yours alone or not there yet"
                )
            self._prepared = True
            for path in (self.files, self._index, self._fetching, self._rewritten):
                self._make_folder(path)

    def _entry_path(self, uri: str) -> Path:
        name = _name(uri)
        return self._index / name[:2] / name

    def _make_folder(self, folder: Path) -> None:
        """Make a folder of the cache; raises ClusterError if a link is on the way."""
        self._prepare()
        path = self.folder
        for part in folder.relative_to(self.folder).parts:
            path = path / part
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise ClusterError(
                    f"{path} on {socket.gethostname()} should be a folder of the cache, but is "
                    "a link or a file; remove it"
                )

    @contextmanager
    def _writing(self, *let: type[OSError], what: str = "a file") -> Iterator[None]:
        """Tell errors of this node's disk from those of the store."""
        try:
            yield
        except let:
            raise
        except OSError as error:
            node = socket.gethostname()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _FullDiskError(
                    f"the disk of the cache {self.folder} on node {node} is full: {what} does not "
                    "fit. Free space there, lower stage_bytes, or set stage_dir to a folder on a "
                    "larger disk"
                ) from error
            raise ClusterError(
                f"the cache {self.folder} on node {node} cannot be written: {one_line(error)}. "
                "Check its permissions, or set stage_dir"
            ) from error


_here: dict[tuple[Path, int], Staging] = {}


def staging_here(configured: str | None, limit: int) -> Staging:
    """Return the cache of this node: one object per process, folder and limit."""
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


# ---- entries ---------------------------------------------------------------------------


def _name(uri: str) -> str:
    """Return a name for what one file is called in any spelling of its URI."""
    return hashlib.sha256("/".join(parts_of(uri)).encode()).hexdigest()[:32]


def _stamp(info: FileInfo) -> str:
    return str(info.mtime_ns)


def _is_still(lock: int, path: Path) -> bool:
    """Whether the locked file is the one that the path names."""
    try:
        return os.path.samestat(os.fstat(lock), os.lstat(path))
    except FileNotFoundError:
        return False


def _read_entry(lock: int) -> _Entry | None:
    return _parse_entry(os.pread(lock, 65536, 0))


def _parse_entry(content: bytes) -> _Entry | None:
    try:
        return _Entry(**json.loads(content))
    except (ValueError, TypeError):
        return None


def _write_entry(lock: int, entry: _Entry) -> None:
    """Write over the entry before in one call, so that it is never half of each."""
    content = json.dumps(asdict(entry)).encode()
    os.pwrite(lock, content.ljust(os.fstat(lock).st_size), 0)


def _write_all(target: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(target, view) :]
