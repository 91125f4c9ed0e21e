"""Which place and file system does a URI or path name, and what do a store's failures mean?"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl

from pyarrow import ArrowException
from pyarrow.fs import FileSystem

from cuvis_dist.errors import ClusterError, InputError, one_line
from cuvis_dist.storage.disk import is_out_of_space

T = TypeVar("T")
#: A place for files: a local path, or a URI as a string.
Location = Path | str
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_SECRET = re.compile(r"key|secret|token|passw|credential|signature|sas$|^sig$", re.IGNORECASE)
#: A request to Google Cloud is tried for so long; its client's own 15 minutes look like a hang.
_GCS_RETRY_S = 20
#: A store's answer has one of these words in it when another try would go the same way.
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


def is_uri(path: object) -> bool:
    """Whether a path names another file system: ``s3://``, ``gs://``, ``hdfs://``, ``file://``."""
    return isinstance(path, str) and _SCHEME.match(path) is not None


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


def filesystem_of(uri: str) -> tuple[FileSystem, str]:
    """Return the file system that a URI names, and the path on it.

    Credentials and endpoints come from the environment (``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL``, …), never from the URI, which ends up in logs and records.

    Returns
    -------
    tuple of pyarrow.fs.FileSystem and str
        A client of the file system, and the path on it without the scheme.

    Raises
    ------
    InputError
        If there is no such file system, or the URI carries a password.
    ClusterError
        If the file system does not answer.
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
    """Return what ``call`` returns, and call again if a store failed for a reason that may pass.

    Parameters
    ----------
    call : callable
        The request to the store.
    pauses : iterable of float
        Seconds before each further try.
    say : callable
        It is called with the message of each failure that is followed by another try.

    Raises
    ------
    OSError, ArrowException
        What the last try raised. FileNotFoundError, a full disk and what :func:`is_for_good`
        knows are raised at once.
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
