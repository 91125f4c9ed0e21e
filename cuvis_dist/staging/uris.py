"""How is a file at a URI named, joined to its folder, and reached, also when the network fails?"""

from __future__ import annotations

import functools
import os
import random
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar
from urllib.parse import quote, unquote

from loguru import logger
from pyarrow import ArrowException, NativeFile
from pyarrow.fs import FileInfo, FileSelector, FileSystem, FileType

from cuvis_dist.errors import DataError, InputError, one_line
from cuvis_dist.storage import filesystem_of, retried

T = TypeVar("T")

#: So often a file is tried to be fetched.
ATTEMPTS = 4
#: Seconds before the second attempt; the pauses after it double.
PAUSE = 0.5
#: Up to so many files of a folder are asked for by name; of more, the folder is listed.
_ONE_BY_ONE = 8
#: Files that are asked for at the same time.
_ASKING = 16
_SAFE = "/!$&'()*+,;=:@~"


def join(folder: str, inside: str) -> str:
    """Return the URI of a file in a folder, of which ``inside`` is the relative path."""
    base, mark, query = folder.partition("?")
    return f"{base.rstrip('/')}/{quote(inside, safe=_SAFE)}{mark}{query}"


def parent(uri: str) -> str:
    """Return the URI of the folder of a file."""
    base, mark, query = uri.partition("?")
    return f"{base.rpartition('/')[0]}{mark}{query}"


def _split(uri: str) -> tuple[str, str, str, str]:
    """Return scheme, authority, key (decoded) and query."""
    scheme, _, rest = uri.partition("://")
    rest, _, query = rest.partition("?")
    authority, _, key = rest.partition("/")
    return scheme.lower(), authority, unquote(key).rstrip("/"), query


def parts_of(uri: str) -> tuple[str, ...]:
    """Return scheme, place and key as parts of a path; raises InputError for an unsafe key."""
    scheme, authority, key, query = _split(uri)
    place = "_" + quote(f"{authority}?{query}" if query else authority, safe=":")
    parts = (scheme, place, *key.split("/")) if key else (scheme, place)
    if {"", ".", ".."} & set(parts) or "\0" in key:
        raise InputError(
            f"{uri!r} cannot be staged: its path must not have '..', '.' or empty parts"
        )
    return parts


def uri_of_parts(scheme: str, place: str, *key: str) -> str:
    """Return the URI that :func:`parts_of` was given."""
    authority, mark, query = unquote(place.removeprefix("_")).partition("?")
    return f"{scheme}://{authority}/{quote('/'.join(key), safe=_SAFE)}{mark}{query}"


def remote(uri: str) -> tuple[FileSystem, str]:
    """Return the file system of a URI, and the path on it; raises as ``filesystem_of`` does."""
    scheme, authority, key, query = _split(uri)
    root = f"{scheme}://{authority}/{f'?{query}' if query else ''}"
    filesystem, base = _filesystem(root, os.getpid())
    return filesystem, f"{base.rstrip('/')}/{key}"


@functools.lru_cache(maxsize=32)
def _filesystem(root: str, pid: int) -> tuple[FileSystem, str]:
    """Return a client and the path of its root; a process that was forked has a new one."""
    return filesystem_of(root)


def fetched(uri: str, call: Callable[[], T]) -> T:
    """Return what ``call`` returns, which is called a few times if the network fails.

    Raises
    ------
    DataError
        If the file does not exist, or the last attempt failed; the message names the node.
    """
    pauses = [PAUSE * 2**n * random.uniform(0.8, 1.2) for n in range(ATTEMPTS - 1)]
    try:
        return retried(call, pauses, lambda text: logger.debug(f"{uri}: {text}"))
    except FileNotFoundError as error:
        raise DataError(f"{uri} does not exist") from error
    except (OSError, ArrowException) as error:
        raise DataError(
            f"{uri} cannot be fetched by {socket.gethostname()}: {one_line(error)}"
        ) from error


def listed(uris: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Return size and time of change (ns) of the files that exist, with few requests.

    Raises
    ------
    DataError
        If a store does not answer.
    """
    found = {}
    by_folder: dict[str, list[str]] = {}
    for uri in uris:
        by_folder.setdefault(parent(uri), []).append(uri)
    for folder, inside in by_folder.items():
        filesystem, key = remote(folder)
        keys = [remote(uri)[1] for uri in inside]
        many = len(inside) > _ONE_BY_ONE
        wanted = FileSelector(key.rstrip("/"), allow_not_found=True) if many else keys
        infos = fetched(folder, partial(filesystem.get_file_info, wanted))
        there = {info.path: info for info in infos if info.type == FileType.File}
        for uri, key in zip(inside, keys, strict=True):
            if key in there:
                found[uri] = there[key].size, there[key].mtime_ns or 0
    return found


def etags(uris: Iterable[str]) -> dict[str, str]:
    """Return what stores that have ETags tell of files; one request each, which reads none.

    Raises
    ------
    DataError
        If a store does not answer.
    """

    def etag(uri: str) -> str:
        filesystem, key = remote(uri)
        if filesystem.type_name != "s3":
            return ""
        with fetched(uri, lambda: filesystem.open_input_stream(key)) as stream:
            return (stream.metadata() or {}).get("ETag", b"").decode().strip('"')

    uris = list(uris)
    with ThreadPoolExecutor(_ASKING) as asking:
        found = dict(zip(uris, asking.map(etag, uris), strict=True))
    return {uri: told for uri, told in found.items() if told}


def opened(uri: str) -> NativeFile:
    """Return a file of a store, open for reading; raises DataError if there is none."""
    filesystem, key = remote(uri)
    return fetched(uri, lambda: filesystem.open_input_stream(key))


def look(uri: str) -> FileInfo:
    """Return what lies at a URI; raises DataError if the store does not answer."""
    filesystem, key = remote(uri)
    return fetched(uri, lambda: filesystem.get_file_info(key))
