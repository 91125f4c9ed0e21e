"""Which processes of the cluster compute, and how many at a time? Ray tasks, or on GPUs actors."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cuvis_dist.execution.worker import places
from cuvis_dist.scaling import Scaling

#: How many seconds pass before the cluster is asked for its size again.
_ASK_AGAIN = 1.0


@dataclass(frozen=True)
class Workers:
    """What workers occupy, and how many there may be.

    Attributes
    ----------
    cpus, gpus : float
        What each of them occupies.
    most : int or None
        How many of them there are at most; None for as many as the cluster has room for, 0 for
        none: the driver's process does their work.
    failures : int
        How often Ray repeats work that lost its worker.
    """

    cpus: float
    gpus: float
    most: int | None
    failures: int

    @classmethod
    def measuring(cls, scaling: Scaling) -> Workers:
        """Return the workers that measure and score."""
        resources = scaling.resources
        return cls(
            resources.cpus_per_worker,
            scaling.measuring.gpus,
            resources.workers,
            resources.max_failures,
        )

    @classmethod
    def evaluating(cls, scaling: Scaling) -> Workers:
        """Return the workers that evaluate; on GPUs these are as many as train."""
        resources = scaling.resources
        most = resources.train_workers if resources.train_gpus else resources.workers
        return cls(resources.cpus_per_worker, resources.train_gpus, most, resources.max_failures)

    @classmethod
    def none(cls, scaling: Scaling) -> Workers:
        """Return that the driver's process does the work, with as many CPUs as a worker has."""
        return cls(scaling.resources.cpus_per_worker, 0, 0, 0)

    @property
    def here(self) -> bool:
        """Whether the driver's process does their work."""
        return self.most == 0

    def nodes(self) -> list[str]:
        """Return the ids of the nodes that can run such a worker."""
        need = {"CPU": self.cpus, "GPU": self.gpus}
        return [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and all(node["Resources"].get(k, 0) >= v for k, v in need.items())
        ]


class Pool:
    """Starts calls of a function on workers; Ray repeats a call that lost its worker.

    Ray ends the process of a task that had a GPU, since the next one might be given another, and a
    new process would need ten seconds to import what it runs. An actor keeps both.

    Parameters
    ----------
    function : callable
        What the workers call.
    workers : Workers
        Which workers there are.
    """

    def __init__(self, function: Callable[..., Any], workers: Workers) -> None:
        self.workers = workers
        options: dict[str, Any] = {"num_cpus": workers.cpus, "scheduling_strategy": "SPREAD"}
        failures = workers.failures
        self._task: Any = ray.remote(max_retries=failures, **options)(function)
        options |= {"num_gpus": workers.gpus, "max_restarts": failures}
        self._actor: Any = ray.remote(max_task_retries=failures, **options)(_Caller)
        self._function = function
        self._idle: deque[Any] = deque()
        self._busy: dict[ray.ObjectRef, Any] = {}
        self._places, self._asked = 0, -math.inf

    @property
    def places(self) -> int:
        """How many workers can compute at the same time, in the cluster as it is now."""
        if self.workers.most is not None and not self.workers.gpus:
            return self.workers.most
        if time.monotonic() >= self._asked + _ASK_AGAIN:
            if self.workers.gpus:
                room = places(self.workers.gpus)
            else:
                room = int(ray.cluster_resources().get("CPU", 1) / self.workers.cpus)
            self._places, self._asked = (
                max(1, min(room, self.workers.most or room)),
                time.monotonic(),
            )
        return self._places

    @property
    def room(self) -> int:
        """How many calls may be under way; without a limit, so many that no worker waits."""
        return self.places if self.workers.gpus or self.workers.most else 2 * self.places

    def start(self, *args: Any, on: str | None = None) -> ray.ObjectRef:
        """Start a call; there must be :attr:`room` for it.

        ``on`` is the node that is to compute it, as long as there is that node; actors are where
        they are.
        """
        if not self.workers.gpus:
            there = NodeAffinitySchedulingStrategy(on, soft=True) if on else "SPREAD"
            return self._task.options(scheduling_strategy=there).remote(*args)
        actor = self._idle.popleft() if self._idle else self._actor.remote(self._function)
        ref = actor.call.remote(*args)
        self._busy[ref] = actor
        return ref

    def release(self, ref: ray.ObjectRef) -> None:
        """Note that a call has ended, or is no longer wanted."""
        if ref in self._busy:
            self._idle.append(self._busy.pop(ref))

    def abandon(self, refs: Collection[ray.ObjectRef]) -> None:
        """Note that nobody waits for these calls any more; they run to their end.

        ``ray.cancel`` is no help: called when a task is about to end, it interrupts the next one in
        the same process, or ends this process (``Tried to complete task that was not pending``;
        both seen with Ray 2.60).
        """
        for ref in refs:
            self.release(ref)

    def close(self) -> None:
        """End the actors."""
        for actor in [*self._idle, *self._busy.values()]:
            ray.kill(actor)
        self._idle.clear()
        self._busy.clear()


class _Caller:
    """An actor that calls a function, once at a time."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def call(self, *args: Any) -> Any:
        return self._function(*args)
