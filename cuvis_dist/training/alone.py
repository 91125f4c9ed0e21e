"""How does a single rank train in the driver's process, without Ray?"""

from __future__ import annotations

import os
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from cuvis_ai_core.training.post_fit import EmitFn
from loguru import logger
from pytorch_lightning.plugins.environments import LightningEnvironment

from cuvis_dist.errors import ClusterError, CuvisDistError
from cuvis_dist.execution.copies import copied
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.local import as_worker, delivering
from cuvis_dist.scaling import Resources
from cuvis_dist.stopping import stop, terminable
from cuvis_dist.training.assignment import Assignment, Driver, Outcome, Seat
from cuvis_dist.training.rank import run_rank
from cuvis_dist.training.watch import Watch
from cuvis_dist.waiting import announce

#: How long an interrupted rank may take to tidy up, in seconds.
_LAST_SECONDS = 20.0


def train_here(assignment: Assignment, what: str, emit: EmitFn) -> Outcome:
    """Carry out an assignment in this process, on a copy of it.

    Parameters
    ----------
    assignment, what, emit
        As of :func:`~cuvis_dist.training.group.train_on_workers`.

    Raises
    ------
    ClusterError
        If the rank was stuck.
    CuvisDistError
        As :func:`~cuvis_dist.execution.failures.raise_cause` says.
    KeyboardInterrupt
        If it was interrupted.
    """
    resources = assignment.scaling.resources
    threads = _threads(resources)
    scaling = assignment.scaling.replace(resources={"cpus_per_worker": threads})
    announce(f"beginning {what}")
    with (
        _watched(what, resources.stall_seconds) as watch,
        raise_cause(what),
        as_worker(threads),
        _interruptible(),
    ):
        driver = Driver(delivering(emit), watch, os.getcwd())
        name = uuid.uuid4().hex
        seat = Seat(0, 1, name, name, "", driver, _lightning_keywords())
        outcome = run_rank(copied(replace(assignment, scaling=scaling)), seat)
    assert outcome is not None
    return outcome


def _threads(resources: Resources) -> int:
    """Return on how many threads this process trains: all that it has, as upstream, unless set."""
    if "cpus_per_worker" in resources.model_fields_set:
        return max(1, int(resources.cpus_per_worker))
    return torch.get_num_threads()


def _lightning_keywords() -> dict[str, object]:
    """Return what lets Lightning look for no other processes, and draw no bar of its own."""
    return {"plugins": [LightningEnvironment()], "devices": 1, "enable_progress_bar": False}


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let either signal raise KeyboardInterrupt in the block; afterwards handlers are as before.

    Lightning ignores Ctrl-C once it was pressed, and a training on Ray leaves a handler behind.
    """
    with terminable():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, stop)
        yield


@contextmanager
def _watched(what: str, stall_seconds: float) -> Iterator[_LocalWatch]:
    """Watch over the block; raises ClusterError if it ended because it was stuck."""
    watch = _LocalWatch(stall_seconds)
    try:
        yield watch
    except (CuvisDistError, KeyboardInterrupt, SystemExit) as error:
        if watch.ending and (verdict := watch.verdict()):
            raise ClusterError(f"{what} was ended: {verdict}") from None
        # Lightning makes one of the other.
        if isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        watch.over.set()


class _LocalWatch(Watch):
    """The watch over a rank of this process, which it interrupts when that is stuck.

    Attributes
    ----------
    ending : bool
        Whether the rank was interrupted.
    over : threading.Event
        Set once nothing is watched any more.
    """

    def __init__(self, stall_seconds: float) -> None:
        super().__init__(stall_seconds)
        self.ending = False
        self.over = threading.Event()

    def end(self) -> None:
        """Interrupt the main thread, or end the process where that does not help."""
        self.ending = True
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if not self.over.wait(_LAST_SECONDS):
            logger.critical(f"this process cannot be interrupted, and ends: {self.verdict()}")
            os._exit(ClusterError.exit_code)
