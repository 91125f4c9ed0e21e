"""How is a trainrun run? ``run``, ``init``, ``train``, and ``demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuvis_dist.commands.options import (
    add_command,
    add_dry_run,
    add_fold,
    add_restart,
    add_scaling_options,
    add_store,
    add_trainrun_options,
    add_without,
    scaling_of,
    trainrun_of,
)
from cuvis_dist.commands.previewing import dry_run
from cuvis_dist.runs.lines import Lines

if TYPE_CHECKING:
    from cuvis_dist.runs.record import RunRecord
    from cuvis_dist.runs.trainrun import TrainRun
    from cuvis_dist.scaling import Scaling


def add(commands: Any) -> None:
    """Add ``run``, ``init`` and ``train``."""
    run = add_command(commands, "run", "run both phases of a trainrun and save the pipeline")
    run.set_defaults(command=_run)
    init = add_command(
        commands,
        "init",
        "run phase 1 alone, say whether the fit looks sound, and save the pipeline",
    )
    init.add_argument(
        "--compare",
        metavar="OTHER",
        help="say what changed since this initialization (.yaml, .pt or .json), and by how much",
    )
    init.set_defaults(command=_init)
    train = add_command(
        commands, "train", "run phase 2 alone, on what init left, and save the pipeline"
    )
    train.add_argument(
        "--initialization",
        metavar="FILE",
        help="take the state of this one instead: .yaml, .pt or .json of what init left elsewhere",
    )
    train.set_defaults(command=_train)
    for command in (run, init, train):
        add_trainrun_options(command)
        add_scaling_options(command)
        add_restart(command)
        add_dry_run(command)
        if command is not train:
            add_fold(command)
            add_store(command)
            add_without(command)
            command.add_argument(
                "--robust",
                type=float,
                metavar="PART",
                help="fit phase 1 on the bulk of the frames, at least this part of them, e.g. 0.9",
            )
            command.add_argument(
                "--robust-pixels",
                type=float,
                metavar="PART",
                help="fit phase 1 on the bulk of the pixels, about this part of them or more",
            )


def add_demo(commands: Any) -> None:
    """Add ``demo``."""
    demo = add_command(
        commands, "demo", "generate a labelled archive and run the two-phase example on it"
    )
    demo.add_argument(
        "--folder",
        type=Path,
        default=Path("outputs/demo"),
        metavar="DIR",
        help="where archive, pipeline and trainrun are written; default: %(default)s",
    )
    for name, default in _demo_defaults().items():
        demo.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=default,
            metavar="N",
            help="default: %(default)s",
        )
    add_scaling_options(demo)
    add_fold(demo)
    add_restart(demo)
    demo.set_defaults(command=_demo)


def _run(arguments: argparse.Namespace, lines: Lines) -> int:
    scaling = scaling_of(arguments)
    trainrun = trainrun_of(arguments, lines, scaling)
    if arguments.dry_run:
        return dry_run(trainrun, scaling, lines)
    _run_and_print(arguments, trainrun, scaling, lines)
    return 0


def _init(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.initialization.place import find

    scaling = scaling_of(arguments)
    if arguments.compare:
        find(arguments.compare)
    trainrun = trainrun_of(arguments, lines, scaling).initialization_only()
    other = None
    if arguments.compare:  # before this one, which may take its place
        from cuvis_dist.initialization.saved import read_initialization

        other = read_initialization(arguments.compare)
    if arguments.dry_run:
        return dry_run(trainrun, scaling, lines)
    record = _run_and_print(arguments, trainrun, scaling, lines)
    if not record.passes:
        print("nothing to fit: the pipeline has no statistical node")
    elif not record.findings:
        print("the fit looks sound")
    if other is not None:
        from cuvis_dist.initialization.comparing import compare

        made = read_initialization(record.pipeline)
        print(*compare(other, made, trainrun.pipeline.nodes()).lines(), sep="\n")
    return 0


def _train(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.initialization.place import find

    scaling = scaling_of(arguments)
    if arguments.initialization:
        find(arguments.initialization)
    trainrun = trainrun_of(arguments, lines, scaling).training_only(arguments.initialization)
    if arguments.dry_run:
        return dry_run(trainrun, scaling, lines)
    _run_and_print(arguments, trainrun, scaling, lines)
    return 0


def _run_and_print(
    arguments: argparse.Namespace, trainrun: TrainRun, scaling: Scaling, lines: Lines
) -> RunRecord:
    from cuvis_dist.runs.progress import ProgressLines
    from cuvis_dist.runs.two_phase import run_trainrun

    record = run_trainrun(
        trainrun, scaling, ProgressLines(lines), arguments.verbose, arguments.restart
    )
    lines.settle()
    for split, metrics in record.metrics.items():
        for name, value in metrics.items():
            print(f"{split:5} {name} {value:.4f}")
    for done in record.passes:
        if done.from_store is not None:
            read = done.frames - done.from_store
            print(f"store    {done.from_store:,} of {done.frames:,} frames, {read:,} read")
    for words in record.left_out.values():
        print(f"left out {words}")
    for line in record.outside():
        print(f"left out {line}")
    for line in record.sampled():
        print(f"sampled  {line}")
    print(f"pipeline {record.pipeline}")
    print(f"record   {record.output.at(record.file)}")
    for finding in record.findings:
        print(f"warning: {finding}")
    if record.report:
        print(f"report   {record.report}")
    return record


def _demo_defaults() -> dict[str, int]:
    from dataclasses import asdict

    from cuvis_dist.demo import DemoSettings

    return asdict(DemoSettings())


def _demo(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.demo import DemoSettings, write_demo
    from cuvis_dist.storage import writing_to

    settings = DemoSettings(**{name: getattr(arguments, name) for name in _demo_defaults()})
    lines.wait(f"writing an archive to {arguments.folder}")
    folder = arguments.folder.resolve()
    with writing_to(folder):
        trainrun = write_demo(folder, settings)
    lines.settle()
    size = f"{settings.height} x {settings.width} x {settings.bands}"
    print(f"archive  {settings.frames} frames of {size} in {trainrun.parent / 'archive'}")
    print(f"trainrun {trainrun}")
    for name in ("plugins_dir", "override"):
        setattr(arguments, name, [])
    arguments.trainrun, arguments.output_dir, arguments.dry_run = trainrun, None, False
    return _run(arguments, lines)
