"""How do the driver and its workers import what they compute with at the same time?

cuvis.ai takes each process seconds to import. The driver imports it in a thread while Ray starts,
and the workers begin as soon as Ray is there, before there is any work for them.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from importlib import import_module
from typing import Any

import ray

from cuvis_dist.execution.asked import why_workers
from cuvis_dist.execution.session import connect, terminable
from cuvis_dist.scaling import Scaling

#: What a shard needs on a worker, and what the driver needs to read a trainrun.
_ON_WORKERS = ("cuvis_dist.initialization.shards", "cuvis_dist.evaluation.parts")
_IN_DRIVER = ("cuvis_dist.runs.two_phase",)

_begun: list[ray.ObjectRef] = []


def import_everywhere(scaling: Scaling, verbose: bool = False) -> None:
    """Begin to import in this process and, if the settings ask for them, in the workers.

    Joins or starts the Ray cluster for the latter; without one it does nothing.

    Raises
    ------
    ClusterError
        If the cluster cannot be reached.
    """
    if why_workers(scaling) is None:
        return
    threading.Thread(target=_import, args=(_IN_DRIVER,), daemon=True).start()
    with terminable():  # Ray sets a handler of its own
        connect(scaling, verbose)
    options: dict[str, Any] = {
        "num_cpus": scaling.resources.cpus_per_worker,
        "scheduling_strategy": "SPREAD",
    }
    task: Any = ray.remote(**options)(_import)
    _begun.extend(task.remote(_ON_WORKERS) for _ in range(scaling.resources.workers or 0))


def await_imports() -> None:
    """Return when the workers that were told to import have done so.

    Work that came earlier would go to processes that have not begun.
    """
    if _begun:
        ray.wait(_begun, num_returns=len(_begun))
        _begun.clear()


def _import(modules: tuple[str, ...]) -> None:
    """Import modules; whoever needs one that cannot be imported says so."""
    with suppress(Exception):
        for module in modules:
            import_module(module)
