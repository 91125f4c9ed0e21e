"""How are files on a disk of this machine written, and what do its failures mean?"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TypeVar

from cuvis_dist.errors import ClusterError, InputError, one_line

P = TypeVar("P", bound=PurePath)
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Torch's own writer of files tells with one of these that a disk is full, without a number.
_NO_SPACE_IN_TORCH = re.compile(r"PytorchStreamWriter|inline_container|file write failed")


def is_out_of_space(error: BaseException) -> bool:
    """Whether a disk, a quota or the size that a file may have is used up."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    return isinstance(error, RuntimeError) and bool(_NO_SPACE_IN_TORCH.search(str(error)))


@contextmanager
def writing_to(folder: object) -> Iterator[None]:
    """Name the folder in errors of writing that the block raises.

    Raises
    ------
    ClusterError
        If there is no space left.
    InputError
        If writing there is not allowed, or something else lies there.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        if is_out_of_space(error):
            raise ClusterError(
                f"no space is left in {folder} on {socket.gethostname()}: {one_line(error)}. Make "
                "room there, or choose another folder; the same command then goes on"
            ) from error
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise InputError(
                f"{folder} cannot be written on {socket.gethostname()}: {one_line(error)}. Let "
                "this user write there, or choose another folder; the same command then goes on"
            ) from error
        below = str(getattr(error, "filename", None)).startswith(str(folder))
        if below and isinstance(error, FileNotFoundError):
            raise InputError(
                f"{folder} cannot be written on {socket.gethostname()}: {one_line(error)}. Choose "
                "another folder, or put it back; the same command then goes on"
            ) from error
        if below and isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
            raise InputError(
                f"in {folder}, a folder lies where a file belongs, or the other way round: "
                f"{one_line(error)}. Move it away, or choose another folder"
            ) from error
        raise


def require_free(folder: Path, needed: int, what: str) -> None:
    """Find out whether the disk of a local folder, which need not be there, has room.

    Parameters
    ----------
    folder : Path
        Where something is to be written.
    needed : int
        How many bytes.
    what : str
        What they are, for the message.

    Raises
    ------
    ClusterError
        If fewer bytes are free.
    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise ClusterError(
            f"too little space is left in {folder} on {socket.gethostname()}: {what} need about "
            f"{needed} bytes, and {free} are free. Make room there, or choose another folder"
        )


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a local file, whole or not at all, with the folders above it; return its path.

    The content is written under a temporary name, which is then renamed.

    Raises
    ------
    ClusterError, InputError
        As :func:`writing_to` does.
    """
    temporary = temporary_name(path)
    with writing_to(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)  # never through a link that lies there
        try:
            with open(temporary, "xb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    return path


def temporary_name(path: P) -> P:
    """Return the name, in the same folder, under which this process writes a file at first."""
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
