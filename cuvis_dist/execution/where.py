"""Where does work run: in the driver's process, or on the workers of a Ray cluster?

Workers take longer to start than small work takes. Without a word about workers or a cluster, work
that one process ends sooner stays here; whoever asks for workers gets them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import pytorch_lightning as pl
import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import EmitFn
from loguru import logger
from pytorch_lightning.utilities.seed import isolate_rng

from cuvis_dist.archive import Archive, Patience, be_patient, open_archive
from cuvis_dist.errors import CuvisDistError, DataError
from cuvis_dist.execution.asked import trains_here, why_workers
from cuvis_dist.execution.local import LocalEngine, call_here
from cuvis_dist.execution.notices import notice
from cuvis_dist.execution.pool import Workers
from cuvis_dist.execution.session import connect, require_resources
from cuvis_dist.execution.spread import Engine
from cuvis_dist.execution.worker import on_worker
from cuvis_dist.scaling import Scaling

T = TypeVar("T")

#: Seconds until Ray and its first workers compute, where the driver would begin at once. Measured
#: on 2 cores: Ray 3, and a worker's imports 7.
START_SECONDS = 10.0
#: Values that one core reads and measures in a second: a frame of 512 x 512 x 61 takes 0.08 s a
#: pass. And what each frame takes besides, however small it is.
VALUES_PER_SECOND = 512 * 512 * 61 / 0.08
FRAME_SECONDS = 0.02
#: Weights of networks that a core gets through in a second: each is used at about 1,000 positions
#: of a frame, with two operations, of which a core does 5e10. A rough guess: they are many or few.
WEIGHTS_PER_SECOND = 2.5e7
#: Frames that are tried to find out how large one is.
_TRIED = 3
#: So few frames are not worth that.
_FEW = 4


@dataclass(frozen=True)
class Work:
    """How much there is to do.

    Attributes
    ----------
    frames : int
        Frames to read, each as often as it is read.
    values : int
        Values of a frame.
    weights : int
        Parameters of the nodes that a frame goes through.
    """

    frames: int
    values: int
    weights: int = 0

    @property
    def seconds(self) -> float:
        """About how long one process takes for it."""
        measured = self.values / VALUES_PER_SECOND + self.weights / WEIGHTS_PER_SECOND
        return self.frames * (FRAME_SECONDS + measured)

    @property
    def pays_for_workers(self) -> bool:
        """Whether workers on this machine would end sooner, from their start on."""
        cores = os.cpu_count() or 1
        return self.seconds > START_SECONDS + self.seconds / cores

    def __str__(self) -> str:
        readings = f"{self.frames} readings of {_short(self.values / 1e6)} million values"
        if self.weights > 1e6:
            readings += f", through nodes with {_short(self.weights / 1e6)} million weights,"
        return (
            f"{readings} take one process about {_short(self.seconds)} s, and workers take "
            f"{START_SECONDS:g} s to start"
        )


def _short(value: float) -> str:
    """Return a number in two digits, without an exponent."""
    return f"{float(f'{value:.2g}'):g}"


def work_on(archive: Archive, pipeline: CuvisPipeline, frames: int | None = None) -> Work:
    """Return the work of computing frames of an archive; reads the first one that can be read.

    A frame counts as large where none of the first can be read, or so few are to be read that it
    makes no difference.

    Parameters
    ----------
    frames : int, optional
        How many are to be read, each as often as it is read; by default each once.
    """
    frames = len(archive) if frames is None else frames
    weights = sum(p.numel() for node in pipeline.nodes() for p in node.parameters())
    if frames <= _FEW:
        return Work(frames, int(VALUES_PER_SECOND) if frames else 0, weights)
    for index in range(min(_TRIED, len(archive))):
        try:
            with isolate_rng(include_cuda=False):
                batch = archive.read(index)
        except DataError:
            continue
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        return Work(frames, max((value.numel() for value in tensors), default=0), weights)
    return Work(frames, int(VALUES_PER_SECOND), weights)


def work_on_splits(
    datamodule: pl.LightningDataModule,
    pipeline: CuvisPipeline,
    times: Mapping[str, int],
    frames: int = 0,
) -> Work:
    """Return the work of computing these splits so often each, if the data module serves them.

    ``frames`` are to be read besides.
    """
    first = None
    with isolate_rng(include_cuda=False):
        for split in times:
            try:
                archive = open_archive(datamodule, split)
            except CuvisDistError:  # whoever needs the split says so
                continue
            frames += times[split] * len(archive)
            first = first or archive
    return work_on(first, pipeline, frames) if first else Work(0, 0)


@dataclass(frozen=True)
class Choice:
    """Where work runs.

    Attributes
    ----------
    scaling : Scaling
        The settings with the choice made: ``resources.workers`` is 0 where the work stays here,
        and ``resources.train_workers`` where training does.
    why : str
        Where the work runs, training apart, and why, as the end of a sentence.
    """

    scaling: Scaling
    why: str


def choose(scaling: Scaling, work: Callable[[], Work]) -> Choice:
    """Choose where work runs, as far as the settings leave it open.

    Parameters
    ----------
    scaling : Scaling
        The settings as they were given.
    work : callable
        Returns how much there is to do; called where the answer depends on that.

    Raises
    ------
    InputError
        If the settings ask for this process and for what it does not do.
    """
    use_patience(scaling)
    if trains_here(scaling):
        scaling = scaling.replace(resources={"train_workers": 0})
    workers = scaling.resources.workers
    if workers == 0:
        return Choice(scaling, "in this process, without Ray, as workers: 0 says")
    if reason := why_workers(scaling):
        return Choice(scaling, f"on workers, since {reason}")
    known = work()
    if known.pays_for_workers:
        return Choice(scaling, f"on workers: {known}")
    return Choice(
        scaling.replace(resources={"workers": 0}),
        f"in this process, without Ray: {known} (--workers asks for them)",
    )


def use_patience(scaling: Scaling) -> None:
    """Have frames read in this process, and by what it orders, as long as the settings say."""
    resources = scaling.resources
    be_patient(Patience(resources.stall_seconds, resources.read_seconds), notice)


def settled(scaling: Scaling, what: str, work: Callable[[], Work]) -> Scaling:
    """Return the settings with the choice made that :func:`choose` makes, and log it.

    Parameters
    ----------
    what : str
        What is to be done, for the log.
    """
    choice = choose(scaling, work)
    logger.info(f"{what} runs {choice.why}")
    return choice.scaling


def begin(scaling: Scaling, training: bool | None, verbose: bool = False) -> None:
    """Join or start the Ray cluster, unless all the work of these settings stays here.

    Parameters
    ----------
    scaling : Scaling
        From :func:`settled`.
    training : bool or None
        Whether there is training to do, or else work of phase 1; None asks for no room yet.
    verbose : bool
        Show Ray's logs.

    Raises
    ------
    ClusterError
        If the cluster cannot be reached, or one that was started here is too small.
    """
    resources = scaling.resources
    training_there = bool(training) and resources.train_workers > 0
    if resources.workers == 0 and not training_there and not resources.train_gpus:
        return
    connect(scaling, verbose)
    if training is not None:
        require_resources(scaling, training_there)


def engine_for(workers: Workers) -> Engine:
    """Return what runs functions of shards on these workers, or in this process instead of them."""
    if workers.here:
        return LocalEngine(workers.cpus)
    from cuvis_dist.execution.engine import RayEngine

    return RayEngine(workers)


def in_one_process(
    function: Callable[..., T],
    *args: object,
    emit: EmitFn,
    workers: Workers,
    cpus: float | None = None,
    retries: int = 0,
) -> T:
    """Run ``function(*args, emit=...)`` in this process or on one worker; return its result.

    Parameters
    ----------
    workers : Workers
        One of these workers runs it, or this process instead of them. Either gives it copies of
        its arguments.
    cpus : float, optional
        What it occupies, if it is not what such a worker does: 0 where it mostly waits for other
        workers; it then has no GPU either.
    retries : int
        How often it may be called again, elsewhere, when its worker is lost.

    Raises
    ------
    CuvisDistError
        What the function raised, when it was one; else as
        :func:`~cuvis_dist.execution.failures.raise_cause` says.
    """
    gpus = workers.gpus if cpus is None else 0.0
    cpus = workers.cpus if cpus is None else cpus
    if workers.here:
        return call_here(function, *args, emit=emit, threads=max(1, int(cpus)))
    return on_worker(function, *args, emit=emit, cpus=cpus, gpus=gpus, retries=retries)
