"""How does a command become a job of a cluster? ``submit``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cuvis_dist.commands.options import add_command, add_verbose
from cuvis_dist.errors import InputError
from cuvis_dist.runs.lines import Lines

Parse = Callable[[Sequence[str]], argparse.Namespace]
"""Makes options of what was typed, or ends the process with a message."""


def add(commands: Any, parse: Parse) -> None:
    """Add ``submit``.

    Parameters
    ----------
    parse : callable
        It understands the command that is submitted: a wrong option is found here, not there.
    """
    submit = add_command(
        commands, "submit", "run a command as a job of a cluster and end with its exit code"
    )
    submit.add_argument(
        "--address",
        metavar="URL",
        help="the head node's dashboard; default: RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265",
    )
    submit.add_argument(
        "--working-dir",
        type=Path,
        metavar="DIR",
        help="folder to upload and run in; without it the job's paths are the cluster's",
    )
    submit.add_argument("--no-follow", action="store_true", help="do not wait for the job to end")
    add_verbose(submit)
    submit.add_argument(
        "job",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ...",
        help="e.g. run trainrun.yaml --train-workers 2",
    )
    submit.set_defaults(command=_submit, parse=parse)


def _submit(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.runs.submission import Submission, submit
    from cuvis_dist.storage import is_uri

    command = arguments.job[arguments.job[:1] == ["--"] :]
    job = arguments.parse(command)
    if job.command is _submit:
        raise InputError("a job that submits a job would wait for itself")
    for name in ("trainrun", "pipeline", "scaling", "initialization", "compare"):
        path = getattr(job, name, None)
        if path and not is_uri(path):
            _check_uploaded(Path(path), arguments.working_dir)
            if name not in ("trainrun", "scaling"):
                _check_uploaded(Path(path).with_suffix(".pt"), arguments.working_dir)
    options = {"address": arguments.address} if arguments.address else {}
    submission = Submission(command, working_dir=arguments.working_dir, **options)
    print(submission.as_ray_command(), flush=True)

    def show(text: str) -> None:
        lines.settle()
        print(text, end="", flush=True)

    return submit(submission, not arguments.no_follow, show)


def _check_uploaded(path: Path, working_dir: Path | None) -> None:
    """Refuse a relative path that the job would not find."""
    if path.is_absolute():
        return
    if working_dir is None:
        raise InputError(
            f"{path} is relative to a folder that is not uploaded: give that folder "
            "(--working-dir .), or a path that the cluster knows"
        )
    if not (working_dir / path).is_file():
        raise InputError(f"{path} is not in {working_dir}, the folder that the job runs in")
