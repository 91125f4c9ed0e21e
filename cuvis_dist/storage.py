"""Where do files lie that are no local paths? At a URI, on any file system of ``pyarrow.fs``."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TypeVar

from pyarrow.fs import FileSelector, FileSystem, FileType

from cuvis_dist.errors import InputError, one_line

PathOrURI = TypeVar("PathOrURI", str, Path)
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)


def is_uri(path: object) -> bool:
    """Whether a path names another file system: ``s3://``, ``gs://``, ``hdfs://``, ``file://``."""
    return isinstance(path, str) and _SCHEME.match(path) is not None


def filesystem_of(uri: str) -> tuple[FileSystem, str]:
    """Return the file system that a URI names, and the path on it.

    Credentials and endpoints come from the environment (``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, …), never from the URI, which ends up in logs and records.

    Raises
    ------
    InputError
        If there is no such file system, or the URI carries a password.
    """
    scheme = uri.partition("://")[0]
    if "@" in uri.removeprefix(f"{scheme}://").partition("/")[0]:
        raise InputError(
            f"a {scheme}:// address must not carry credentials, which would end up in logs and "
            "run.json; set them in the environment of the cluster's nodes"
        )
    try:
        return FileSystem.from_uri(uri)
    except Exception as error:
        raise InputError(f"{uri} cannot be used: {one_line(error)}") from error


def write_atomically(target: PathOrURI, content: bytes) -> PathOrURI:
    """Write a file, whole or not at all, with the folders above it; return ``target``.

    On a local disk under a temporary name that is then renamed; an object store shows an object
    when its upload is complete.
    """
    if is_uri(target):
        filesystem, path = filesystem_of(str(target))
        with filesystem.open_output_stream(path) as stream:
            stream.write(content)
        return target
    local = Path(target)
    local.parent.mkdir(parents=True, exist_ok=True)
    temporary = local.with_name(f".{local.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # never through a link that lies there
    with open(temporary, "xb") as file:
        file.write(content)
    os.replace(temporary, local)
    return target


def list_files(folder: str | Path) -> list[str]:
    """Return the paths of all files in a folder and those below, relative to it.

    Nothing if there is no such folder. Links to folders are not followed.
    """
    if is_uri(folder):
        filesystem, path = filesystem_of(str(folder))
        selector = FileSelector(path, allow_not_found=True, recursive=True)
        return [
            os.path.relpath(info.path, path)
            for info in filesystem.get_file_info(selector)
            if info.type == FileType.File
        ]
    return [
        os.path.relpath(os.path.join(at, name), folder)
        for at, _, names in os.walk(folder)
        for name in names
    ]


def read_file(path: str | Path) -> bytes:
    """Read a file; raises OSError if it cannot be read."""
    if is_uri(path):
        filesystem, inner = filesystem_of(str(path))
        with filesystem.open_input_file(inner) as file:
            return file.read()
    return Path(path).read_bytes()


def remove_file(path: str | Path) -> None:
    """Remove a file; raises OSError if it cannot be removed."""
    if is_uri(path):
        filesystem, inner = filesystem_of(str(path))
        filesystem.delete_file(inner)
    else:
        os.unlink(path)
