"""What can go wrong that a person must hear about, and which exit code says so?

Every error here carries a whole message: what was wrong, where, and what to do. The command
line prints it as it is; a job ends with ``exit_code``.
"""

from __future__ import annotations


class CuvisDistError(Exception):
    """A failure with a message for people."""

    exit_code = 1


class InputError(CuvisDistError, ValueError):
    """A trainrun, pipeline or option that cannot be run as it stands."""

    exit_code = 2


class DataError(CuvisDistError):
    """A recording or frame that cannot be used; the message names it."""

    exit_code = 3


class ClusterError(CuvisDistError):
    """Workers, memory or the cluster itself were lost."""

    exit_code = 4


class LostWorkerError(ClusterError):
    """A worker died, or its node did; another try may go well."""


#: Exit code of a run that was interrupted (Ctrl-C, SIGTERM), as shells have it.
INTERRUPTED = 130


def one_line(error: BaseException) -> str:
    """Return ``Type: message`` with the message on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
