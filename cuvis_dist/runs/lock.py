"""Who may write to an output folder? One job at a time."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cuvis_dist.errors import CuvisDistError, InputError
from cuvis_dist.runs.lease import leased, read_lease
from cuvis_dist.storage import OutputFolder, writing_to

#: File in an output folder that the job's process holds.
LOCK = ".lock"


def writer_of(output: OutputFolder) -> str | None:
    """Return which process and host have the output folder; empty where none has.

    None where nobody can tell: a store does not answer.
    """
    if output.local is None:
        try:
            lease = read_lease(output)
        except CuvisDistError:
            return None
        return lease.owner if lease is not None and lease.until > time.time() else ""
    try:
        file = open(output.local / LOCK, encoding="utf-8")  # noqa: SIM115
    except OSError:
        return ""
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip()
    return ""


@contextmanager
def only_run(output: OutputFolder) -> Iterator[None]:
    """Keep a second job out of an output folder for as long as the block lasts.

    The lock of a local folder is the process's: it is gone when that dies, however it does. A store
    has a lease (:mod:`~cuvis_dist.runs.lease`).

    Raises
    ------
    InputError
        If another job has the folder, with its process and host.
    """
    if output.local is None:
        with leased(output):
            yield
        return
    with writing_to(output.local):
        output.local.mkdir(parents=True, exist_ok=True)
        file = open(output.local / LOCK, "a+", encoding="utf-8")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"another run is writing to {output} ({file.read().strip()}): wait until it "
                "has ended, stop it, or give this one another --output-dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
