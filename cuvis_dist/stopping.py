"""What ends a process before its time? A signal, at first politely, or the loss of its cluster.

SIGINT (Ctrl-C), SIGTERM and SIGHUP (a closed terminal) raise KeyboardInterrupt. Under the command
a second one ends the process at once, whatever it is doing: a thread sees the signals, since the
main one may be in code that does not look for them. Imports nothing that takes long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from cuvis_dist.errors import INTERRUPTED

#: Seconds after which a second signal is one: shells and launchers pass on the first one twice.
_APART = 0.5
#: Seconds for what is written down when the process ends at once.
_LAST_SECONDS = 5.0

Words = Callable[[str, int, str | None], object]
"""Writes down how a job ends: status, exit code, and the message, if it has one."""

_words: list[Words] = []
_say: Callable[[str], object] | None = None
_stopped = threading.Event()


def is_command() -> bool:
    """Whether this process is the command's, which may be ended; or else somebody's Python."""
    return _say is not None


@contextmanager
def stoppable(say: Callable[[str], object]) -> Iterator[None]:
    """Let a second signal end the process at once, as long as the block lasts.

    Parameters
    ----------
    say : callable
        Prints the last line.
    """
    global _say
    if threading.current_thread() is not threading.main_thread() or _say is not None:
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reading,), name="cuvis-dist-stop", daemon=True).start()
    _say = say
    _stopped.clear()
    try:
        with terminable():
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                signal.signal(signal.SIGINT, stop)
            yield
    finally:
        _say = None
        signal.set_wakeup_fd(before)
        os.close(writing)
        if _stopped.is_set():  # Python itself ends now, and would print a traceback
            signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the block as Ctrl-C does; afterwards handlers are as before.

    What Ray and Lightning set for any of the three is undone, too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, stop)
    if before[signal.SIGHUP] is not signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def last_words(words: Words) -> Iterator[None]:
    """Have ``words`` called if the process is ended inside the block, in another thread."""
    _words.append(words)
    try:
        yield
    finally:
        _words.remove(words)


def stop(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt, once under the command: a handler of signals."""
    if number == signal.SIGHUP:
        _leave_terminal()
    again = is_command() and _stopped.is_set()
    _stopped.set()
    if not again:
        raise KeyboardInterrupt


def end_now(status: str, exit_code: int, message: str | None = None) -> None:
    """Write down how the job ends, say so, and end the process; may be called in any thread."""

    def write() -> None:
        for words in reversed(_words):
            words(status, exit_code, message)

    writing = threading.Thread(target=write, daemon=True)
    writing.start()
    writing.join(_LAST_SECONDS)
    with contextlib.suppress(Exception):
        (_say or _to_stderr)(message or status)
    os._exit(exit_code)


def _listen(reading: int) -> None:
    """Wait for the numbers of signals, one a byte, until the pipe is closed."""
    first: float | None = None
    with contextlib.closing(os.fdopen(reading, "rb", buffering=0)) as pipe:
        while numbers := pipe.read(1):
            if numbers[0] not in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                continue
            first = first or time.monotonic()
            if time.monotonic() - first >= _APART:
                end_now("interrupted", INTERRUPTED, None)


def _leave_terminal() -> None:
    """Let what is printed from now on go nowhere, where it went to a terminal."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                os.dup2(nowhere, number)
    os.close(nowhere)


def _to_stderr(text: Any) -> None:
    print(f"cuvis-dist: {text}", file=sys.stderr, flush=True)
