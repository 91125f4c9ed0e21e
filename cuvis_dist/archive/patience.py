"""How long may reading a frame take? Longer, and it counts as one that this node cannot read.

A thread of its own reads: storage that hangs lets go of nobody who waits for it.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from loguru import logger

T = TypeVar("T")
Notice = Callable[[str], object]


@dataclass(frozen=True)
class Patience:
    """How many seconds a reading may take: before it is warned of, and at most."""

    warn: float = 45.0
    most: float = 300.0


_patience = Patience()
_notice: Notice = logger.warning
_readers = threading.local()


def patience() -> Patience:
    """Return what this process has."""
    return _patience


def be_patient(seconds: Patience, notice: Notice = logger.warning) -> None:
    """Set what this process has, and who is told of a slow reading."""
    global _patience, _notice
    _patience, _notice = seconds, notice


def read_in_time(read: Callable[[], T], what: str) -> T:
    """Return ``read()``; what does not come back is left to itself.

    Parameters
    ----------
    read : callable
        It is called in another thread, with the context and torch's modes of this one.
    what : str
        What is read, for messages.

    Raises
    ------
    TimeoutError
        If it takes too long.
    """
    reader = getattr(_readers, "one", None) or Reader()
    _readers.one = None  # until it has answered
    answer = reader.ask(read)
    warn = min(_patience.warn, _patience.most)
    if not wait([answer], warn).done:
        _notice(
            f"{what} has been read for {warn:g} s and is not there yet; after {_patience.most:g} s "
            "it counts as unreadable (resources.read_seconds)"
        )
        if not wait([answer], _patience.most - warn).done:
            raise TimeoutError(
                f"it was not there after {_patience.most:g} s (resources.read_seconds): the "
                "storage that it lies on hangs, or is slow"
            )
    _readers.one = reader
    return answer.result()


def _in_the_same_way(read: Callable[[], T]) -> Callable[[], T]:
    """Return ``read`` with what belongs to this thread alone: context, and modes of torch."""
    context, threads = contextvars.copy_context(), torch.get_num_threads()
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def same() -> T:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with torch.inference_mode(inference), torch.set_grad_enabled(grad):
            return context.run(read)

    return same


class Reader(threading.Thread):
    """A thread that reads what it is asked for, one after another; the process ends without it."""

    def __init__(self) -> None:
        super().__init__(name="cuvis-dist-reader", daemon=True)
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None] = (
            queue.SimpleQueue()
        )
        self.start()

    def ask(self, read: Callable[[], T]) -> Future[T]:
        """Have ``read()`` called with the context and torch's modes of the thread that asks."""
        answer: Future[T] = Future()
        self._asked.put((_in_the_same_way(read), answer))
        return answer

    def end(self) -> None:
        """End the thread once it has read what it was asked for."""
        self._asked.put(None)

    def run(self) -> None:
        """Read until the end; the cube of one frame is not held while the next is waited for."""
        while self._answer():
            pass

    def _answer(self) -> bool:
        asked = self._asked.get()
        if asked is None:
            return False
        read, answer = asked
        try:
            answer.set_result(read())
        except BaseException as error:
            answer.set_exception(error)
        return True
