"""Which file system does a URI name, and what do its failures, and a local disk's, mean?"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl

from pyarrow import ArrowException
from pyarrow.fs import FileSystem

from cuvis_dist.errors import ClusterError, InputError, one_line

T = TypeVar("T")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_SECRET = re.compile(r"key|secret|token|passw|credential|signature|sas$|^sig$", re.IGNORECASE)
#: How long a request to Google Cloud is tried; its client's own 15 minutes look like a hang.
_GCS_RETRY_S = 20
#: What a store answers when another try would go the same way.
_FOR_GOOD = (
    "NO_SUCH_BUCKET",
    "RESOURCE_NOT_FOUND",
    "ACCESS_DENIED",
    "FORBIDDEN",
    "INVALID_ACCESS_KEY",
    "INVALID_CLIENT_TOKEN",
    "UNRECOGNIZED_CLIENT",
    "SIGNATURE",
    "EXPIRED_TOKEN",
    "MISSING_AUTHENTICATION",
    "PERMANENT_REDIRECT",
    "HTTP Status 401",
    "HTTP Status 403",
    "HTTP Status 404",
    "Permission denied",
    "PermissionDenied",
    "NotFound",
)
_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: What torch's own writer of files says then, without a number.
_NO_SPACE_IN_TORCH = re.compile(r"PytorchStreamWriter|inline_container|file write failed")


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
    ClusterError
        If it does not answer.
    """
    refuse_credentials(uri)
    if uri.lower().startswith(("gs://", "gcs://")) and "retry_limit_seconds=" not in uri:
        uri += f"{'&' if '?' in uri else '?'}retry_limit_seconds={_GCS_RETRY_S}"
    try:
        return FileSystem.from_uri(uri)
    except Exception as error:  # S3 is asked for the region of a bucket
        kind = ClusterError if "NETWORK_CONNECTION" in str(error) else InputError
        raise kind(f"{uri} cannot be used: {one_line(error)}") from error


def refuse_credentials(uri: str) -> None:
    """Refuse a URI with a password or key in it, without repeating it.

    Raises
    ------
    InputError
        Naming the part of the URI.
    """
    scheme, _, rest = uri.partition("://")
    address, _, query = rest.partition("?")
    names = [name for name, _ in parse_qsl(query, keep_blank_values=True) if _SECRET.search(name)]
    found = "credentials" if "@" in address.partition("/")[0] else ", ".join(names)
    if found:
        raise InputError(
            f"the {scheme}:// address carries {found}, which would end up in logs and run.json: "
            "set credentials in the environment of the cluster's nodes instead"
        )


def retried(call: Callable[[], T], pauses: Iterable[float], say: Callable[[str], object]) -> T:
    """Call, and again after each pause if a store failed for a reason that may pass.

    Parameters
    ----------
    pauses : iterable of float
        Seconds before each further try.
    say : callable
        Told of each failure that is followed by another try.

    Raises
    ------
    OSError, ArrowException
        What the last try raised. At once: FileNotFoundError, and what :func:`is_for_good` knows.
    """
    for pause in (*pauses, None):
        try:
            return call()
        except FileNotFoundError:
            raise
        except (OSError, ArrowException) as error:
            if pause is None or is_out_of_space(error) or is_for_good(error):
                raise
            say(f"next try in {pause:g} s: {one_line(error)}")
            time.sleep(pause)
    raise AssertionError


def is_for_good(error: BaseException) -> bool:
    """Whether a store's answer means that another try would go the same way."""
    return any(word in str(error) for word in _FOR_GOOD)


def is_out_of_space(error: BaseException) -> bool:
    """Whether a disk, a quota or the size that a file may have is used up."""
    if isinstance(error, OSError):
        return error.errno in _NO_SPACE
    return isinstance(error, RuntimeError) and bool(_NO_SPACE_IN_TORCH.search(str(error)))


@contextmanager
def writing_to(folder: object) -> Iterator[None]:
    """Say which folder it is that cannot be written.

    Raises
    ------
    ClusterError
        If there is no space left.
    InputError
        If writing there is not allowed.
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
            raise InputError(f"{folder} cannot be written: {one_line(error)}") from error
        raise


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a local file, whole or not at all, with the folders above it; return its path.

    Under a temporary name, which is then renamed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
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
