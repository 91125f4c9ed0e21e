"""Which Ray cluster does a run use, and how does work reach one of its processes?

Joins or starts the cluster, prepares a worker process, runs one function on a worker with its
events coming back as they happen, and brings a node's fitted state home.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import ray
import ray.data
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import EmitFn, TrainEvent
from loguru import logger
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)

from cuvis_dist.errors import ClusterError, CuvisDistError, InputError, one_line
from cuvis_dist.scaling import Scaling

T = TypeVar("T")


# ---- the cluster -----------------------------------------------------------------------


def connect(scaling: Scaling, verbose: bool = False) -> bool:
    """Join or start the cluster; True when this call did, False when one was there already.

    Without an address the cluster that ``RAY_ADDRESS`` names is joined (``ray job submit``
    sets it), else Ray starts in this process with as many CPUs as the machine or the workers
    need, whichever is more.

    Raises
    ------
    ClusterError
        If the cluster cannot be reached.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not verbose:
        for name in ("ray.data", "ray.train"):
            logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": "info" if verbose else "error",
    }
    address = scaling.address or os.environ.get("RAY_ADDRESS")
    if address:
        options["address"] = address
    else:
        options |= {
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, cpus_wanted(scaling)),
        }
    try:
        ray.init(**options)
    except Exception as error:
        raise ClusterError(
            f"cannot join the Ray cluster at {address or 'this machine'}: {one_line(error)}. "
            "Check the address and, for a cluster with token authentication, RAY_AUTH_MODE and "
            "RAY_AUTH_TOKEN_PATH"
        ) from error
    return True


def cpus_wanted(scaling: Scaling) -> int:
    """CPUs that a cluster started here must offer: the wider of the two phases."""
    wanted = max(scaling.workers or 1, scaling.train_workers) * scaling.cpus_per_worker
    return int(-(-wanted // 1))


def require_resources(scaling: Scaling) -> None:
    """Refuse what the cluster can never offer, instead of waiting for it without end.

    Raises
    ------
    ClusterError
        If the training workers need more CPUs or GPUs than the cluster has. An autoscaling
        cluster may grow and is not refused.
    """
    if any(key.startswith("autoscaler") for key in ray.cluster_resources()):
        return
    have = ray.cluster_resources()
    need = {
        "CPU": scaling.train_workers * scaling.cpus_per_worker,
        "GPU": scaling.train_workers * scaling.gpus_per_worker,
    }
    for name, amount in need.items():
        if amount > have.get(name, 0):
            raise ClusterError(
                f"{scaling.train_workers} training workers need {amount:g} {name}s, the cluster "
                f"has {have.get(name, 0):g}. Ask for fewer (--train-workers, --gpus-per-worker) "
                "or join a larger cluster (--address)"
            )


# ---- a worker process ------------------------------------------------------------------


def prepare_worker(threads: int) -> None:
    """Pin the threads of this process; Ray's OMP_NUM_THREADS comes too late for a reused one."""
    torch.set_num_threads(max(1, threads))


@functools.lru_cache(maxsize=4)
def fetch_once(ref: ray.ObjectRef) -> Any:
    """Return the object, the same one for every task of this process.

    Keeps what an archive holds open (``.cu3s`` sessions) from one shard to the next.
    """
    return ray.get(ref)


# ---- one function on a worker ----------------------------------------------------------


@ray.remote(num_cpus=0)
class _Mailbox:
    """Carries events from workers to the driver in the order each worker sent them."""

    def __init__(self) -> None:
        import asyncio

        self._events: asyncio.Queue[TrainEvent | None] = asyncio.Queue()

    async def put(self, event: TrainEvent | None) -> None:
        await self._events.put(event)

    async def take(self) -> list[TrainEvent | None]:
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        return events


class RemoteEmit:
    """An ``emit`` that a worker can call."""

    def __init__(self, mailbox: Any) -> None:
        self._mailbox = mailbox

    def __call__(self, event: TrainEvent) -> None:
        """Send one event; returns when the mailbox has it."""
        ray.get(self._mailbox.put.remote(event))


@contextmanager
def relayed(emit: EmitFn) -> Iterator[RemoteEmit]:
    """Give workers an ``emit`` whose events reach the driver's as they happen."""
    mailbox = _Mailbox.remote()  # type: ignore[attr-defined]

    def deliver() -> None:
        while True:
            for event in ray.get(mailbox.take.remote()):
                if event is None:
                    return
                try:
                    emit(event)
                except Exception as error:  # a sink that fails must not stop the run
                    logger.warning(f"an event could not be delivered: {one_line(error)}")

    thread = threading.Thread(target=deliver, name="cuvis-dist-events", daemon=True)
    thread.start()
    try:
        yield RemoteEmit(mailbox)
    finally:
        ray.get(mailbox.put.remote(None))
        thread.join()
        ray.kill(mailbox)


def on_worker(
    function: Callable[..., T],
    *args: Any,
    emit: EmitFn,
    scaling: Scaling,
    gpus: float = 0,
) -> T:
    """Run ``function(*args, emit=...)`` on one worker of the cluster and return its result.

    Raises
    ------
    CuvisDistError
        What the function raised, when it was one; else as :func:`raise_cause` says.
    """
    remote = ray.remote(num_cpus=scaling.cpus_per_worker, num_gpus=gpus, max_retries=0)(
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
    return function(*args, emit=emit)


@contextmanager
def raise_cause(what: str) -> Iterator[None]:
    """Turn Ray's wrapped errors into the error of ours inside, or into a message.

    Raises
    ------
    CuvisDistError
        The first of its kind in the chain of causes.
    ClusterError
        If a worker, node or its memory was lost.
    """
    try:
        yield
    except CuvisDistError:
        raise
    except Exception as error:
        for cause in causes(error):
            if isinstance(cause, CuvisDistError):
                raise cause from None
        lost = (WorkerCrashedError, ActorDiedError, NodeDiedError, OutOfMemoryError)
        for cause in causes(error):
            if isinstance(cause, lost):
                raise ClusterError(
                    f"{what} lost its worker: {one_line(cause)}. A worker that ran out of "
                    "memory needs more of it, or fewer workers per machine"
                ) from error
        root = list(causes(error))[-1]
        if isinstance(root, (InputError, OSError, ValueError, RuntimeError, TypeError, KeyError)):
            raise CuvisDistError(f"{what} failed: {one_line(root)}") from error
        raise


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error, then what caused it, through Ray's wrappers, each once."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        inner = error.cause if isinstance(error, RayTaskError) else None
        failures = getattr(error, "worker_failures", None)
        if failures:
            inner = failures[min(failures)]
        error = inner or error.__cause__ or error.__context__


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
    by_name = {node.name: node for node in fitted}
    for node in pipeline.nodes():
        adopt(node, by_name[node.name])
