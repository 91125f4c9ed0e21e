"""The ``cuvis-dist`` command: what does a person type?"""

from __future__ import annotations

import argparse
import atexit
import gc
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version

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
    files = (getattr(arguments, name, None) for name in ("pipeline", "trainrun"))
    words = argv[:2] if argv[0] == "store" else argv[:1]
    return shlex.join([*words, *(str(file) for file in files if file)])


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
