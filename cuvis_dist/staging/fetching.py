"""How does a file come from its store to this node, and is the copy what the store has?

It is copied under a temporary name, compared with what the store says of it (size, checksum where
there is one), and renamed.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from dataclasses import dataclass, field

from loguru import logger
from pyarrow.fs import FileInfo, FileSystem, FileType

from cuvis_dist.errors import InputError
from cuvis_dist.staging.disk import FullDiskError
from cuvis_dist.staging.entries import Entry, LockedEntry, State, stamp_of
from cuvis_dist.staging.room import Room
from cuvis_dist.staging.uris import fetched, look, remote

_CHUNK = 8 * 2**20


@dataclass(frozen=True)
class _Source:
    """A file in its store, and what came of it in tries that failed.

    Attributes
    ----------
    uri : str
        The file.
    filesystem, key : FileSystem and str
        Its store, and its path there.
    damaged : set of str
        MD5 sums of what arrived when the store's ETag said another one.
    """

    uri: str
    filesystem: FileSystem
    key: str
    damaged: set[str] = field(default_factory=set)

    def info(self) -> FileInfo:
        """Return what the store says of the file."""
        return self.filesystem.get_file_info(self.key)


class Fetcher:
    """Brings files into a cache.

    Parameters
    ----------
    room : Room
        The bytes of the cache.
    """

    def __init__(self, room: Room) -> None:
        self.room, self.disk = room, room.disk
        #: URIs whose copies this process has compared with the store.
        self._checked: set[str] = set()
        #: Whether a store's ETags are checksums, by the store's address.
        self._plain_etags: dict[str, bool] = {}

    def is_usable(self, uri: str, locked: LockedEntry) -> bool:
        """Whether the file is here, whole, and the one that the store has.

        The store is asked when this process first uses the file.
        """
        entry = locked.read()
        if entry.state is not State.WHOLE or not entry.has_copy(self.disk.path_of(uri)):
            return False
        if uri not in self._checked:
            if not entry.is_of(look(uri)):
                return False
            self._checked.add(uri)
        return True

    def fetch(self, uri: str, locked: LockedEntry) -> None:
        """Fetch a file whose entry this process alone has locked.

        Raises
        ------
        DataError
            If the file does not exist or cannot be fetched.
        InputError
            If it is larger than the cache.
        NoRoomError
            If too much is being read.
        ClusterError
            If the disk is full, also without the other files, or fails.
        """
        source = _Source(uri, *remote(uri))
        started = time.perf_counter()
        try:
            try:
                fetched(uri, lambda: self._attempt(source, locked))
            except FullDiskError:
                self.room.empty()
                fetched(uri, lambda: self._attempt(source, locked))
        except BaseException:
            self.disk.entry_of(uri).unlink(missing_ok=True)
            raise
        logger.debug(f"staged {uri} in {time.perf_counter() - started:.2f} s")

    def _attempt(self, source: _Source, locked: LockedEntry) -> None:
        info, limit = source.info(), self.room.limit
        if info.type != FileType.File:
            raise FileNotFoundError(f"{source.uri} does not exist")
        if info.size > limit:
            raise InputError(
                f"{source.uri} has {info.size} bytes, more than the cache of a node may take "
                f"({limit}); raise stage_bytes"
            )
        self.room.reserve(source.uri, locked, info)
        try:
            mtime_ns = self._copy(source, info)
            entry = Entry(source.uri, info.size, stamp_of(info), mtime_ns, whole=True)
            self.room.settle(locked, entry)
        except BaseException:
            self.room.release(source.uri, locked)
            raise
        self._checked.add(source.uri)

    def _copy(self, source: _Source, info: FileInfo) -> int:
        """Copy and verify; return the time of change of the copy.

        Raises
        ------
        OSError
            If what arrived is not what the store has.
        """
        part, path = self.disk.part_of(source.uri), self.disk.path_of(source.uri)
        size, digest = 0, hashlib.md5(usedforsecurity=False)
        with source.filesystem.open_input_stream(source.key) as stream:
            etag = (stream.metadata() or {}).get("ETag", b"").decode().strip('"')
            flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW
            with self.disk.writing():
                target = os.open(part, flags, 0o600)
            try:
                while chunk := stream.read(_CHUNK):
                    with self.disk.writing(what=source.uri):
                        _write_all(target, chunk)
                    digest.update(chunk)
                    size += len(chunk)
                with self.disk.writing(what=source.uri):
                    os.fsync(target)
            finally:
                os.close(target)
        if size != info.size:
            raise OSError(f"{size} of {info.size} bytes arrived")
        if not self._is_vouched_for(source, etag, digest.digest()):
            again = source.info()
            if (again.size, stamp_of(again)) != (info.size, stamp_of(info)):
                raise OSError("it was changed while it was fetched")
        with self.disk.writing():
            self.disk.make_folder(path.parent)
            os.replace(part, path)
            return os.lstat(path).st_mtime_ns

    def _is_vouched_for(self, source: _Source, etag: str, md5: bytes) -> bool:
        """Whether an ETag vouches for the content; raises OSError if it speaks against it.

        The ETag of an object on S3 is its MD5, or ``MD5(MD5)-1`` if it was uploaded in one
        part; that of several parts depends on their sizes. Nor is it the MD5 of one encrypted
        with a managed key: then the same content comes twice.
        """
        uri = source.uri
        root = uri[: uri.find("/", uri.find("://") + 3)]
        if not re.fullmatch(r"[0-9a-f]{32}(-1)?", etag) or not self._plain_etags.get(root, True):
            return False
        parts = hashlib.md5(md5, usedforsecurity=False).hexdigest() + "-1"
        if etag == (parts if etag.endswith("-1") else md5.hex()):
            return True
        if md5.hex() in source.damaged:
            logger.debug(f"{root} has ETags that are no checksums")
            self._plain_etags[root] = False
            return False
        source.damaged.add(md5.hex())
        raise OSError(f"what arrived has the MD5 {md5.hex()}, the store says {etag}")


def _write_all(target: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(target, view) :]
