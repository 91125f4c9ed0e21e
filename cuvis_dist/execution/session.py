"""Which Ray cluster does a run use? Joins one, or starts one on this machine."""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from typing import Any

import ray
from loguru import logger
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cuvis_dist.errors import ClusterError, one_line
from cuvis_dist.execution.notices import listen
from cuvis_dist.execution.privacy import (
    forget_token,
    private_cluster,
    warn_of_readable_token,
)
from cuvis_dist.scaling import Scaling
from cuvis_dist.waiting import announce

#: So many CPUs are offered for each that this machine has.
_PER_CPU = 8


def connect(scaling: Scaling, verbose: bool = False) -> bool:
    """Join or start the cluster; True when this call did, False when one was there already.

    Without an address the cluster that ``RAY_ADDRESS`` names is joined (``ray job submit``
    sets it), else Ray starts in this process with as many CPUs as the machine or the workers
    need, whichever is more.

    Raises
    ------
    ClusterError
        If the cluster cannot be reached, or more workers are asked for than start on this machine.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not verbose:
        logging.getLogger("ray.train").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray Train looks every two seconds by default whether its workers have ended.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
    options: dict[str, Any] = {
        "log_to_driver": verbose,
        "logging_level": "info" if verbose else "error",
    }
    address = scaling.resources.address or os.environ.get("RAY_ADDRESS")
    if address:
        options["address"] = address
    else:
        # Nobody announces that he takes this machine away: no process need wait for that.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        options |= {
            "address": "local",  # else Ray joins the last one that was started on this machine
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, cpus_here(scaling)),
        }
    announce(f"joining the Ray cluster at {address}" if address else "starting Ray here")
    if address:
        require_answer(address)
    try:
        if address:
            forget_token()
            ray.init(**options)
            warn_of_readable_token()
        else:
            with private_cluster() as alone:
                ray.init(**options, **alone)
    except Exception as error:
        raise ClusterError(
            f"cannot join the Ray cluster at {address or 'this machine'}: {one_line(error)}. "
            "Check the address and, for a cluster with token authentication, RAY_AUTH_MODE and "
            "RAY_AUTH_TOKEN_PATH"
        ) from error
    listen()
    return True


def require_answer(address: str, seconds: float = 30.0) -> None:
    """Find out whether anything listens at a cluster's address; Ray itself asks for minutes.

    Parameters
    ----------
    address : str
        ``host:port`` or ``ray://host:port``; others, such as ``auto``, are left to Ray.
    seconds : float
        How long to wait for a cluster that is about to start.

    Raises
    ------
    ClusterError
        If nothing does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or "://" in host or not port.isdigit() or not 0 < int(port) < 2**16:
        return
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
            return
        except OSError as error:
            if time.monotonic() + 1 > end:
                raise ClusterError(
                    f"nothing answers at {address}: {one_line(error)}. Check the address "
                    "(--address, RAY_ADDRESS), and whether the cluster runs and can be reached"
                ) from error
        time.sleep(1)


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Return where an actor of the driver runs: on its node, so that no other can take it along."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def cpus_wanted(scaling: Scaling) -> int:
    """CPUs that a cluster started here must offer: the wider of the two phases."""
    workers = (scaling.resources.workers or 1) * scaling.resources.cpus_per_worker
    return math.ceil(max(workers, _cpus_of_ranks(scaling, scaling.resources.train_workers)))


def _cpus_of_ranks(scaling: Scaling, ranks: int) -> float:
    return ranks * scaling.resources.cpus_per_worker + bool(scaling.reading.read_ahead)


def has_room_for_both(scaling: Scaling) -> bool:
    """Whether training workers can start beside those of phase 1 and leave them their room.

    So not where there may be fewer training workers than asked for, and phase 1 takes all there
    is if nobody has said how many workers it has.
    """
    resources = scaling.resources
    if not resources.workers or not resources.train_workers or resources.min_train_workers:
        return False
    have, ranks = ray.cluster_resources(), resources.train_workers
    cpus = resources.workers * resources.cpus_per_worker + _cpus_of_ranks(scaling, ranks)
    gpus = resources.workers * scaling.measuring.gpus + ranks * resources.train_gpus
    return cpus <= have.get("CPU", 0) and gpus <= have.get("GPU", 0)


def cpus_here(scaling: Scaling) -> int:
    """Return the CPUs that a cluster on this machine is to have for the workers.

    They may be more than there are, since workers also wait for frames.

    Raises
    ------
    ClusterError
        If they are far more: Ray starts a process for each.
    """
    cpus, resources = os.cpu_count() or 1, scaling.resources
    most, wanted = _PER_CPU * cpus, cpus_wanted(scaling)
    if max(wanted, resources.workers or 0, resources.train_workers) > most:
        raise ClusterError(
            f"{resources.workers or 1} workers and {resources.train_workers} training workers with "
            f"{resources.cpus_per_worker:g} CPUs each are too many for this machine: it has {cpus} "
            f"CPUs, and at most {most} are offered. Ask for fewer (--workers, --train-workers, "
            "resources.cpus_per_worker), or join a cluster (--address)"
        )
    return wanted


def require_resources(scaling: Scaling, training: bool = True) -> None:
    """Say when workers need more than the cluster has, before waiting for it.

    Parameters
    ----------
    training : bool
        Ask for all training workers, which start together; else for one worker of phase 1, since
        shards wait for each other.

    Raises
    ------
    ClusterError
        If the cluster was started here, and so will not grow. One that was joined may, so there
        it is a warning.
    """
    have = ray.cluster_resources()
    if training:
        workers = scaling.resources.least_train_workers
        who = f"{workers} training workers"
        need = {
            "CPU": _cpus_of_ranks(scaling, workers),
            "GPU": workers * scaling.resources.train_gpus,
        }
        fewer = "--train-workers, --train-gpus"
    else:
        who = "workers of phase 1"
        need = {"CPU": scaling.resources.cpus_per_worker, "GPU": scaling.measuring.gpus}
        fewer = "resources.cpus_per_worker, measuring.gpus"
    for name, amount in need.items():
        if amount <= have.get(name, 0):
            continue
        message = f"{who} need {amount:g} {name}s, the cluster has {have.get(name, 0):g}"
        if scaling.resources.address or os.environ.get("RAY_ADDRESS"):
            logger.warning(f"{message}: the work waits until there are as many")
        else:
            raise ClusterError(
                f"{message}. Ask for fewer ({fewer}) or join a larger cluster (--address)"
            )
