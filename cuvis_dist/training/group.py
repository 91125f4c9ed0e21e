"""How does a group of ranks start on a Ray cluster, and what ends it?"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from cuvis_ai_core.training.post_fit import EmitFn
from loguru import logger
from ray import cloudpickle
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cuvis_dist.errors import ClusterError, CuvisDistError
from cuvis_dist.execution.borrowing import lend_frames
from cuvis_dist.execution.events import relayed
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.session import beside_driver, connect, require_resources
from cuvis_dist.scaling import Scaling
from cuvis_dist.storage import OutputFolder, temporary_folder
from cuvis_dist.training.assignment import Assignment, Driver, Outcome
from cuvis_dist.training.desk import Desk
from cuvis_dist.training.entry import begin_rank
from cuvis_dist.training.rendezvous import OneAddressConfig
from cuvis_dist.training.watch import Beat
from cuvis_dist.waiting import announce

#: How long workers of a training that was interrupted may take to end, in seconds.
_ABORT_SECONDS = 10.0


class Group:
    """Ranks that Ray Train starts, and that wait for what they are to do.

    They import what they compute with at once, so that a group may be started while there is other
    work.

    Parameters
    ----------
    scaling : Scaling
        How many ranks there are, and what each of them has.
    output : OutputFolder
        Where the run writes.
    """

    def __init__(self, scaling: Scaling, output: OutputFolder) -> None:
        self.ranks = _scaling_config(scaling)
        self._around = ExitStack()
        storage = self._around.enter_context(folder_for_ray(output))
        options: dict[str, Any] = {"num_cpus": 0, "scheduling_strategy": beside_driver()}
        self._desk: Any = ray.remote(**options)(Desk).remote(scaling.resources.stall_seconds)
        gpus = scaling.resources.train_gpus
        self._trainer = _Trainer(
            begin_rank,  # type: ignore[arg-type]
            train_loop_config={"desk": self._desk},
            # nccl refuses two processes on one GPU
            torch_config=OneAddressConfig("nccl" if gpus >= 1 else "gloo"),
            scaling_config=self.ranks,
            run_config=RunConfig(
                storage_path=str(storage),
                # Ray Train would try again after an error of any kind: see GradientTrainer._fit.
                failure_config=FailureConfig(max_failures=0),
            ),
        )
        self._result: Future[Any] = Future()
        threading.Thread(target=self._run, name="cuvis-dist-ranks", daemon=True).start()

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._result.set_result(self._trainer.fit())
        except BaseException as error:
            self._result.set_exception(error)

    def carry_out(self, assignment: Assignment, what: str, emit: EmitFn) -> Outcome:
        """Let the ranks carry out an assignment, once; return and raise as train_on_workers."""
        with relayed(emit) as remote_emit, self._named(what), raise_cause(what):
            driver = Driver(remote_emit, _RemoteWatch(self._desk), os.getcwd())
            given = [ray.put(assignment), ray.put(driver)]
            ray.get(self._desk.give.remote(given))
            outcome = cloudpickle.loads(self._result.result().return_value)
        if outcome is None:
            raise ClusterError(f"the workers ended {assignment.verb} without a result")
        return outcome

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """Raise ClusterError if the block failed because a rank was stuck; it is named."""
        try:
            yield
            sizes = ray.get(self._desk.sizes.remote())
            if len(sizes) > 1:
                logger.warning(f"{what} ran on {', then '.join(map(str, sizes))} workers")
        except CuvisDistError:
            verdict = ray.get(self._desk.verdict.remote())
            if verdict:
                raise ClusterError(f"{what} was ended: {verdict}") from None
            raise

    def close(self) -> None:
        """End the ranks, if they are still there."""
        if not self._result.done():
            self._trainer.abort()
        with suppress(ray.exceptions.RayError):
            ray.kill(self._desk)
        self._around.close()


_early: list[Group] = []


def start_early(scaling: Scaling, output: OutputFolder) -> None:
    """Start the ranks that a later call of :func:`train_on_workers` needs.

    Whoever calls this calls :func:`end_early`, too, however the work ends.
    """
    _early.append(Group(scaling, output))


def end_early() -> None:
    """End the ranks that were started early and not used."""
    while _early:
        _early.pop().close()


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
    scaling = assignment.scaling
    connect(scaling)
    require_resources(scaling)
    lend_frames(assignment.cache)
    announce(f"waiting for {workers_in_words(scaling)} to begin {what}")
    if _early and _early[0].ranks != _scaling_config(scaling):
        end_early()
    with _early.pop() if _early else Group(scaling, assignment.output) as group:
        return group.carry_out(assignment, what, emit)


class _Trainer(TorchTrainer):
    """Ray's trainer, which leaves signals to whoever runs it.

    Its own handler of Ctrl-C ends the process, and hears of no second one.
    """

    _controller: Any = None

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller

    def abort(self) -> None:
        """End the workers, as far as they are there."""
        if self._controller is not None:
            with suppress(ray.exceptions.RayError):
                ray.get(self._controller.abort.remote(), timeout=_ABORT_SECONDS)


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
