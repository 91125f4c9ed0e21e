"""What is a function of shards given, and what does it give back?

A pass, an evaluation or scoring is a function that computes one shard and returns rows; an engine
runs it on all of them: in this process (:mod:`~cuvis_dist.execution.local`), or on Ray
(:mod:`~cuvis_dist.execution.engine`). What goes wrong with a shard is a row, too, and no exception:
an engine could only repeat the work or drop it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.archive import Archive, Patience, be_patient
from cuvis_dist.archive.patience import patience
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.execution.failures import causes
from cuvis_dist.execution.notices import notice
from cuvis_dist.execution.worker import fetch_once, fetch_pipeline, prepare_worker


class UnreadableError(DataError):
    """A file that this node cannot read; another one may have it."""


@dataclass(frozen=True)
class Row:
    """What came of a shard, or of a part of it.

    Attributes
    ----------
    ordinal : int
        Which shard it is.
    payload : object
        What the function computed: anything that can be pickled.
    frames, bytes : int
        Frames that were used, and the bytes of their tensors.
    skipped : tuple of (str, str)
        The uid of each frame that was left out, and the reason.
    error : CuvisDistError or None
        What went wrong; the row is then the only one of its shard.
    node, peak, again
        What the engine notes: the id of the node that computed the shard, the largest resident
        memory of its process in bytes, and whether the shard was computed once more after a
        worker was lost.
    """

    ordinal: int
    payload: Any = None
    frames: int = 0
    bytes: int = 0
    skipped: tuple[tuple[str, str], ...] = ()
    error: CuvisDistError | None = None
    node: str = ""
    peak: int = 0
    again: bool = False


class Piece(Protocol):
    """A shard as an engine sees it: a run of frames or batches, ``start`` to ``stop - 1``."""

    @property
    def ordinal(self) -> int:
        """Its place among all shards, from 0."""

    @property
    def start(self) -> int:
        """The first frame or batch."""

    @property
    def stop(self) -> int:
        """The one after the last."""

    @property
    def staged(self) -> str | None:
        """The URI that it is read from, if that has to be staged."""


@dataclass(frozen=True)
class Order:
    """What every function of shards is given; an engine makes it.

    Attributes
    ----------
    archive, pipeline : ObjectRef, Snapshot or object
        The archive and the pipeline as they are at the start, or references to them.
    threads : int
        How many threads a worker computes with.
    skip : bool
        Leave out frames that cannot be used.
    on_gpu : bool
        Compute on the worker's GPU.
    elsewhere : bool
        Whether another node can be asked for what this one cannot read.
    patience : Patience
        How long reading a frame may take; by default what the process has that makes the order.
    """

    archive: Any
    pipeline: Any
    threads: int
    skip: bool
    on_gpu: bool
    elsewhere: bool
    patience: Patience = field(default_factory=patience)

    def leave_out(self, error: DataError) -> None:
        """Return if a frame with this error may be left out.

        Raises
        ------
        UnreadableError
            If another node may be able to read it.
        DataError
            The error, if no frame may be left out.
        """
        # The file system said no: a path that is missing here may exist elsewhere.
        if self.elsewhere and any(isinstance(cause, OSError) for cause in causes(error)):
            raise UnreadableError(str(error)) from error
        if not self.skip:
            raise error

    def open(self) -> tuple[Archive, CuvisPipeline]:
        """Prepare this process and return archive and pipeline, the same ones for every shard."""
        prepare_worker(self.threads)
        be_patient(self.patience, notice)
        pipeline = fetch_pipeline(self.pipeline)
        if self.on_gpu:
            pipeline.to("cuda")
        return fetch_once(self.archive), pipeline


class ShardFunction(Protocol):
    """Computes one shard; it can be pickled, and gives the same rows when it is called again.

    Attributes
    ----------
    ordered : bool
        Whether the rows are wanted in the order of the shards.
    order : Order
        Pipeline, archive, and how to compute.
    """

    ordered: bool
    order: Order

    def __call__(self, shard: Any) -> Iterable[Row]:
        """Return the rows of a shard; raises CuvisDistError for what a person must hear about."""


class Engine(Protocol):
    """Runs functions of shards. Every engine gives the same rows."""

    def __enter__(self) -> Self:
        """Return the engine."""

    def __exit__(self, *exc_info: object) -> None:
        """Do as :meth:`close`."""

    def close(self) -> None:
        """End what only this engine uses."""

    def keep(self, value: Any) -> Any:
        """Return what functions of shards can fetch ``value`` by, as it is now."""

    def make_order(self, pipeline: CuvisPipeline, archive: Archive, skip: bool = False) -> Order:
        """Return an order for the pipeline as it is now."""

    def rows(self, shards: Sequence[Piece], function: Any) -> Generator[Row, None, None]:
        """Yield the rows of every shard, all of a shard's or the one with its error."""


def spread(
    shards: Sequence[Piece], function: ShardFunction, engine: Engine
) -> Generator[Row, None, None]:
    """Let an engine run ``function`` on every shard, and yield its rows as they come.

    Raises
    ------
    DataError
        If a frame cannot be used, on any node that was asked.
    CuvisDistError
        What else the function raised.
    """
    with closing(engine.rows(shards, function)) as rows:
        for row in rows:
            if row.error is not None:
                raise row.error
            yield row


def compute_shard(function: ShardFunction, shard: Piece) -> list[Row]:
    """Return the rows of a shard, all of them or the one that says what was raised."""
    try:
        return list(function(shard))
    except CuvisDistError as error:
        return [Row(shard.ordinal, error=error)]
    except Exception as error:  # such as a class that this node cannot import
        return [Row(shard.ordinal, error=CuvisDistError(f"a worker failed: {one_line(error)}"))]
