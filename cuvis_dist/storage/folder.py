"""Where does what a run writes go? It goes into one folder, whose place a person names.

:class:`OutputFolder` says what can be done with it; the implementations are
:mod:`~cuvis_dist.storage.local` and :mod:`~cuvis_dist.storage.remote`. What can only work with
local paths works in a :class:`~cuvis_dist.storage.mirror.Mirror`.
"""

from __future__ import annotations

import os
from pathlib import Path

from cuvis_dist.storage.filesystems import Location, location_of


class OutputFolder:
    """The folder of a run's files, on this machine or anywhere that ``pyarrow.fs`` reaches.

    As ``pathlib.Path(...)`` returns a path of the operating system's kind, ``OutputFolder(place)``
    returns a :class:`~cuvis_dist.storage.local.LocalFolder` for a local path or ``file://``, and a
    :class:`~cuvis_dist.storage.remote.RemoteFolder` for any other URI. Both can be sent to other
    processes, and both write a file whole or not at all.

    Names of files are relative to the folder, with ``/`` between the folders in it.

    Parameters
    ----------
    place : str or path
        Local path or URI.

    Attributes
    ----------
    location : Path or str
        The place: an absolute path, or a URI without a slash at its end.

    Raises
    ------
    InputError
        If a URI carries credentials.
    """

    location: Location

    def __new__(cls, place: str | os.PathLike[str]) -> OutputFolder:
        """Choose the implementation by the kind of place."""
        if cls is not OutputFolder:
            return super().__new__(cls)
        # Both modules import this one.
        from cuvis_dist.storage.local import LocalFolder
        from cuvis_dist.storage.remote import RemoteFolder

        kind = LocalFolder if isinstance(location_of(place), Path) else RemoteFolder
        return super().__new__(kind)

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.location = location_of(place)

    def __str__(self) -> str:
        return str(self.location)

    def __reduce__(self) -> tuple[type[OutputFolder], tuple[Location]]:
        return type(self), (self.location,)

    @property
    def local(self) -> Path | None:
        """The folder itself where it is a local one, else None."""
        raise NotImplementedError

    def at(self, name: str) -> Location:
        """Return where the file of this name lies, as people are told."""
        raise NotImplementedError

    def name_of(self, location: Location) -> str | None:
        """Return the name of what lies at a location in this folder; None if it lies elsewhere."""
        raise NotImplementedError

    def probe(self) -> None:
        """Find out now whether files can be written to and removed from a store.

        Nothing is tried in a local folder: the first file shows it as fast.

        Raises
        ------
        InputError
            If the bucket is missing, or access is denied.
        ClusterError
            If the store does not answer.
        """
        raise NotImplementedError

    def write(self, name: str, content: bytes) -> Location:
        """Write a file with this content; return where it lies.

        Raises
        ------
        InputError, ClusterError
            If it cannot be written. Where a store is the reason, the message names a local file
            that has the content.
        """
        raise NotImplementedError

    def upload(self, path: Path, name: str) -> Location:
        """Write a file with the content of a local one; return and raise as :meth:`write` does."""
        raise NotImplementedError

    def read(self, name: str) -> bytes:
        """Return a file's content.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        InputError, ClusterError
            If the store does not give it.
        """
        raise NotImplementedError

    def download(self, name: str, path: Path) -> Path:
        """Write a file's content to a local file; return its path, and raise as :meth:`read`."""
        raise NotImplementedError

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        raise NotImplementedError

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files in a folder and below it, sorted.

        A folder that does not exist has none.
        """
        raise NotImplementedError

    def remove(self, *names: str) -> None:
        """Remove files; it is no error if some of them are not there."""
        raise NotImplementedError

    def remove_folder(self, folder: str) -> None:
        """Remove a folder with all that it holds; it is no error if there is none."""
        raise NotImplementedError
