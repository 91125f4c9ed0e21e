"""Which URI does a path on this node stand for?"""

from __future__ import annotations

from pathlib import PurePath

from cuvis_dist.staging.cache import Staging, stagings


def staged(path: str | PurePath) -> list[tuple[Staging, str]]:
    """Return the cache that a path belongs to, with the file's URI; an empty list if none."""
    text = str(path)
    for staging in stagings():
        if text.startswith(f"{staging.files}/") and (uri := staging.uri_of(text)):
            return [(staging, uri)]
    return []


def original(path: str) -> str:
    """Return the URI that a path of a cache stands for, else the path."""
    return next((uri for _, uri in staged(path)), path)


def with_uris(message: str) -> str:
    """Return a message that names files by their URIs."""
    for staging in stagings():
        message = staging.uris_in(message)
    return message


def staged_files(*paths: str | None) -> tuple[Staging | None, tuple[str, ...]]:
    """Return the cache that some of the paths belong to, if any do, and the URIs of those."""
    found = [pair for path in paths if path for pair in staged(path)]
    return (found[0][0] if found else None), tuple(dict.fromkeys(uri for _, uri in found))
