"""How are a run's files kept at a URI, by any file system of ``pyarrow.fs``?

Files are written and read whole (``s3://``, ``gs://``, ``hdfs://``), and what fails for a reason
that may pass is tried again for about a minute.
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
from typing import IO, TypeVar

from loguru import logger
from pyarrow import ArrowException
from pyarrow.fs import FileSelector, FileSystem, FileType

from cuvis_dist.errors import ClusterError, CuvisDistError, InputError, one_line
from cuvis_dist.storage.disk import (
    is_out_of_space,
    temporary_folder,
    temporary_name,
    writing_to,
)
from cuvis_dist.storage.filesystems import Location, filesystem_of, is_for_good, retried
from cuvis_dist.storage.folder import OutputFolder

T = TypeVar("T")
#: Seconds between tries of what failed; each try has the file system's own retries inside.
RETRY_S = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
#: These file systems show a file only when it is complete.
_ATOMIC = {"s3", "gcs", "abfs"}
_CHUNK = 8 * 2**20


class RemoteFolder(OutputFolder):
    """An output folder at a URI; each process connects to it by itself, when it first uses it.

    The methods are described by :class:`~cuvis_dist.storage.folder.OutputFolder`.
    """

    location: str

    def __init__(self, place: str | os.PathLike[str]) -> None:
        super().__init__(place)
        self._connected: tuple[FileSystem, str] | None = None

    @property
    def local(self) -> None:
        """The folder is no local one."""
        return None

    def at(self, name: str) -> str:
        """Return the URI of a name."""
        address, mark, query = self.location.partition("?")
        return f"{address}/{name}{mark}{query}"

    def name_of(self, location: Location) -> str | None:
        """Return the name of a URI, whatever its query."""
        address = self.location.partition("?")[0]
        inside = str(location).partition("?")[0]
        return inside.removeprefix(f"{address}/") if inside.startswith(f"{address}/") else None

    # ---- files ---------------------------------------------------------------------

    def probe(self) -> None:
        """Write and remove a small file, each with a single try."""
        name = f".probe-{os.getpid()}"
        try:
            self._try(lambda: self._put(io.BytesIO(b"-"), name), "written to", ())
            self._try(lambda: self._connect().delete_file(self._path(name)), "written to", ())
        except FileNotFoundError as error:
            raise InputError(f"{self} cannot be written to: {one_line(error)}") from error

    def write(self, name: str, content: bytes) -> str:
        """Write a file; if that fails, keep the content in a local one."""
        with self._kept(name, lambda path: path.write_bytes(content)):
            self._try(lambda: self._put(io.BytesIO(content), name), "written to")
        return self.at(name)

    def upload(self, path: Path, name: str) -> str:
        """Write the content of a local file; if that fails, keep a copy of it."""
        with self._kept(name, lambda copy: shutil.copyfile(path, copy)):
            self.send(path, name)
        return self.at(name)

    def send(self, path: Path, name: str) -> None:
        """Write the content of a local file, for a caller who keeps that file if this fails.

        Raises
        ------
        InputError, ClusterError
            If it cannot be written.
        """

        def put() -> None:
            with open(path, "rb") as source:
                self._put(source, name)

        self._try(put, "written to")

    def read(self, name: str) -> bytes:
        """Return a file's content."""

        def get() -> bytes:
            with self._connect().open_input_stream(self._path(name)) as source:
                return source.read()

        return self._try(get, "read")

    def download(self, name: str, path: Path) -> Path:
        """Read a file to a temporary name on this machine, and rename it."""

        def get() -> None:
            with (
                self._connect().open_input_stream(self._path(name)) as source,
                open(temporary, "wb") as target,
            ):
                shutil.copyfileobj(source, target, _CHUNK)

        temporary = temporary_name(path)
        with writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._try(get, "read")
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        path = self._path(name)
        return self._try(lambda: self._connect().get_file_info(path), "read").is_file

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files in a folder and below it, sorted."""
        selector = FileSelector(self._path(folder), recursive=True, allow_not_found=True)
        infos = self._try(lambda: self._connect().get_file_info(selector), "read")
        start = self._path("")
        return sorted(
            posixpath.relpath(info.path, start) for info in infos if info.type == FileType.File
        )

    def remove(self, *names: str) -> None:
        """Remove files, as far as they are there."""
        for path in map(self._path, names):
            with contextlib.suppress(FileNotFoundError):
                self._try(lambda path=path: self._connect().delete_file(path), "written to")  # type: ignore[misc]

    def remove_folder(self, folder: str) -> None:
        """Remove a folder with all that it holds."""
        path = self._path(folder)
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda: self._connect().delete_dir(path), "written to")

    # ---- the file system -----------------------------------------------------------

    def _connect(self) -> FileSystem:
        if self._connected is None:
            self._connected = filesystem_of(self.location)
        return self._connected[0]

    def _path(self, name: str) -> str:
        """Return the path of a name on the file system."""
        self._connect()
        assert self._connected is not None
        return posixpath.join(self._connected[1], name) if name else self._connected[1]

    def _put(self, source: IO[bytes], name: str) -> None:
        """Write a file so that nobody sees a part of it.

        A thread of its own writes: pyarrow closes a stream that is interrupted (Ctrl-C, SIGTERM),
        which would make an object of what was written until then.
        """
        with ThreadPoolExecutor(1, "cuvis-dist-upload") as thread:
            thread.submit(self._put_here, source, name).result()

    def _put_here(self, source: IO[bytes], name: str) -> None:
        filesystem, path = self._connect(), self._path(name)
        atomic = filesystem.type_name in _ATOMIC
        if not atomic:
            filesystem.create_dir(posixpath.dirname(path), recursive=True)
        where = path if atomic else str(temporary_name(PurePosixPath(path)))
        with filesystem.open_output_stream(where) as target:
            shutil.copyfileobj(source, target, _CHUNK)
        if atomic:
            return
        try:
            filesystem.move(where, path)
        except OSError:  # HDFS renames to no name that is taken
            filesystem.delete_file(path)
            filesystem.move(where, path)

    def _try(
        self, action: Callable[[], T], what: str, pauses: tuple[float, ...] | None = None
    ) -> T:
        """Do something with the store, again when the reason of a failure may pass.

        Parameters
        ----------
        action : callable
            What is done, and its result returned.
        what : str
            The folder "cannot be" this, for messages.
        pauses : tuple of float, optional
            Seconds before each further try; :data:`RETRY_S` by default.

        Raises
        ------
        FileNotFoundError
            If the file is not there.
        InputError
            If the store will not do it however often it is asked.
        ClusterError
            If the last try failed, too.
        """

        def say(what_next: str) -> None:
            logger.warning(f"{self} cannot be {what}, {what_next}")

        try:
            return retried(action, RETRY_S if pauses is None else pauses, say)
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
        """Let ``keep`` write a local file if the block fails to store it, and say where it is."""
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
