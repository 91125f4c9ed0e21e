"""Where does a node's cache keep what, and what does a failure of its disk mean?

One folder, which the worker processes of a node share::

    <folder>/files/<scheme>/<authority>/<key>   whole files
    <folder>/index/                             one entry per file; its lock is the file's lock
    <folder>/fetching/                          what is being fetched
    <folder>/rewritten/                         lists of files in which paths stand for URIs
    <folder>/state.json                         bytes in use and counters; its lock guards both

In a folder of ``files`` that was listed, files that are not here show as empty ones.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePath

from cuvis_dist.errors import ClusterError, one_line
from cuvis_dist.staging.uris import parts_of, uri_of_parts

_LISTED = ".listed"


class FullDiskError(ClusterError):
    """There is less space on the disk than the cache may use."""


class CacheDisk:
    """The folder of a node's cache; it is made when something is first written.

    Nothing is written or removed behind a link in it.

    Parameters
    ----------
    folder : Path
        The place, which must be this user's alone.

    Attributes
    ----------
    folder : Path
        The same, with links above it resolved.
    files, index, fetching, rewritten, state : Path
        The parts of it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.realpath(folder.parent)) / folder.name
        self.files, self.index = self.folder / "files", self.folder / "index"
        self.fetching, self.rewritten = self.folder / "fetching", self.folder / "rewritten"
        self.state = self.folder / "state.json"
        self._prepared = False

    # ---- names ---------------------------------------------------------------------------

    def path_of(self, uri: str) -> Path:
        """Return where the file lies when it is here; raises InputError for an unsafe key."""
        return self.files.joinpath(*parts_of(uri))

    def rewritten_of(self, uri: str) -> Path:
        """Return where another content for the file lies."""
        return self.rewritten.joinpath(*parts_of(uri))

    def part_of(self, uri: str) -> Path:
        """Return where the file lies while it is fetched."""
        return self.fetching / _name(uri)

    def entry_of(self, uri: str) -> Path:
        """Return where the index has the file's entry."""
        name = _name(uri)
        return self.index / name[:2] / name

    def uri_of(self, path: str | PurePath) -> str | None:
        """Return the URI whose copy, or rewritten list, a path of the cache is; else None."""
        for tree in (self.files, self.rewritten):
            inside = str(path).removeprefix(f"{tree}{os.sep}")
            if inside != str(path):
                return uri_of_parts(*inside.split(os.sep))
        return None

    def uris_in(self, text: str) -> str:
        """Return ``text`` with the URIs in place of paths of the cache."""
        trees = "|".join(re.escape(str(tree)) for tree in (self.files, self.rewritten))
        return re.sub(
            rf"(?:{trees})/[^\s'\",;)]*[^\s'\",;).:]", lambda m: self.uri_of(m[0]) or "", text
        )

    # ---- files ---------------------------------------------------------------------------

    def mark_listed(self, folder: Path) -> None:
        """Note of a folder of ``files`` that it was listed."""
        with self.writing():
            self.make_folder(folder)
            (folder / _LISTED).touch(mode=0o600)

    def unlisted(self, folder: Path, there: set[Path], recursive: bool) -> Iterator[Path]:
        """Yield the files that show in a folder, or below it, and are not ``there``."""
        for path in list(folder.rglob("*") if recursive else folder.glob("*")):
            if path.name != _LISTED and not path.is_dir() and path not in there:
                yield path

    def show(self, path: Path) -> None:
        """Let a file show without content, unless it shows already."""
        with suppress(FileExistsError), self.writing(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))

    def remove(self, uri: str) -> None:
        """Remove a file; in a folder that was listed an empty one stays in its place."""
        path, part = self.path_of(uri), self.part_of(uri)
        with self.writing():
            part.unlink(missing_ok=True)
            if (path.parent / _LISTED).exists() and path.exists():
                part.touch(mode=0o600)
                os.replace(part, path)
            else:
                self.unlink(path)

    def unlink(self, path: Path) -> None:
        """Remove a file of the cache, not one that a linked folder shows there."""
        if os.path.realpath(path.parent) == str(path.parent):
            with self.writing():
                path.unlink(missing_ok=True)

    # ---- folders -------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the folders when they are first used, so that whoever reads hears of errors.

        Raises
        ------
        ClusterError
            If the folder cannot be made, or is not this user's alone.
        """
        if self._prepared:
            return
        with self.writing():
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = os.lstat(self.folder)
            if stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
                raise ClusterError(
                    f"the cache folder {self.folder} on {socket.gethostname()} is a link, belongs "
                    "to someone else, or is writable by others; set stage_dir to a folder that is "
                    "yours alone or not there yet"
                )
            self._prepared = True
            for path in (self.files, self.index, self.fetching, self.rewritten):
                self.make_folder(path)

    def make_folder(self, folder: Path) -> None:
        """Make a folder of the cache; raises ClusterError if a link is on the way."""
        self.prepare()
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
    def writing(self, *let: type[OSError], what: str = "a file") -> Iterator[None]:
        """Tell errors of this node's disk from those of the store.

        Parameters
        ----------
        *let : type
            Errors that the block may raise.
        what : str
            The block writes this, for messages.

        Raises
        ------
        FullDiskError
            If there is no space left.
        ClusterError
            If the disk fails otherwise.
        """
        try:
            yield
        except let:
            raise
        except OSError as error:
            node = socket.gethostname()
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise FullDiskError(
                    f"the disk of the cache {self.folder} on node {node} is full: {what} does not "
                    "fit. Free space there, lower stage_bytes, or set stage_dir to a folder on a "
                    "larger disk"
                ) from error
            raise ClusterError(
                f"the cache {self.folder} on node {node} cannot be written: {one_line(error)}. "
                "Check its permissions, or set stage_dir"
            ) from error


def _name(uri: str) -> str:
    """Return a name for what one file is called in any spelling of its URI."""
    return hashlib.sha256("/".join(parts_of(uri)).encode()).hexdigest()[:32]
