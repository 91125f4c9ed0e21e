"""What happens around every job, whichever it is? It is locked, recorded, stopped and ended here.

``run``, ``init``, ``train``, ``evaluate`` and ``score`` each enter one :func:`job` and say inside
it what they do themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from loguru import logger

from cuvis_dist.archive import caches_in_use, clear_caches
from cuvis_dist.errors import INTERRUPTED, CuvisDistError, one_line
from cuvis_dist.execution.failures import out_of_space
from cuvis_dist.execution.outage import watched_cluster
from cuvis_dist.execution.where import Work, begin, settled
from cuvis_dist.execution.worker import on_other_nodes
from cuvis_dist.runs.lock import only_run
from cuvis_dist.runs.record import JobRecord, now
from cuvis_dist.scaling import Scaling
from cuvis_dist.stopping import last_words, terminable
from cuvis_dist.storage import OutputFolder

R = TypeVar("R", bound=JobRecord)


@dataclass
class Job(Generic[R]):
    """A job that goes on.

    Attributes
    ----------
    record : JobRecord
        What it leaves in its output folder, filled in as the job goes on.
    scaling : Scaling
        Its settings.
    verbose : bool
        Show Ray's logs.
    around : ExitStack
        What is left when the job ends.
    """

    record: R
    scaling: Scaling
    verbose: bool = False
    around: ExitStack = field(default_factory=ExitStack)

    def begin(self) -> None:
        """Make this the last job of its output folder: an earlier ``result.json`` goes."""
        self.record.write()

    def connect(self, training: bool | None, work: Callable[[], Work]) -> None:
        """Choose where the work runs; join or start the Ray cluster unless all of it stays here.

        Parameters
        ----------
        training : bool or None
            As :func:`~cuvis_dist.execution.where.begin` has it.
        work : callable
            Returns how much there is to do, training apart.

        Raises
        ------
        InputError
            If the settings contradict each other.
        ClusterError
            If the cluster cannot be reached, or one that was started here is too small.
        """
        self.scaling = settled(self.scaling, self.record.job, work)
        with terminable():  # Ray sets a handler of its own
            begin(self.scaling, training, self.verbose)
        self.around.enter_context(watched_cluster())
        self.around.callback(_forget_frames)

    def done(self) -> None:
        """Write down that the job ended well."""
        record = self.record
        record.status, record.exit_code, record.finished = "done", 0, now()
        record.write()

    def ended(self, status: str, exit_code: int, message: str | None) -> None:
        """Write down that the job ended, unless that was done."""
        record = self.record
        if record.finished is not None:
            return
        record.status, record.exit_code, record.error = status, exit_code, message
        record.finished = now()
        try:
            record.write()
        except CuvisDistError as error:
            logger.warning(f"{record.file} could not be written: {error}")


@contextmanager
def job(
    record: R, scaling: Scaling, verbose: bool = False, locked: OutputFolder | None = None
) -> Iterator[Job[R]]:
    """Enter a job; signals end it as Ctrl-C does, and however it ends, its record says so.

    Parameters
    ----------
    record : JobRecord
        The record of this job; its output folder must be one that can be written to.
    scaling : Scaling
        Its settings.
    verbose : bool
        Show Ray's logs.
    locked : OutputFolder, optional
        Where no other job may write meanwhile.

    Raises
    ------
    InputError
        If another job has the folder, or it cannot be written to.
    ClusterError
        If a store does not answer.
    KeyboardInterrupt
        If the job was stopped by SIGINT, SIGTERM or SIGHUP.
    """
    record.output.probe()
    with only_run(locked) if locked is not None else nullcontext():
        entered = Job(record, scaling, verbose)
        with last_words(entered.ended), _recorded(entered), terminable(), entered.around:
            yield entered


def _forget_frames() -> None:
    """Remove the decoded frames that nodes have kept for this job."""
    if caches := caches_in_use():
        clear_caches(caches)
        on_other_nodes(clear_caches, caches)


@contextmanager
def _recorded(entered: Job) -> Iterator[None]:
    """Write down how the job ended, if it did not end well."""
    try:
        yield
    except BaseException as error:
        if full := out_of_space(error):
            error = full
        if entered.record.finished is not None:  # it has its result: what failed is tidying up
            raise error
        # Ray and Lightning make a SystemExit of some signals.
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        entered.ended(
            "interrupted" if stopped else "failed",
            INTERRUPTED if stopped else getattr(error, "exit_code", 1),
            None if stopped else one_line(error),
        )
        if stopped:
            logger.warning("interrupted; the same command goes on from here")
            raise KeyboardInterrupt from error
        raise error
