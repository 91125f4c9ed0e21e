"""Who may write to an output folder in a store? The job that has its lease.

A store has no locks. An object says who writes and until when; its owner renews it as long as it
lives, and whoever comes later waits for the end of that time. Clocks of the machines may differ by
less than a lease lasts.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass

from loguru import logger

from cuvis_dist.errors import CuvisDistError, InputError
from cuvis_dist.storage import OutputFolder

#: The object that is the lease.
LEASE = ".lease"
#: How many seconds a lease lasts that nobody renews.
SECONDS = 60.0
#: Seconds until an owner looks whether another began at the same moment.
_SETTLING = 0.5


@dataclass(frozen=True)
class Lease:
    """What the object says.

    Attributes
    ----------
    owner : str
        Process and host, for people.
    key : str
        Tells this job from all others.
    until : float
        When it ends, in seconds since 1970.
    """

    owner: str
    key: str
    until: float


def read_lease(output: OutputFolder) -> Lease | None:
    """Return the lease of a folder, over or not; None where there is none that can be read."""
    try:
        return Lease(**json.loads(output.read(LEASE)))
    except (FileNotFoundError, ValueError, TypeError):
        return None


@contextmanager
def leased(output: OutputFolder) -> Iterator[None]:
    """Have the lease of a folder for as long as the block lasts.

    Raises
    ------
    InputError
        If another job has it, with that job's process and host.
    KeyboardInterrupt
        If another job took it over, since this one could not renew it in time.
    """
    owner, key = f"process {os.getpid()} on {socket.gethostname()}", uuid.uuid4().hex
    earlier = read_lease(output)
    if earlier is not None and earlier.until > time.time():
        raise _taken(output, earlier)
    _renew(output, owner, key)
    time.sleep(_SETTLING)
    now = read_lease(output)
    if now is not None and now.key != key:
        raise _taken(output, now)
    if earlier is not None:
        logger.warning(
            f"{output} is taken over from {earlier.owner}, which has not renewed its lease"
        )
    over = threading.Event()
    arguments = output, owner, key, over
    thread = threading.Thread(target=_keep, args=arguments, name="cuvis-dist-lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with suppress(CuvisDistError, OSError):  # it ends by itself
            if (now := read_lease(output)) is not None and now.key == key:
                output.remove(LEASE)


def _taken(output: OutputFolder, lease: Lease) -> InputError:
    left = max(0.0, lease.until - time.time())
    return InputError(
        f"another run is writing to {output} ({lease.owner}): wait until it has ended, stop it, or "
        f"give this one another --output-dir. If it was killed, its lease ends in {left:.0f} s"
    )


def _renew(output: OutputFolder, owner: str, key: str) -> None:
    lease = Lease(owner, key, time.time() + SECONDS)
    output.write(LEASE, json.dumps(asdict(lease)).encode())


def _keep(output: OutputFolder, owner: str, key: str, over: threading.Event) -> None:
    """Renew the lease until the job is over, or another has taken it."""
    while not over.wait(SECONDS / 3):
        try:
            now = read_lease(output)
            if now is not None and now.key != key:
                logger.error(f"{now.owner} has taken over {output}; this run ends")
                os.kill(os.getpid(), signal.SIGINT)
                return
            _renew(output, owner, key)
        except (CuvisDistError, OSError) as error:
            logger.warning(f"the lease of {output} is not renewed: {error}")
