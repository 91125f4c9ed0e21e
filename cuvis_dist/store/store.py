"""Which statistics of frames are kept from run to run, and where is what of which frame?

Many may read and write a store at the same time: files are only ever added, each under a name of
its own. Who measures a frame that another one measures at the same time does it twice; either
measurement will do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from loguru import logger

from cuvis_dist.archive import Contents
from cuvis_dist.errors import CuvisDistError, one_line
from cuvis_dist.storage import Location, OutputFolder
from cuvis_dist.store.files import (
    DamagedFileError,
    Entry,
    Identity,
    Key,
    StoredFile,
    UnusableFileError,
    make_file,
    manifest_of,
    read_file,
    read_manifest,
    table_of,
    write_file,
)

if TYPE_CHECKING:
    from cuvis_dist.archive import Frame

#: Folder in a store: files that were found to be damaged.
SET_ASIDE = "set-aside"
#: Manifests that are read at the same time.
_READERS = 16


def identity_of(frame: Frame) -> Identity:
    """Return what a store knows a frame by: its uid, and its own file.

    Data modules that do not name their recordings give frames of several files the same uid.
    """
    return frame.uid, frame.reads[0] if frame.reads else ""


@dataclass(frozen=True)
class Found:
    """Where a frame's measurement is.

    Attributes
    ----------
    file : StoredFile
        The file.
    row : int
        The row in it.
    """

    file: StoredFile
    row: int

    @property
    def entry(self) -> Entry:
        """What the manifest says of the frame."""
        return self.file.entries[self.row]


class Store:
    """Statistics of frames, in a folder or at a URI.

    ``<key>/<time>-<random>.parquet`` holds what was measured of some frames, and the ``.json``
    beside it is its manifest; ``<key>`` stands for what was measured, and all that it depends on.

    Parameters
    ----------
    place : path or URI
        It is made when something is written.
    holds : bool
        Whether work goes on, with a warning, where the place fails once it has been read: what is
        added then stays in this process, and what cannot be read is not found.
    """

    def __init__(self, place: Location, holds: bool = False) -> None:
        self.folder, self.holds = OutputFolder(place), holds
        self._known: dict[str, StoredFile | None] = {}
        self._held: dict[str, tuple[StoredFile, bytes]] = {}
        self._reached = self._unreadable = self._unwritable = False

    def __str__(self) -> str:
        return str(self.folder)

    def files(self, where: str = "") -> list[StoredFile]:
        """Return the files of the store, or of one folder in it, oldest first.

        A manifest that cannot be used is named in a warning; a damaged one is set aside.

        Raises
        ------
        InputError, ClusterError
            If the store cannot be read.
        """
        held = [file for name, (file, _) in self._held.items() if name.startswith(where)]
        try:
            found = held if self._unreadable else [*held, *self._there(where)]
        except (OSError, CuvisDistError) as error:
            self._lose(error)
            found = held
        return sorted(found, key=lambda file: file.name)

    def _there(self, where: str) -> list[StoredFile]:
        """Return the files that lie in the store, or in one folder in it."""
        names = [n for n in self.folder.names(where) if n.endswith(".json") and _is_ours(n)]
        new = [name for name in names if name not in self._known]
        with ThreadPoolExecutor(_READERS) as readers:
            self._known |= zip(new, readers.map(self._manifest, new), strict=True)
        self._reached = True
        return [file for name in names if (file := self._known[name])]

    def find(
        self,
        key: Key,
        frames: Iterable[Frame],
        contents: Contents,
        suits: Callable[[Entry], bool] = lambda entry: True,
    ) -> dict[Identity, Found]:
        """Return where the measurements of some frames are, as far as they are there.

        A frame is found if all files that it is read from are as they were; one whose files cannot
        be seen from here is never found.

        Parameters
        ----------
        key : Key
            What is asked for.
        frames : iterable of Frame
            The frames whose measurements are wanted.
        contents : Contents
            The files that they are read from, as they are now.
        suits : callable
            Says whether a measurement will do.
        """
        wanted = {
            identity_of(frame): contents.only([frame]).as_json() for frame in frames if frame.reads
        }
        found: dict[Identity, Found] = {}
        for file in self.files(key.digest):
            for row, entry in enumerate(file.entries):
                files = wanted.get(entry.identity)
                if files and _same(files, entry) and suits(entry):
                    there = found.get(entry.identity)
                    if there is None or entry.worth >= there.entry.worth:
                        found[entry.identity] = Found(file, row)  # of equals the last one
        return found

    def read(self, file: StoredFile) -> pa.Table:
        """Return the table of a file; one that is damaged is set aside.

        Raises
        ------
        DamagedFileError
            If it is damaged.
        UnusableFileError
            If somebody has removed it, or it cannot be read any more and work goes on then.
        InputError, ClusterError
            If it cannot be read any more, elsewhere.
        """
        if file.name in self._held:
            return table_of(self._held[file.name][1], file, file.name)
        try:
            return read_file(self.folder, file)
        except DamagedFileError as error:
            self.set_aside(file.name, str(error))
            raise
        except UnusableFileError:
            raise
        except (OSError, CuvisDistError) as error:
            self._lose(error)
            raise UnusableFileError(f"{self.folder.at(file.name)} is not used") from error

    def add(self, key: Key, kind: str, table: pa.Table, entries: Sequence[Entry]) -> StoredFile:
        """Write what was measured of some frames, a row each.

        Parameters
        ----------
        key : Key
            What was measured.
        kind : str
            Class of the statistics, or what else the table holds.

        Raises
        ------
        InputError, ClusterError
            If the store cannot be written to.
        """
        file, content = make_file(key.digest, (kind, key.name, key.depends_on), table, entries)
        try:
            if not self._unwritable:
                write_file(self.folder, file, content)
                self._known[file.manifest] = file
        except (OSError, CuvisDistError) as error:
            self._hold(error)
        if self._unwritable:
            self._held[file.name] = file, content
        return file

    def require_writable(self) -> None:
        """Raise InputError or ClusterError, before any work is done, if nothing can be added.

        Where work goes on, a store that has something may be one that can only be read.
        """
        name = f".probe-{os.getpid()}"
        try:
            if not self._unwritable:
                self.folder.write(name, b"-")
                self.folder.remove(name)
        except (OSError, CuvisDistError) as error:
            if not any(self._known.values()):
                raise
            self._hold(error)

    def _hold(self, error: Exception) -> None:
        """Go on without writing, and say so; raises the error where work does not go on."""
        if not (self.holds and self._reached):
            raise error
        self._unwritable = True
        logger.warning(
            f"the store {self} cannot be written to, and the work goes on: what is measured from "
            f"now on is kept in memory until it ends. The reason: {one_line(error)}"
        )

    def _lose(self, error: Exception) -> None:
        """Go on without reading, and say so; raises the error where work does not go on."""
        if not (self.holds and self._reached):
            raise error
        self._unreadable = self._unwritable = True
        logger.warning(
            f"the store {self} cannot be read any more, and the work goes on: what it had is "
            f"measured again, and kept in memory until the work ends. The reason: {one_line(error)}"
        )

    def set_aside(self, name: str, why: str) -> None:
        """Move a file that is damaged, and its manifest, out of the way, and say so."""
        logger.warning(f"{why}. It is set aside, and its frames are measured again")
        for each in (manifest_of(name), name):
            self._known[each] = None
            try:
                self.folder.write(f"{SET_ASIDE}/{each}", self.folder.read(each))
                self.folder.remove(each)
            except FileNotFoundError:
                continue
            except (OSError, CuvisDistError) as error:  # a store that may only be read
                logger.warning(f"{self.folder.at(each)} stays where it is: {one_line(error)}")

    def remove(self, files: Collection[StoredFile]) -> None:
        """Remove files, first their manifests: what is left of one does not count."""
        self.folder.remove(*(file.manifest for file in files), *(file.name for file in files))
        for file in files:
            self._known.pop(file.manifest, None)

    def _manifest(self, name: str) -> StoredFile | None:
        try:
            return read_manifest(self.folder, name)
        except FileNotFoundError:
            return None
        except DamagedFileError as error:
            self.set_aside(name.removesuffix(".json") + ".parquet", str(error))
        except UnusableFileError as error:
            logger.warning(f"{error}. It is not used")
        return None


def _is_ours(name: str) -> bool:
    """Whether a name is one that a file of a store has: ``<key>/<file>``."""
    where, _, rest = name.partition("/")
    return bool(rest) and "/" not in rest and where != SET_ASIDE


def _same(files: dict[str, list], entry: Entry) -> bool:
    """Whether a frame was read from these files, as they are now."""
    if files == entry.files:
        return True
    if files.keys() != entry.files.keys():
        return False
    return not Contents.parse(files).changed_since(entry.contents)
