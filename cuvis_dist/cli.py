"""The ``cuvis-dist`` command: what does a person type?"""

from __future__ import annotations

import argparse
import atexit
import gc
import io
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from typing import Any

from cuvis_dist.commands import (
    applying,
    auditing,
    previewing,
    reporting,
    running,
    stores,
    submitting,
)
from cuvis_dist.commands.options import quiet_libraries
from cuvis_dist.errors import INTERRUPTED, CuvisDistError, one_line
from cuvis_dist.runs.lines import Lines
from cuvis_dist.stopping import stoppable

#: A line of the log; loguru would add the traceback of an exception.
_LOG = "{time:YYYY-MM-DD HH:mm:ss.SSS} | <level>{level: <8}</level> | {name}:{line} - {message}\n"


class _Outlet(io.FileIO):
    """A file that takes what nobody reads any more, as ``| head`` does after its lines."""

    def write(self, data: Any) -> int:
        """Write as any file does."""
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


@contextmanager
def _heard_or_not() -> Iterator[None]:
    """Let a command end as it would, whether or not somebody reads what it prints."""
    outputs: Any = (sys.stdout, redirect_stdout), (sys.stderr, redirect_stderr)
    with ExitStack() as outlets:
        for stream, redirect in outputs:
            try:
                raw: Any = _Outlet(stream.fileno(), "w", closefd=False)
                stream.flush()
                outlet = io.TextIOWrapper(
                    raw if stream.write_through else io.BufferedWriter(raw),
                    encoding=stream.encoding,
                    errors=stream.errors,
                    line_buffering=stream.line_buffering,
                    write_through=stream.write_through,  # as with python -u
                )
            except (AttributeError, OSError):  # there is none, or it is no file
                continue
            outlets.enter_context(redirect(outlet))
            outlets.callback(outlet.flush)
        yield


@_heard_or_not()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0 done, 1 failed, 2 bad input, 3 unusable data, 4 lost or missing resources, 5 drift,
    130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    atexit.register(gc.freeze)  # else Python looks for seconds through all that it has loaded
    verbose, in_session = arguments.verbose, _in_ray()
    # Ray's logs come between the lines, and would be rewritten with them.
    with Lines(rewriting=False if verbose else None) as lines, stoppable(lines.last):
        # The command alone: an address in its options may carry a secret, before it is refused.
        print(f"cuvis-dist {version('cuvis-dist')}: {_what(arguments, argv)}", file=lines.stream)
        try:
            _quiet(verbose, lines)
            return arguments.command(arguments, lines)
        except CuvisDistError as error:
            lines.last(str(error))
            return error.exit_code
        except KeyboardInterrupt:
            lines.last("interrupted")
            return INTERRUPTED
        except Exception as error:
            if verbose:
                raise
            lines.last(f"{one_line(error)} (-v shows where)")
            return 1
        finally:
            if not in_session:
                _leave_ray(lines)


def _what(arguments: argparse.Namespace, argv: Sequence[str]) -> str:
    """Return the command and the files that it is about."""
    files = [getattr(arguments, name, None) for name in ("pipeline", "trainrun")]
    words = [*argv[:1], *(str(file) for file in files if file)]
    if argv[0] == "store":
        store = re.sub("//[^/]*@", "//", arguments.store).partition("?")[0]
        words = [*argv[:2], store, *(["--data", *words[1:]] if words[1:] else [])]
    return shlex.join(words)


def _in_ray() -> bool:
    ray = sys.modules.get("ray")  # not loaded for this question
    return ray is not None and ray.is_initialized()


def _leave_ray(lines: Lines) -> None:
    """Stop the Ray that the command started, or leave the one it joined; else Python's end does."""
    if _in_ray():
        lines.wait("leaving Ray")
        sys.modules["ray"].shutdown()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cuvis-dist",
        description="Two-phase training of cuvis.ai pipelines on a Ray cluster.",
        epilog="exit codes: 0 done, 1 failed, 2 bad input, 3 unusable data, 4 lost or missing "
        "resources, 5 drift (audit), 130 interrupted",
    )
    parser.add_argument(
        "--version", action="version", version=f"cuvis-dist {version('cuvis-dist')}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    running.add(commands)
    applying.add(commands)
    previewing.add(commands)
    stores.add(commands)
    auditing.add(commands)
    reporting.add(commands)
    running.add_demo(commands)
    submitting.add(commands, lambda argv: _parser().parse_args(argv))
    return parser


def _quiet(verbose: bool, lines: Lines) -> None:
    """Leave the terminal to progress lines and results unless logs are asked for."""
    import warnings

    from loguru import logger

    level = "DEBUG" if verbose else "WARNING"
    logger.remove()
    logger.add(
        lines.log,
        level=0,
        format=lambda record: _LOG + ("{exception}" if verbose else ""),
        colorize=lines.stream.isatty(),
        filter=lambda record: bool(
            record["extra"].get("waiting") or record["level"].no >= logger.level(level).no
        ),
    )
    if not verbose:
        quiet_libraries()
        warnings.filterwarnings("ignore")


if __name__ == "__main__":
    sys.exit(main())
