"""How does work reach a worker process, and how do its result, state and errors come back?"""

from __future__ import annotations

import ctypes
import functools
import os
import resource
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import pytorch_lightning as pl
import ray
import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import EmitFn
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cuvis_dist.execution.copies import Snapshot
from cuvis_dist.execution.events import relayed
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.nodes.sinks import close_sinks
from cuvis_dist.staging import portable

T = TypeVar("T")

#: Seconds that other nodes have at the end of a job to remove what they have kept for it.
_TIDY_SECONDS = 20.0


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
        m_trim_threshold, m_mmap_max, m_arena_max = -1, -4, -8  # malloc.h
        mallopt(m_arena_max, 1)  # the thread that reads frames would have memory of its own
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


def fetch_once(ref: Any) -> Any:
    """Return what a reference stands for, the same object for every task of this process.

    Keeps what an archive holds open (``.cu3s`` sessions) from one shard to the next. What is no
    reference stands for itself.
    """
    return _fetched(ref) if _is_reference(ref) else ref


def fetch_pipeline(ref: Any) -> Any:
    """:func:`fetch_once` for a pipeline, until :func:`forget_pipeline`."""
    return _fetched_pipeline(ref) if _is_reference(ref) else ref


def forget_pipeline() -> None:
    """Let the next task of this process start from the pipeline as it was put."""
    _fetched_pipeline.cache_clear()


def forget_all() -> None:
    """Let go of everything that was fetched in this process."""
    _fetched.cache_clear()
    forget_pipeline()


@functools.lru_cache(maxsize=4)
def _fetched(ref: Any) -> Any:
    return ref.take() if isinstance(ref, Snapshot) else ray.get(ref)


@functools.lru_cache(maxsize=1)
def _fetched_pipeline(ref: Any) -> Any:
    return ref.take() if isinstance(ref, Snapshot) else ray.get(ref)


def _is_reference(value: Any) -> bool:
    return isinstance(value, Snapshot | ray.ObjectRef)


def places(gpus: float) -> int:
    """Return how many processes with ``gpus`` GPUs each the cluster has room for; at least 1."""
    return max(1, int(ray.cluster_resources().get("GPU", 0) / gpus))


def on_worker(
    function: Callable[..., T],
    *args: Any,
    emit: EmitFn,
    cpus: float,
    gpus: float = 0,
    retries: int = 0,
) -> T:
    """Run ``function(*args, emit=...)`` on one worker of the cluster and return its result.

    Parameters
    ----------
    cpus, gpus : float
        What the worker occupies of its node; no CPU where it mostly waits for other workers.
    retries : int
        How often Ray may call it again, elsewhere, when its worker is lost.

    Raises
    ------
    CuvisDistError
        What the function raised, when it was one; else as :func:`raise_cause` says.
    """
    remote: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=retries)(call_function)
    with relayed(emit) as worker_emit, raise_cause(in_words(function)):
        threads, args = max(1, int(cpus)), travelling(args)
        return ray.get(remote.remote(function, args, worker_emit, threads, os.getcwd()))


def on_other_nodes(function: Callable[..., Any], *args: Any) -> None:
    """Run ``function(*args)`` once on each node but this one, as far as they answer in time."""
    if not ray.is_initialized():
        return
    here = ray.get_runtime_context().get_node_id()
    others = [n["NodeID"] for n in ray.nodes() if n["Alive"] and n["NodeID"] != here]
    with suppress(ray.exceptions.RayError):
        refs = []
        for node in others:
            options: dict[str, Any] = {
                "num_cpus": 0,
                "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
            }
            remote: Any = ray.remote(**options)(function)
            refs.append(remote.remote(*args))
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=_TIDY_SECONDS)


def travelling(args: tuple) -> tuple:
    """Return arguments whose data modules find their files wherever they arrive."""
    return tuple(portable(a) if isinstance(a, pl.LightningDataModule) else a for a in args)


def in_words(function: Callable[..., Any]) -> str:
    """Return what a function does, for messages."""
    return function.__name__.replace("_", " ").strip()


def call_function(
    function: Callable[..., T], args: tuple, emit: EmitFn, threads: int, directory: str
) -> T:
    """Run ``function(*args, emit=emit)`` in this process; the arguments are its own.

    Parameters
    ----------
    threads : int
        How many threads compute.
    directory : str
        The driver's working directory, against which relative paths are meant.
    """
    prepare_worker(threads)
    if os.path.isdir(directory):
        os.chdir(directory)
    try:
        return function(*args, emit=emit)
    finally:
        for argument in args:  # what comes back may be its nodes
            if isinstance(argument, CuvisPipeline):
                close_sinks(argument)
