"""How are a run's files kept in a folder of this machine, or one that all nodes see?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from cuvis_dist.storage.disk import temporary_name, write_atomically, writing_to
from cuvis_dist.storage.filesystems import Location
from cuvis_dist.storage.folder import OutputFolder


class LocalFolder(OutputFolder):
    """An output folder that is read and written in place; it is made with its first file.

    The methods are described by :class:`~cuvis_dist.storage.folder.OutputFolder`.
    """

    location: Path

    @property
    def local(self) -> Path:
        """The folder itself."""
        return self.location

    def at(self, name: str) -> Path:
        """Return the path of a name."""
        return self.location / name

    def name_of(self, location: Location) -> str | None:
        """Return the name of a path; the folder itself has none."""
        path = Path(location)
        if path == self.location or not path.is_relative_to(self.location):
            return None
        return path.relative_to(self.location).as_posix()

    def probe(self) -> None:
        """Do nothing: the first file shows whether the folder can be written."""

    def write(self, name: str, content: bytes) -> Path:
        """Write a file under a temporary name, and rename it."""
        return write_atomically(self.at(name), content)

    def upload(self, path: Path, name: str) -> Path:
        """Copy a file under a temporary name, and rename it."""
        target = self.at(name)
        with writing_to(self.location):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, temporary := temporary_name(target))
            os.replace(temporary, target)
        return target

    def read(self, name: str) -> bytes:
        """Return a file's content."""
        return self.at(name).read_bytes()

    def download(self, name: str, path: Path) -> Path:
        """Copy a file under a temporary name, and rename it."""
        temporary = temporary_name(path)
        with writing_to(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(self.at(name), temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
        return path

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.at(name).is_file()

    def names(self, folder: str = "") -> list[str]:
        """Return the names of all files in a folder and below it, sorted."""
        found = (path for path in self.at(folder).rglob("*") if path.is_file())
        return sorted(path.relative_to(self.location).as_posix() for path in found)

    def remove(self, *names: str) -> None:
        """Remove files, as far as they are there."""
        with writing_to(self.location):
            for name in names:
                self.at(name).unlink(missing_ok=True)

    def remove_folder(self, folder: str) -> None:
        """Remove a folder with all that it holds."""
        shutil.rmtree(self.at(folder), ignore_errors=True)
