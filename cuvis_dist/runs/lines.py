"""How does what goes on become lines of a terminal, or of a log?

On a terminal the last line is rewritten, and a wait counts its seconds. Elsewhere every line stays:
what only changes is said at times, and what is waited for once a second has passed without news.

Imports nothing that takes long: the first line is there before anything else.
"""

from __future__ import annotations

import contextlib
import shutil
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
#: Empties the last line of a terminal.
_ERASE = "\r\x1b[2K"


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
        self._now: str | None = None  # what goes on
        self._waiting = False  # for its end, or else for news of it
        self._stage = ""  # what stays the same of it while it changes
        self._told = False  # whether a log has a line about that stage
        self._since = self._said = time.monotonic()
        self._shown = ""  # the last line, while it may be rewritten
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
            self._end()
            self._stay(line)

    def change(self, line: str) -> None:
        """Rewrite the last line; in a log, say it when nothing was said for a while."""
        with self._lock:
            self._end()
            self._begin(line, waiting=False)
            if self.rewriting:
                self._show(line)
            elif self._since - self._said >= LOG_SECONDS:
                self._told = True
                self._stay(line)

    def wait(self, what: str) -> None:
        """Say what is waited for from now on, until anything else is said."""
        with self._lock:
            self._end()
            self._begin(what, waiting=True)
            if self.rewriting:
                self._show(f"{what} ...")

    def settle(self) -> None:
        """End what goes on, and the line: something else is printed now."""
        with self._lock:
            self._end()
            if self._shown:
                self._write("\n")
                self._shown = ""

    def last(self, text: str) -> None:
        """Print how the command ended, whoever still looks at the terminal."""
        with contextlib.suppress(OSError):
            self.settle()
            print(f"cuvis-dist: {text}", file=self.stream, flush=True)

    def log(self, message: Message) -> None:
        """Print a message of the log, above what goes on: a sink for loguru."""
        with self._lock:
            if message.record["extra"].get("waiting"):
                self.wait(message.record["message"])
                return
            shown, self._shown = self._shown, ""
            self._write(f"{_ERASE if shown else ''}{message}")
            self._said = time.monotonic()
            if shown:
                self._show(shown)

    def _begin(self, what: str, waiting: bool) -> None:
        stage = what.partition(":")[0]
        self._told = self._told and stage == self._stage
        self._now, self._waiting, self._stage = what, waiting, stage
        self._since = time.monotonic()

    def _end(self) -> None:
        what, waiting, seconds = self._now, self._waiting, time.monotonic() - self._since
        self._now = None
        if waiting and what is not None and self.rewriting:
            if seconds < _SHORT:
                self._write(_ERASE)
                self._shown = ""
            else:
                self._stay(f"{what}: {seconds:.1f} s")

    def _tick(self) -> None:
        while not self._closed.wait(_SHORT / 4):
            with self._lock:
                now = time.monotonic()
                seconds = now - self._since
                if self._now is None or seconds < _SHORT:
                    continue
                if self.rewriting:
                    self._show(f"{self._now} ... {seconds:.0f} s")
                elif not self._told:
                    self._told = True
                    self._stay(f"{self._now} ...")
                elif now - self._said >= LOG_SECONDS:
                    self._stay(f"still {self._now} ({seconds:.0f} s)")

    def _stay(self, line: str) -> None:
        self._write(f"{_ERASE if self.rewriting else ''}  {line}\n")
        self._shown = ""
        self._said = time.monotonic()

    def _show(self, line: str) -> None:
        if line != self._shown:  # a line that wraps could not be rewritten
            fitting = line[: max(1, shutil.get_terminal_size().columns - 3)]
            self._write(f"{_ERASE}  {fitting}")
            self._shown = line

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):  # a terminal that was closed ends no run
            self.stream.write(text)
            self.stream.flush()
