"""Which files does a data module open while it is set up, and how do they come here in time?

Only the module knows which. So each file of a cache is fetched when it is opened; later a frame's
files are held while the frame is read.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

from loguru import logger

from cuvis_dist.nodes import upstream
from cuvis_dist.staging.cache import stagings
from cuvis_dist.staging.paths import staged


class _Opened(threading.local):
    """What this thread does with the path of each file before it opens it.

    Attributes
    ----------
    fetch : callable or None
        Fetches a file of a cache, and holds it until the block of
        :func:`fetched_when_opened` ends.
    """

    fetch: Callable[[str], None] | None = None


_opened = _Opened()


@contextmanager
def fetched_when_opened() -> Iterator[None]:
    """Fetch each file of a cache that this thread opens in the block, and hold it until its end.

    Setting a module up opens files that only the module knows: the first ``.npz`` of a split
    for its wavelengths, labels for a selector by category, a recording to count its frames.
    Without a cache in this process nothing is done.
    """
    if not stagings() or _opened.fetch:
        yield
        return
    _listen()
    with ExitStack() as held:

        def fetch(path: str) -> None:
            for staging, uri in staged(path):
                _opened.fetch = None  # fetching opens files, too
                try:
                    held.enter_context(staging.held([uri]))
                finally:
                    _opened.fetch = fetch

        _opened.fetch = fetch
        try:
            with upstream.counting_measurements(_count):
                yield
        finally:
            _opened.fetch = None


@cache
def _listen() -> None:
    """Let :class:`_Opened` hear of every file that Python opens in this process, before it does."""

    def hear(event: str, arguments: tuple) -> None:
        if event == "open" and _opened.fetch and isinstance(arguments[0], str):
            _opened.fetch(arguments[0])

    sys.addaudithook(hear)


def _count(path: str, needed: bool, count: Callable[[str], Any]) -> Any:
    """Return how many measurements a recording has.

    One at a URI is fetched to be counted only if the number is ``needed``.
    """
    for staging, uri in staged(path):
        if not needed:  # a list has them; what is wrong there comes out when the frame is read
            return sys.maxsize
        logger.info(f"{uri} is fetched to count its frames; a universe for cu3s_multi lists them")
        with staging.held([uri]):
            return count(path)
    return count(path)
