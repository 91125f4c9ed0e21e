"""How does work reach a worker process, and how do its result, state and errors come back?"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytorch_lightning as pl
import ray
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.evaluation import TrainingCancelled
from cuvis_ai_core.training.post_fit import EmitFn
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfDiskError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from cuvis_dist.errors import ClusterError, CuvisDistError, LostWorkerError, one_line
from cuvis_dist.events import relayed
from cuvis_dist.scaling import Scaling
from cuvis_dist.sinks import close_sinks
from cuvis_dist.staging import portable
from cuvis_dist.storage import is_out_of_space

T = TypeVar("T")


def prepare_worker(threads: int) -> None:
    """Pin the threads of this process, and let it keep the memory that it frees.

    Ray's OMP_NUM_THREADS comes too late for a process that is used again. And glibc hands each
    freed cube back to the kernel, whose first touch of the pages of the next one costs as much
    as measuring them (a chain of nodes ran 2.3 times as fast without).
    """
    torch.set_num_threads(max(1, threads))
    _keep_freed_memory()


@functools.cache
def _keep_freed_memory() -> None:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def attempts_before() -> int:
    """Return how often Ray has started the task that runs now before, after losing it.

    Private: Ray's public context of a task does not have it.
    """
    worker: Any = ray._private.worker.global_worker
    return worker.core_worker.get_current_task_attempt_number()


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@functools.lru_cache(maxsize=4)
def fetch_once(ref: ray.ObjectRef) -> Any:
    """Return the object, the same one for every task of this process.

    Keeps what an archive holds open (``.cu3s`` sessions) from one shard to the next.
    """
    return ray.get(ref)


def places(gpus: float) -> int:
    """Return how many processes with ``gpus`` GPUs each the cluster has room for; at least 1."""
    return max(1, int(ray.cluster_resources().get("GPU", 0) / gpus))


def on_worker(
    function: Callable[..., T],
    *args: Any,
    emit: EmitFn,
    scaling: Scaling,
    gpus: float = 0,
    retries: int = 0,
) -> T:
    """Run ``function(*args, emit=...)`` on one worker of the cluster and return its result.

    Parameters
    ----------
    retries : int
        How often Ray may call it again, elsewhere, when its worker is lost.

    Raises
    ------
    CuvisDistError
        What the function raised, when it was one; else as :func:`raise_cause` says.
    """
    args = tuple(portable(a) if isinstance(a, pl.LightningDataModule) else a for a in args)
    remote: Any = ray.remote(num_cpus=scaling.cpus_per_worker, num_gpus=gpus, max_retries=retries)(
        _call_on_worker
    )
    with relayed(emit) as worker_emit, raise_cause(function.__name__.replace("_", " ").strip()):
        threads = int(scaling.cpus_per_worker)
        return ray.get(remote.remote(function, args, worker_emit, threads, os.getcwd()))


def _call_on_worker(
    function: Callable[..., T], args: tuple, emit: EmitFn, threads: int, directory: str
) -> T:
    prepare_worker(threads)
    if os.path.isdir(directory):
        os.chdir(directory)
    try:
        return function(*args, emit=emit)
    finally:
        for argument in args:  # what comes back may be its nodes
            if isinstance(argument, CuvisPipeline):
                close_sinks(argument)


@contextmanager
def raise_cause(what: str) -> Iterator[None]:
    """Turn Ray's wrapped errors into the error of ours inside, or into a message.

    Raises
    ------
    CuvisDistError
        The first of its kind in the chain of causes, else one that gives the root cause.
    LostWorkerError
        If a worker, node or its memory was lost.
    """
    try:
        yield
    except (CuvisDistError, TrainingCancelled):
        raise
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, CuvisDistError):
                raise cause from None
        if full := out_of_space(error):
            raise full from error
        everything = list(causes(error))
        # The others of a group may be the first to notice, by a broken connection.
        lost: list[BaseException] = [c for c in everything if isinstance(c, _LOST)] or [
            cause for cause in everything if _BROKEN_CONNECTION.search(str(cause))
        ]
        if lost:
            raise LostWorkerError(
                f"{what} lost {_which(error)}: {one_line(lost[0])}. A worker that ran out of "
                "memory needs more of it, or fewer workers per machine"
            ) from error
        raise CuvisDistError(f"{what} failed: {one_line(everything[-1])}") from error


def out_of_space(error: BaseException) -> ClusterError | None:
    """Return an error that says that a disk is full, if that is what ``error`` came from."""
    if isinstance(error, CuvisDistError):
        return None
    for cause in causes(error):
        if is_out_of_space(cause) or isinstance(cause, OutOfDiskError):
            return ClusterError(
                f"a disk is full, of the output folder or a node's temporary one: "
                f"{one_line(cause)}. Make room; the same command then goes on"
            )
    return None


_LOST = (WorkerCrashedError, ActorDiedError, NodeDiedError, OutOfMemoryError)
_BROKEN_CONNECTION = re.compile(
    r"Connection (closed by|reset by) peer|gloo/transport/.*(Broken pipe|Connection refused)"
    r"|NCCL.*(remote process exited|remote error)",
    re.DOTALL,
)


def _which(error: BaseException) -> str:
    """Name the rank of a training worker that died, where it is known."""
    for cause in causes(error):
        failures = getattr(cause, "worker_failures", None) or {}
        ranks = [
            r for r in sorted(failures) if any(isinstance(c, _LOST) for c in causes(failures[r]))
        ]
        if ranks:
            return f"worker {', '.join(map(str, ranks))}"
    return "a worker"


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then what caused it, through Ray's wrappers, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        failures = getattr(error, "worker_failures", None) or {}
        for rank in sorted(failures):
            yield from causes(failures[rank])
        inner = error.cause if isinstance(error, RayTaskError) else None
        error = inner or error.__cause__ or error.__context__


def state_mark(node: Node) -> tuple:
    """Return a mark that changes when one of the node's tensors does, in this process."""
    return tuple((id(t), t._version) for t in (*node.buffers(), *node.parameters()))


# ---- fitted state ----------------------------------------------------------------------

#: What stays a node's own when it takes over another's state: its place in the pipeline.
_IDENTITY = frozenset({"_name", "_pipeline_counter", "_input_ports", "_output_ports"})


def adopt(node: Node, fitted: Node) -> None:
    """Give ``node`` the state of ``fitted``, a copy of it that was changed elsewhere.

    Buffers, parameters, hyperparameters and plain attributes (fitted flags, temperatures,
    calibrated thresholds): many of these are in no state dict.
    """
    node.__dict__.update({k: v for k, v in fitted.__dict__.items() if k not in _IDENTITY})


def adopt_all(pipeline: CuvisPipeline, fitted: list[Node]) -> None:
    """:func:`adopt` for the nodes of a pipeline that came back from a worker."""
    by_name = {node.name: node for node in pipeline.nodes()}
    for node in fitted:
        adopt(by_name[node.name], node)
