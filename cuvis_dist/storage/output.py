"""Where do a run's files go? To a local folder, or to a URI.

A local folder is read and written in place. Any other file system of ``pyarrow.fs`` (``s3://``,
``gs://``, ``hdfs://``) is reached file by file, each whole or not at all; what can only work with
local paths works in a :class:`~cuvis_dist.storage.mirror.Mirror`.
"""

from __future__ import annotations

import contextlib
import io
import os
import posixpath
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from loguru import logger
from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType

from cuvis_dist.errors import ClusterError, CuvisDistError, InputError, one_line
from cuvis_dist.storage.filesystems import (
    filesystem_of,
    is_for_good,
    is_out_of_space,
    is_uri,
    refuse_credentials,
    retried,
    write_atomically,
    writing_to,
)

#: A place for files: a local path, or a URI as a string.
Location = Path | str
#: Seconds between tries of what failed; each try has the file system's own retries inside.
RETRY_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
#: File systems that show a file only when it is complete.
_ATOMIC = {"s3", "gcs", "abfs"}
_CHUNK = 8 * 2**20


def location_of(place: str | os.PathLike[str]) -> Location:
    """Return a URI without a slash at its end, anything else as an absolute path.

    ``file://`` is a local path, too.

    Raises
    ------
    InputError
        If a URI carries credentials.
    """
    text = os.fspath(place)
    if not is_uri(text):
        return Path(text).expanduser().resolve()
    refuse_credentials(text)
    if text.lower().startswith("file://"):
        return Path(filesystem_of(text)[1]).resolve()
    address, mark, query = text.partition("?")
    return address.rstrip("/") + mark + query


class OutputFolder:
    """The folder of a run's files, on this machine or anywhere that ``pyarrow.fs`` reaches.

    Names are relative to it, with ``/`` between folders. What fails for a reason that may pass is
    tried again for about a minute. Can be sent to other processes, which connect by themselves.

    Parameters
    ----------
    place : str or path
        Local path or URI.

    Raises
    ------
    InputError
        If a URI carries credentials.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.location = location_of(place)
        self._connected: tuple[FileSystem, str] | None = None

    def __str__(self) -> str:
        return str(self.location)

    def __reduce__(self) -> tuple[type[OutputFolder], tuple[Location]]:
        return type(self), (self.location,)

    @property
    def local(self) -> Path | None:
        """The folder itself, where it is a local one."""
        return self.location if isinstance(self.location, Path) else None

    def at(self, name: str) -> Location:
        """Return where the file of this name lies, as people are told."""
        if isinstance(self.location, Path):
            return self.location / name
        address, mark, query = self.location.partition("?")
        return f"{address}/{name}{mark}{query}"

    def name_of(self, location: Location) -> str | None:
        """Return the name of what lies in this folder; None when it lies elsewhere."""
        if isinstance(self.location, Path):
            path = Path(location)
            return path.relative_to(self.location).as_posix() if _is_below(path, self) else None
        address = self.location.partition("?")[0]
        inside = str(location).partition("?")[0]
        return inside.removeprefix(f"{address}/") if inside.startswith(f"{address}/") else None

    # ---- files ---------------------------------------------------------------------

    def probe(self) -> None:
        """Find out now whether files can be written and removed there.

        Raises
        ------
        InputError
            If the bucket is missing, or access is denied.
        ClusterError
            If the store does not answer.
        """
        if self.local is not None:
            return
        name = f".probe-{os.getpid()}"
        try:
            self._try(lambda: self._put(io.BytesIO(b"-"), name), "written to", patient=False)
            self._try(lambda: self._connect().delete_file(self._path(name)), "written to", False)
        except FileNotFoundError as error:
            raise InputError(f"{self} cannot be written to: {one_line(error)}") from error

    def write(self, name: str, content: bytes) -> Location:
        """Write a file, whole or not at all; return where it lies.

        Raises
        ------
        InputError, ClusterError
            If it cannot be written. ``content`` is then in a local file that the message names.
        """
        if self.local is not None:
            return write_atomically(self.local / name, content)
        with self._kept(name, lambda path: path.write_bytes(content)):
            self._try(lambda: self._put(io.BytesIO(content), name), "written to")
        return self.at(name)

    def upload(self, path: Path, name: str) -> Location:
        """Write the content of a local file, as :meth:`write` does."""
        if self.local is not None:
            with writing_to(self.local):
                (self.local / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, temporary := _temporary(self.local / name))
                os.replace(temporary, self.local / name)
            return self.at(name)
        with self._kept(name, lambda copy: shutil.copyfile(path, copy)):
            self._upload(path, name)
        return self.at(name)

    def _upload(self, path: Path, name: str) -> None:
        def put() -> None:
            with open(path, "rb") as source:
                self._put(source, name)

        self._try(put, "written to")

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises
        ------
        FileNotFoundError
            If there is none.
        InputError, ClusterError
            If the store does not give it.
        """
        if self.local is not None:
            return (self.local / name).read_bytes()

        def get() -> bytes:
            with self._connect().open_input_stream(self._path(name)) as source:
                return source.read()

        return self._try(get, "read")

    def download(self, name: str, path: Path) -> Path:
        """Write a file's content to a local file, whole or not at all; raises as :meth:`read`."""

        def get() -> None:
            with (
                self._connect().open_input_stream(self._path(name)) as source,
                open(temporary, "wb") as target,
            ):
                shutil.copyfileobj(source, target, _CHUNK)

        temporary = _temporary(path)
        with writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                if self.local is not None:
                    shutil.copyfile(self.local / name, temporary)
                else:
                    self._try(get, "read")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        if self.local is not None:
            return (self.local / name).is_file()
        path = self._path(name)
        return self._try(lambda: self._connect().get_file_info(path), "read").is_file

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files in a folder and below it, sorted; none without it."""
        if self.local is not None:
            root = self.local / folder
            found = (path for path in root.rglob("*") if path.is_file())
            return sorted(path.relative_to(self.local).as_posix() for path in found)
        root_path = self._path(folder)
        selector = FileSelector(root_path, recursive=True, allow_not_found=True)
        infos = self._try(lambda: self._connect().get_file_info(selector), "read")
        start = self._path("")
        return sorted(
            posixpath.relpath(info.path, start) for info in infos if info.type == FileType.File
        )

    def remove(self, *names: str) -> None:
        """Remove files; those that are not there are no error."""
        for name in names:
            if self.local is not None:
                (self.local / name).unlink(missing_ok=True)
                continue
            path = self._path(name)
            with contextlib.suppress(FileNotFoundError):
                self._try(lambda path=path: self._connect().delete_file(path), "written to")  # type: ignore[misc]

    def remove_folder(self, folder: str) -> None:
        """Remove a folder of this one, with all that it holds; none is no error."""
        if self.local is not None:
            shutil.rmtree(self.local / folder, ignore_errors=True)
        else:
            path = self._path(folder)
            with contextlib.suppress(FileNotFoundError):
                self._try(lambda: self._connect().delete_dir(path), "written to")

    # ---- the file system -----------------------------------------------------------

    def _connect(self) -> FileSystem:
        if self._connected is None:
            self._connected = filesystem_of(str(self.location))
        return self._connected[0]

    def _path(self, name: str) -> str:
        self._connect()
        assert self._connected is not None
        return posixpath.join(self._connected[1], name) if name else self._connected[1]

    def _put(self, source: IO[bytes], name: str) -> None:
        """Write a file so that nobody sees a part of it.

        In a thread of its own: pyarrow closes a stream that is interrupted (Ctrl-C, SIGTERM),
        which would make an object of what was written until then.
        """
        with ThreadPoolExecutor(1, "cuvis-dist-upload") as thread:
            thread.submit(self._put_here, source, name).result()

    def _put_here(self, source: IO[bytes], name: str) -> None:
        filesystem, path = self._connect(), self._path(name)
        atomic = filesystem.type_name in _ATOMIC
        if not atomic:
            filesystem.create_dir(posixpath.dirname(path), recursive=True)
        where = path if atomic else str(_temporary(PurePosixPath(path)))
        with filesystem.open_output_stream(where) as target:
            shutil.copyfileobj(source, target, _CHUNK)
        if atomic:
            return
        try:
            filesystem.move(where, path)
        except OSError:  # HDFS renames to no name that is taken
            filesystem.delete_file(path)
            filesystem.move(where, path)

    def _try(self, action: Callable[[], Any], what: str, patient: bool = True) -> Any:
        """Do something with the store, again when the reason of a failure may pass."""

        def say(what_next: str) -> None:
            logger.warning(f"{self} cannot be {what}, {what_next}")

        try:
            return retried(action, RETRY_S if patient else (), say)
        except FileNotFoundError:
            raise
        except (OSError, ArrowException) as error:
            if is_out_of_space(error):  # of a local disk
                raise
            if is_for_good(error):
                raise InputError(
                    f"{self} cannot be {what}: {one_line(error)}. Check its name, and that the "
                    "environment of every node has credentials that may read and write it"
                ) from error
            raise ClusterError(
                f"{self} cannot be {what}: {one_line(error)}. Check that every node reaches it; "
                "the same command then goes on from what is stored there"
            ) from error

    @contextmanager
    def _kept(self, name: str, keep: Callable[[Path], object]) -> Iterator[None]:
        """Keep a local copy of what could not be written."""
        try:
            yield
        except CuvisDistError as error:
            folder = Path(tempfile.mkdtemp(prefix="unsaved-", dir=temporary_folder()))
            path = folder / PurePosixPath(name).name
            try:
                keep(path)
            except OSError:
                raise error from None
            raise type(error)(
                f"{error}. Nothing is lost: {path} on {socket.gethostname()} is what belongs at "
                f"{self.at(name)}; copied there, it is used"
            ) from error


def _is_below(path: Path, folder: OutputFolder) -> bool:
    return folder.local is not None and path != folder.local and path.is_relative_to(folder.local)


def _temporary(path: Any) -> Any:
    return path.with_name(f".{path.name}.{os.getpid()}")


def temporary_folder() -> Path:
    """Return this user's own folder for what a process needs for a while on this machine.

    Raises
    ------
    InputError
        If it belongs to someone else.
    """
    folder = Path(tempfile.gettempdir()) / f"cuvis-dist-{os.getuid()}"
    with writing_to(folder):
        folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.getuid():
        raise InputError(f"{folder} belongs to someone else; set TMPDIR to a folder of your own")
    return folder
