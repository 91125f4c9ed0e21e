"""How does what goes on become lines of a terminal, or of a log?

On a terminal the last line is rewritten, and a wait counts its seconds. Elsewhere every line stays:
what only changes is said at times, and a wait once it has lasted a second.

Imports nothing that takes long: the first line is there before anything else.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from loguru import Message

#: Seconds between two lines of a log about the same thing.
LOG_SECONDS = 30
#: Seconds after which a wait is worth a line that stays.
_SHORT = 1


class Lines:
    """Lines of progress; leaving the context ends what is waited for.

    Parameters
    ----------
    stream : file, optional
        Where the lines go; standard error by default.
    rewriting : bool, optional
        Rewrite the last line while it changes; by default on a terminal.
    """

    def __init__(self, stream: TextIO | None = None, rewriting: bool | None = None) -> None:
        self.stream = stream or sys.stderr
        self.rewriting = self.stream.isatty() if rewriting is None else rewriting
        self._lock = threading.RLock()  # events arrive in threads of their own
        self._unfinished = False  # whether the last line may be rewritten
        self._now: str | None = None  # what goes on
        self._waiting = False  # for its end, or else for news of it
        self._since = self._said = time.monotonic()
        self._closed = threading.Event()
        self._ticks = threading.Thread(target=self._tick, name="cuvis-dist-lines", daemon=True)

    def __enter__(self) -> Lines:
        self._ticks.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self.settle()

    def say(self, line: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._end_wait()
            self._put(f"  {line}", stays=True)

    def change(self, line: str) -> None:
        """Rewrite the last line; in a log, say it when nothing was said for a while."""
        with self._lock:
            self._end_wait()
            self._now, self._since = line, time.monotonic()
            if self.rewriting:
                self._put(f"  {line}", stays=False)
            elif self._since - self._said >= LOG_SECONDS:
                self._put(f"  {line}", stays=True)

    def wait(self, what: str) -> None:
        """Say what is waited for from now on, until anything else is said."""
        with self._lock:
            self._end_wait()
            self._now, self._since, self._waiting = what, time.monotonic(), True
            if self.rewriting:
                self._put(f"  {what} ...", stays=False)

    def settle(self) -> None:
        """End what is waited for, and the line: something else is printed now."""
        with self._lock:
            self._end_wait()
            if self._unfinished:
                self._write("\n")
                self._unfinished = False

    def log(self, message: Message) -> None:
        """Print a message of the log as it is: a sink for loguru."""
        with self._lock:
            if message.record["extra"].get("waiting"):
                self.wait(message.record["message"])
            else:
                self.settle()
                self._write(message)
                self._said = time.monotonic()

    def _end_wait(self) -> None:
        what, waiting, seconds = self._now, self._waiting, time.monotonic() - self._since
        self._now, self._waiting = None, False
        if not (waiting and self.rewriting):
            return
        if seconds < _SHORT:
            self._put("", stays=False)
        else:
            self._put(f"  {what}: {seconds:.1f} s", stays=True)

    def _tick(self) -> None:
        while not self._closed.wait(_SHORT / 4):
            with self._lock:
                now = time.monotonic()
                seconds = now - self._since
                if self._now is None or seconds < _SHORT:
                    continue
                if self.rewriting:
                    self._put(f"  {self._now} ... {seconds:.0f} s", stays=False)
                elif self._waiting and self._said <= self._since:
                    self._put(f"  {self._now} ...", stays=True)
                elif now - self._said >= LOG_SECONDS:
                    self._put(f"  still {self._now} ({seconds:.0f} s)", stays=True)

    def _put(self, line: str, stays: bool) -> None:
        start = "\r\x1b[2K" if self.rewriting else ""
        self._write(f"{start}{line}\n" if stays else f"{start}{line}")
        self._unfinished = bool(line) and not stays
        self._said = time.monotonic()

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
