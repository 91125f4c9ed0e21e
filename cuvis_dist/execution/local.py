"""How does work run in the driver's process? As on a worker, one piece after another.

What it computes with is a copy, so that the pipeline and the data module of the driver stay as
they are, and so do its random state and its number of threads.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import EmitFn
from loguru import logger
from threadpoolctl import ThreadpoolController

from cuvis_dist.archive import Archive
from cuvis_dist.execution.copies import Snapshot, copied
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.spread import Order, Piece, Row, ShardFunction, compute_shard
from cuvis_dist.execution.worker import (
    call_function,
    forget_all,
    in_words,
    peak_bytes,
    prepare_worker,
    travelling,
)
from cuvis_dist.nodes.probing import random_states, set_random_states

T = TypeVar("T")


class LocalEngine:
    """Runs functions of shards in this process: the same rows as on a cluster.

    Parameters
    ----------
    cpus : float
        What a worker would occupy: so many threads compute.
    """

    def __init__(self, cpus: float) -> None:
        self.threads = math.floor(cpus)

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the copies that were computed with, and of the files that they hold open."""
        forget_all()

    def keep(self, value: Any) -> Any:
        """Return what functions of shards can fetch ``value`` by, as it is now."""
        return Snapshot(value)

    def make_order(self, pipeline: CuvisPipeline, archive: Archive, skip: bool = False) -> Order:
        """Keep the pipeline as it is now, and the archive."""
        return Order(
            self.keep(archive),
            self.keep(pipeline),
            threads=self.threads,
            skip=skip,
            on_gpu=False,
            elsewhere=False,
        )

    def rows(self, shards: Sequence[Piece], function: ShardFunction) -> Generator[Row, None, None]:
        """Yield the rows of every shard, in the order of the shards."""
        own, states = copy.deepcopy(function), random_states()
        for shard in shards:
            with as_worker(self.threads):
                set_random_states(states)
                rows = compute_shard(own, shard)
                states = random_states()
            for row in rows:
                row = replace(row, peak=peak_bytes())
                # The next shard may be computed with the nodes that this row has.
                yield row if row.error else copy.deepcopy(row)


def call_here(function: Callable[..., T], *args: Any, emit: EmitFn, threads: int) -> T:
    """Run ``function(*args, emit=...)`` on copies of its arguments and return its result.

    Raises
    ------
    CuvisDistError
        As :func:`~cuvis_dist.execution.worker.on_worker`.
    """
    with raise_cause(in_words(function)), as_worker(threads):
        own = copied(travelling(args))
        return call_function(function, own, delivering(emit), threads, os.getcwd())


@contextmanager
def as_worker(threads: int) -> Iterator[None]:
    """Compute in the block as a worker does; afterwards this process is as it was.

    The block has as many threads as a worker, of torch and of NumPy's libraries, and random
    generators that it may use.
    """
    before, states = torch.get_num_threads(), random_states()
    with (
        _libraries(len(sys.modules)).limit(limits=max(1, threads)),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        prepare_worker(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)
            set_random_states(states)


@functools.lru_cache(maxsize=1)
def _libraries(modules: int) -> ThreadpoolController:
    """Find the libraries that have threads, which takes milliseconds: again if modules came."""
    return ThreadpoolController()


def delivering(emit: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return an ``emit`` that does not raise: a sink that fails must not stop the run."""

    def deliver(event: Any) -> None:
        try:
            emit(event)
        except Exception as error:
            logger.warning(f"an event could not be delivered: {error}")

    return deliver
