"""What does a person type to have a report written again?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cuvis_dist.commands.options import add_command

if TYPE_CHECKING:
    from cuvis_dist.report.writing import Location


def add(commands: Any) -> None:
    """Add ``cuvis-dist report`` to the commands.

    Parameters
    ----------
    commands : argparse action
        From ``add_subparsers``.
    """
    report = add_command(
        commands, "report", "write the report of a run again, or beside that of another run"
    )
    report.add_argument(
        "output", metavar="OUTPUT_DIR", help="output folder of a run, init or train; or its URI"
    )
    report.add_argument("--against", metavar="OTHER", help="output folder of a run to compare with")
    report.add_argument(
        "--data", action="store_true", help="write the data of each plot, too: report/*.csv"
    )
    report.add_argument("-v", "--verbose", action="store_true", help="show logs")
    report.set_defaults(command=_report)


def _report(arguments: argparse.Namespace, lines: Any) -> int:
    lines.wait("reading what the run left")
    from cuvis_dist.report.writing import write_report
    from cuvis_dist.storage import OutputFolder

    against = OutputFolder(arguments.against) if arguments.against else None
    place: Location = write_report(OutputFolder(arguments.output), against, arguments.data)
    lines.settle()
    print(f"report   {place}")
    return 0
