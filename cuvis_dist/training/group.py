"""How does a group of ranks start on a Ray cluster, and what ends it?"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from cuvis_ai_core.training.post_fit import EmitFn
from loguru import logger
from ray import cloudpickle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from cuvis_dist.errors import ClusterError, CuvisDistError
from cuvis_dist.execution.events import relayed
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.session import beside_driver, connect, require_resources
from cuvis_dist.scaling import Scaling
from cuvis_dist.storage import OutputFolder, temporary_folder
from cuvis_dist.training.assignment import Assignment, Driver, Outcome
from cuvis_dist.training.entry import begin_rank
from cuvis_dist.training.watch import Beat, Watch
from cuvis_dist.waiting import announce


def train_on_workers(assignment: Assignment, what: str, emit: EmitFn) -> Outcome:
    """Let a group of workers carry out an assignment; return what rank 0 brings back.

    Parameters
    ----------
    assignment : Assignment
        What each of them is to do.
    what : str
        The same in words, for messages.
    emit : callable
        Where the events of rank 0 go.

    Raises
    ------
    ClusterError
        If the cluster cannot offer what they need, or a rank was stuck.
    CuvisDistError
        As :func:`~cuvis_dist.execution.failures.raise_cause` says.
    """
    connect(assignment.scaling)
    require_resources(assignment.scaling)
    announce(f"waiting for {workers_in_words(assignment.scaling)} to begin {what}")
    with (
        folder_for_ray(assignment.output) as storage,
        relayed(emit) as remote_emit,
        watched(what, assignment.scaling.resources.stall_seconds) as watch,
        raise_cause(what),
    ):
        driver = Driver(remote_emit, _RemoteWatch(watch), os.getcwd())
        outcome = _run_group(assignment, driver, storage)
    if outcome is None:
        raise ClusterError(f"the workers ended {assignment.verb} without a result")
    return outcome


def _run_group(assignment: Assignment, driver: Driver, storage: Path) -> Outcome | None:
    gpus = assignment.scaling.resources.train_gpus
    result: Any = TorchTrainer(
        begin_rank,  # type: ignore[arg-type]
        train_loop_config={"assignment": ray.put(assignment), "driver": ray.put(driver)},
        # nccl refuses two processes on one GPU
        torch_config=TorchConfig("nccl" if gpus >= 1 else "gloo"),
        scaling_config=_scaling_config(assignment.scaling),
        run_config=RunConfig(
            storage_path=str(storage),
            # Ray Train would try again after an error of any kind: see GradientTrainer._fit.
            failure_config=FailureConfig(max_failures=0),
        ),
    ).fit()
    return cloudpickle.loads(result.return_value)


class _RemoteWatch:
    """The watch of a group of ranks, which is an actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def begin(self, group: str, world_size: int) -> None:
        ray.get(self._actor.begin.remote(group, world_size))

    def beat(self, beat: Beat) -> str | None:
        return ray.get(self._actor.beat.remote(beat))

    def end(self) -> None:
        os._exit(1)


def _scaling_config(scaling: Scaling) -> ScalingConfig:
    """Return how many workers Ray Train starts, and what each of them has."""
    resources: dict[str, Any] = {"CPU": scaling.resources.cpus_per_worker}
    if scaling.resources.train_gpus:
        resources["GPU"] = scaling.resources.train_gpus
    least, most = scaling.resources.least_train_workers, scaling.resources.train_workers
    workers: Any = most if least == most else (least, most)
    return ScalingConfig(
        num_workers=workers,
        use_gpu=scaling.resources.train_gpus > 0,
        resources_per_worker=resources,
    )


def workers_in_words(scaling: Scaling) -> str:
    """Return how many training workers there will be, such as ``1 to 3 training workers``."""
    least, most = scaling.resources.least_train_workers, scaling.resources.train_workers
    number = f"{most}" if least == most else f"{least} to {most}"
    return f"{number} training worker{'s' if most > 1 else ''}"


@contextmanager
def folder_for_ray(output: OutputFolder) -> Iterator[Path]:
    """Have a folder for Ray Train as long as the block lasts.

    Checkpoints are Lightning's: nothing is reported to Ray Train, so that it does not ask for
    a folder which all nodes see.
    """
    if output.local is not None:
        folder = output.local / "ray_train"
    else:
        folder = Path(tempfile.mkdtemp(prefix="ray-train-", dir=temporary_folder()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def watched(what: str, stall_seconds: float) -> Iterator[Any]:
    """Let an actor watch the ranks of the block, which is given the actor's handle.

    Parameters
    ----------
    what : str
        What the ranks do, for messages.
    stall_seconds : float
        How long a rank may do nothing at all.

    Raises
    ------
    ClusterError
        If the block failed because a rank was stuck; the message names it.
    """
    options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": beside_driver()}
    watch: Any = ray.remote(**options)(Watch).remote(stall_seconds)
    try:
        yield watch
        sizes = ray.get(watch.sizes.remote())
        if len(sizes) > 1:
            logger.warning(f"{what} ran on {', then '.join(map(str, sizes))} workers")
    except CuvisDistError:
        verdict = ray.get(watch.verdict.remote())
        if verdict:
            raise ClusterError(f"{what} was ended: {verdict}") from None
        raise
    finally:
        ray.kill(watch)
