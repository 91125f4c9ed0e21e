"""How long may reading a frame take? Longer, and it counts as one that this node cannot read.

A thread of its own reads: storage that hangs lets go of nobody who waits for it.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
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
    reader = getattr(_readers, "one", None) or _Reader()
    _readers.one = None  # until it has answered
    reader.asked.put(_in_the_same_way(read))
    warn = min(_patience.warn, _patience.most)
    try:
        answer = reader.answers.get(timeout=warn)
    except queue.Empty:
        _notice(
            f"{what} has been read for {warn:g} s and is not there yet; after {_patience.most:g} s "
            "it counts as unreadable (resources.read_seconds)"
        )
        try:
            answer = reader.answers.get(timeout=_patience.most - warn)
        except queue.Empty:
            raise TimeoutError(
                f"it was not there after {_patience.most:g} s (resources.read_seconds): the "
                "storage that it lies on hangs, or is slow"
            ) from None
    _readers.one = reader
    value, error = answer
    if error is not None:
        raise error
    return value


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


class _Reader(threading.Thread):
    """A thread that reads what it is asked for, one after another."""

    def __init__(self) -> None:
        super().__init__(name="cuvis-dist-reader", daemon=True)
        self.asked: queue.SimpleQueue[Callable[[], Any]] = queue.SimpleQueue()
        self.answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        """Read for ever; the cube of one frame is not held while the next is waited for."""
        while True:
            self._answer(self.asked.get())

    def _answer(self, read: Callable[[], Any]) -> None:
        try:
            answer: tuple[Any, BaseException | None] = read(), None
        except BaseException as error:
            answer = None, error
        self.answers.put(answer)
