"""What can go wrong that a person must hear about, and which exit code says so?

Every error here carries a whole message: what was wrong, where, and what to do. The command
line prints it as it is; a job ends with ``exit_code``.
"""

from __future__ import annotations

import re


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


class DriftError(CuvisDistError):
    """An archive is farther from what a pipeline was fitted on than a person allows."""

    exit_code = 5


#: Exit code of a run that was interrupted (Ctrl-C, SIGTERM), as shells have it.
INTERRUPTED = 130


def one_line(error: BaseException) -> str:
    """Return ``Type: message`` on one line, without a traceback that the message has."""
    message = str(error)
    if (end := without_traceback(message)) != message:
        return end
    # NumPy says of what is no array that it may be loaded unsafely.
    message = " ".join(message.split()).partition(" If you trust the file")[0]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def without_traceback(message: str) -> str:
    """Return a message as it is or, if it has a traceback, the ``Type: message`` that this ends in.

    Ray and torch's loaders give errors of other processes their traceback as message.
    """
    found = _TRACEBACK.search(_COLOURS.sub("", message))
    return " ".join(found.group("end").split()) if found else message


def own_message(error: CuvisDistError) -> CuvisDistError:
    """Return an error of ours with the message that it was raised with."""
    message = str(error)
    end = without_traceback(message)
    return error if end == message else type(error)(end.partition(": ")[2])


_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
#: The last traceback of a text, and the error that it ends in.
_TRACEBACK = re.compile(
    r"(?:.*^)?(?:Original )?(?:Traceback \(most recent call last\):|ray::[^\n]*)\n"
    r"(?:[ \t][^\n]*\n)+(?P<end>\S.*)",
    re.DOTALL | re.MULTILINE,
)
