"""What would a command do? ``info``, ``plan``, and ``--dry-run`` of the others."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cuvis_dist.commands.options import (
    add_command,
    add_fold,
    add_scaling_options,
    add_store,
    add_trainrun_options,
    add_without,
    scaling_of,
    trainrun_of,
)
from cuvis_dist.runs.lines import Lines

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

    from cuvis_dist.runs.trainrun import TrainRun
    from cuvis_dist.scaling import Scaling


def add(commands: Any) -> None:
    """Add ``info`` and ``plan``."""
    info = add_command(
        commands, "info", "print nodes, what is statistical or unfrozen, and frames per split"
    )
    add_trainrun_options(info)
    info.set_defaults(command=_info)

    plan = add_command(
        commands, "plan", "print the passes over the archive: what each reads, measures and fits"
    )
    add_trainrun_options(plan)
    add_scaling_options(plan)
    add_fold(plan)
    add_store(plan, "count the frames that would be taken from there")
    add_without(plan)
    plan.add_argument(
        "--calibrate",
        action="store_true",
        help="try each pass on a few frames to estimate its time",
    )
    plan.set_defaults(command=_plan)


def _info(arguments: argparse.Namespace, lines: Lines) -> int:
    trainrun = trainrun_of(arguments, lines)
    from cuvis_dist.runs.description import describe

    info = describe(trainrun)
    lines.settle()
    print(f"trainrun {trainrun.config.name}: {trainrun.path}")
    print(f"pipeline {trainrun.pipeline.name}")
    width = max(len(name) for name, _, _ in info["nodes"])
    for name, class_name, roles in info["nodes"]:
        print(f"  {name:{width}}  {class_name:24}  {'; '.join(roles)}".rstrip())
    print("frames   " + ", ".join(f"{split} {n}" for split, n in info["frames"].items()))
    phases = "both phases" if trainrun.config.training else "phase 1 alone (no training block)"
    print(f"runs     {phases}, result in {trainrun.saved_pipeline}")
    if info["last"]:
        print(f"last     {info['last']}")
    return 0


def _plan(arguments: argparse.Namespace, lines: Lines) -> int:
    scaling = scaling_of(arguments)
    print_plan(trainrun_of(arguments, lines), scaling, lines, arguments.calibrate)
    return 0


def dry_run(trainrun: TrainRun, scaling: Scaling, lines: Lines) -> int:
    """Print what a run of a trainrun would do; returns the exit code.

    Raises
    ------
    InputError
        If the run would be refused before it reads frames.
    """
    from cuvis_dist.execution.asked import trains_here
    from cuvis_dist.runs.two_phase import check_phase_2, check_splits

    if (training := trainrun.config.training) is not None:
        check_phase_2(trainrun, training, scaling)
        check_splits(trainrun.datamodule(scaling), training)
    each = f"{scaling.resources.cpus_per_worker:g} CPUs each"
    if trainrun.weights is None:
        scaling = print_plan(trainrun, scaling, lines)
        workers = scaling.resources.workers
        there = f"{workers or 'one per CPU of the cluster'} workers, {each}"
        print(f"phase 1  {'in this process' if workers == 0 else there}")
    else:
        lines.settle()
        print(f"phase 1  none: its result is that of {trainrun.weights}")
        print_training(trainrun, trainrun.datamodule(scaling))
    if trainrun.config.training is None:
        print("phase 2  none: phase 1 alone")
    else:
        gpus = f" and {scaling.resources.train_gpus:g} GPUs" if scaling.resources.train_gpus else ""
        each = each.replace(" each", f"{gpus} each")
        epochs = trainrun.config.training.max_epochs
        least, most = scaling.resources.least_train_workers, scaling.resources.train_workers
        number = f"{most}" if least == most else f"{least} to {most}"
        there = "in this process" if trains_here(scaling) else f"{number} workers, {each}"
        print(f"phase 2  {there}; at most {epochs} epochs")
    print(f"result   {trainrun.saved_pipeline}")
    return 0


def print_plan(
    trainrun: TrainRun, scaling: Scaling, lines: Lines, calibrate: bool = False
) -> Scaling:
    """Print the passes, and where they run; return the settings with that choice made."""
    from cuvis_dist.execution.where import choose
    from cuvis_dist.initialization.preview import preview
    from cuvis_dist.runs.two_phase import work_of

    datamodule = trainrun.datamodule(scaling)
    if calibrate:
        lines.wait("trying each pass on a few frames")
    plan = preview(trainrun.pipeline, datamodule, scaling, calibrate)
    choice = choose(scaling, lambda: work_of(trainrun, datamodule, scaling))
    lines.settle()
    frame, frames = plan.frame_bytes, plan.frames
    print(f"{frames} frames in {plan.shards} shards, {_size(frame)} a frame")
    if plan.filled is not None:
        print(f"first: reads {_size(frame * plan.filled)}, to look for the bulk in the store")
        print(f"  {frames - plan.filled:,} of {frames:,} frames from it, {plan.filled:,} to read")
    for number, cost in enumerate(plan.costs, 1):
        memory = f"{cost.worker_bytes / 1e9:.2f} GB per worker"
        read = frames - cost.from_store
        print(f"pass {number}: reads {_size(frame * read)}, {memory}, {cost.step}")
        if cost.from_store:
            print(f"  {cost.from_store:,} of {frames:,} frames from the store, {read:,} to read")
        for fit in cost.step.fits:
            again = f" (read again: {fit.again})" if fit.again else ""
            print(f"  {fit.node.name}: {fit}{again}")
        for name in cost.step.of_frames if plan.batch_frames > 1 else []:
            print(f"  {name}: frame by frame (upstream: batches of {plan.batch_frames} frames)")
        for fit in (fit for level in cost.step.later for fit in level.fits):
            pixels = scaling.measuring.sample_pixels
            print(f"  {fit.node.name}: {fit}, on a sample of at most {pixels} pixels")
        if cost.step.streamed:
            print(f"  {cost.step.streamed.name}: {plan.batches}")
        else:
            print(f"  {cost.rounding}")
        if cost.seconds is not None:
            print(f"  {cost.seconds:.3g} s a frame on one worker")
    if plan.seconds is not None and plan.costs:
        workers = f"{plan.workers} workers" if plan.workers > 1 else "1 worker"
        print(f"about {plan.seconds:.3g} s with {workers}, start-up apart")
        if any(cost.step.streamed for cost in plan.costs):
            print("the fits of streamed nodes come on top")
    if not plan.costs:
        print("nothing to fit: the pipeline has no statistical node")
    print(f"runs {choice.why}")
    if trainrun.config.training is not None:
        print_training(trainrun, datamodule)
    return choice.scaling


def print_training(trainrun: TrainRun, datamodule: LightningDataModule) -> None:
    """Print how each node would take part in a training step."""
    from cuvis_dist.runs.description import foresee_nodes

    print("training step on several workers:")
    for name, words in foresee_nodes(trainrun, datamodule).items():
        print(f"  {name}: {words}")


def print_workers(scaling: Scaling, workers: int | None, gpus: float) -> None:
    """Print on how many workers something would run, and what each would occupy."""
    on_gpus = f" and {gpus:g} GPUs" if gpus else ""
    each = f"{scaling.resources.cpus_per_worker:g} CPUs{on_gpus} each"
    there = f"{workers or 'one per CPU of the cluster'}, {each}"
    print(f"workers  {'none: in this process' if workers == 0 else there}")


def _size(count: float) -> str:
    """Return a number of bytes in a unit that leaves something before the decimal point."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
