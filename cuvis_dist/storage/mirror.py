"""How do files that can only be local (checkpoints, TensorBoard) get to a URI and back?"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cuvis_dist.errors import CuvisDistError
from cuvis_dist.storage.disk import temporary_folder
from cuvis_dist.storage.folder import OutputFolder
from cuvis_dist.storage.remote import RemoteFolder


def mirror_of(
    output: OutputFolder, doing: Callable[[], AbstractContextManager] = nullcontext
) -> Mirror:
    """Return a local folder in which this process can work with an output folder.

    Parameters
    ----------
    output : OutputFolder
        The folder to work with.
    doing : callable, optional
        It returns a context for the time that :meth:`Mirror.push` takes.
    """
    if isinstance(output, RemoteFolder):
        return RemoteMirror(output, doing)
    assert output.local is not None
    return Mirror(output.local)


class Mirror:
    """A local folder in which a process works with an output folder.

    This class is that of a local output folder, which is its own mirror, so that there is nothing
    to bring; :class:`RemoteMirror` has copies of files at a URI.

    Attributes
    ----------
    root : Path
        The local folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *exc_info: object) -> None:
        return

    def to_local(self, value: Any) -> Any:
        """Return ``value`` with every path of the output folder replaced by the mirror's."""
        return value

    def to_output(self, value: Any) -> Any:
        """Return ``value`` with every path of the mirror replaced by the output folder's."""
        return value

    def pull(self, name: str) -> Path:
        """Copy a file to this machine, if there is one; return its local path."""
        return self.root / name

    def pull_folder(self, folder: str, suffix: str) -> None:
        """Copy the folder's files with this suffix to this machine.

        The folders of its other files are made, without the files.
        """

    def push(self, last: str = "") -> None:
        """Copy new and changed files to the output folder; remove there what is gone here.

        Parameters
        ----------
        last : str
            Name of a file that speaks of others: it follows when these are there, and before
            any is removed.

        Raises
        ------
        InputError, ClusterError
            If the output folder cannot be written. The files are then kept on this machine, in a
            folder that the message names.
        """


class RemoteMirror(Mirror):
    """A temporary folder with copies of an output folder's files, removed when it is left.

    The methods are described by :class:`Mirror`, the parameters by :func:`mirror_of`.
    """

    def __init__(self, output: RemoteFolder, doing: Callable[[], AbstractContextManager]) -> None:
        root, self._lock = _new_folder()
        super().__init__(root)
        self.output = output
        self._doing = doing
        #: Sizes and times of change of the files that are the same here and there.
        self._known: dict[str, tuple[int, int]] = {}

    def __exit__(self, *exc_info: object) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        os.close(self._lock)

    def to_local(self, value: Any) -> Any:
        """Return ``value`` with paths of this machine."""
        return relocated(value, self._to_local)

    def to_output(self, value: Any) -> Any:
        """Return ``value`` with URIs."""
        return relocated(value, self._to_output)

    def _to_local(self, text: str) -> str:
        name = self.output.name_of(text)
        return text if name is None else str(self.root / name)

    def _to_output(self, text: str) -> str:
        if not text.startswith(f"{self.root}/"):
            return text
        return self.output.at(Path(text).relative_to(self.root).as_posix())

    def pull(self, name: str) -> Path:
        """Copy a file to this machine, once."""
        path = self.root / name
        if name not in self._known:
            with contextlib.suppress(FileNotFoundError):
                self.output.download(name, path)
                self._known[name] = _state(path)
        return path

    def pull_folder(self, folder: str, suffix: str) -> None:
        """Copy the folder's files with this suffix, and make the folders of the others."""
        for name in self.output.names(folder):
            if name.endswith(suffix):
                self.pull(name)
            else:
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)

    def push(self, last: str = "") -> None:
        """Copy what differs from the output folder to it; hidden files stay here."""
        here = {
            path.relative_to(self.root).as_posix(): _state(path)
            for path in self.root.rglob("*")
            if path.is_file() and not path.name.startswith(".")
        }
        changed = [name for name in here if here[name] != self._known.get(name)]
        gone = [name for name in self._known if name not in here]
        with self._doing(), self._kept():
            for name in sorted(changed, key=lambda name: (name == last, name)):
                self.output.send(self.root / name, name)
                self._known[name] = here[name]
            self.output.remove(*gone)
        for name in gone:
            del self._known[name]

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep the mirror under another name if the block fails to store its files."""
        try:
            yield
        except CuvisDistError as error:
            kept = self.root.with_name(f"unsaved-{self.root.name}")
            self.root.rename(kept)
            raise type(error)(
                f"{error}. What was not stored is in {kept} on {socket.gethostname()}"
            ) from error


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _new_folder() -> tuple[Path, int]:
    """Make a folder for this process, and remove those of processes that were killed.

    Returns
    -------
    tuple of Path and int
        The folder, and a descriptor of its lock file, which is open until the process ends,
        however that happens.
    """
    folder = temporary_folder()
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for other in folder.glob("mirror-*"):
            if _is_abandoned(other):
                shutil.rmtree(other, ignore_errors=True)
        root = Path(tempfile.mkdtemp(prefix="mirror-", dir=folder))
        own = os.open(root / ".lock", os.O_CREAT | os.O_RDWR)
        fcntl.flock(own, fcntl.LOCK_EX)
    return root, own


def _is_abandoned(root: Path) -> bool:
    """Whether the process that made a mirror has ended."""
    try:
        with open(root / ".lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def relocated(value: Any, change: Callable[[str], str]) -> Any:
    """Return ``value`` with ``change`` applied to every string in it, and to every path."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Path):
        return Path(change(str(value)))
    if type(value) is dict:
        return {relocated(k, change): relocated(v, change) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)([relocated(item, change) for item in value])
    return value
