"""What is a saved pipeline applied to? ``evaluate`` and ``score``."""

from __future__ import annotations

import argparse
from typing import Any

from cuvis_dist.commands.options import (
    add_command,
    add_dry_run,
    add_restart,
    add_saved_options,
    add_scaling_options,
    scaling_of,
    trainrun_of,
)
from cuvis_dist.commands.previewing import print_workers
from cuvis_dist.runs.lines import Lines


def add(commands: Any) -> None:
    """Add ``evaluate`` and ``score``."""
    evaluate = add_command(commands, "evaluate", "print a saved pipeline's metrics on a split")
    add_saved_options(evaluate, ("val", "test"), "test")
    add_scaling_options(evaluate)
    add_dry_run(evaluate)
    evaluate.set_defaults(command=_evaluate)

    score = add_command(
        commands, "score", "write a saved pipeline's score maps and decisions, one file per frame"
    )
    add_saved_options(score, ("train", "val", "test", "predict"), "predict: all frames")
    score.add_argument(
        "--outputs",
        metavar="NODE.PORT,...",
        help="what to write; default: every port called scores or decisions",
    )
    add_scaling_options(score)
    add_restart(score)
    add_dry_run(score)
    score.set_defaults(command=_score)


def _evaluate(arguments: argparse.Namespace, lines: Lines) -> int:
    scaling = scaling_of(arguments)
    trainrun = trainrun_of(arguments, lines, scaling, arguments.pipeline)
    from cuvis_dist.archive import open_archive
    from cuvis_dist.execution.where import choose, work_on
    from cuvis_dist.runs.evaluate import evaluate_saved
    from cuvis_dist.runs.progress import ProgressLines

    split = arguments.split
    if arguments.dry_run:
        archive = open_archive(trainrun.datamodule(scaling, fitting=False), split)
        scaling = choose(scaling, lambda: work_on(archive, trainrun.pipeline)).scaling
        lines.settle()
        print(f"pipeline {trainrun.config.pipeline}")
        print(f"frames   {len(archive)} of {split}")
        on_gpus = bool(scaling.resources.train_gpus)
        print_workers(
            scaling,
            scaling.resources.train_workers if on_gpus else scaling.resources.workers,
            scaling.resources.train_gpus,
        )
        return 0
    record = evaluate_saved(
        trainrun, split, scaling, ProgressLines(lines), verbose=arguments.verbose
    )
    lines.settle()
    assert record.metrics is not None
    for name, value in record.metrics[split].items():
        print(f"{split:5} {name} {value:.4f}")
    print(f"result   {record.output.at(record.file)}")
    return 0


def _score(arguments: argparse.Namespace, lines: Lines) -> int:
    scaling = scaling_of(arguments)
    trainrun = trainrun_of(arguments, lines, scaling, arguments.pipeline)
    from cuvis_dist.execution.where import choose, work_on
    from cuvis_dist.runs.progress import ProgressLines
    from cuvis_dist.runs.score import Scoring

    scoring = Scoring(trainrun, arguments.split, arguments.outputs, scaling)
    if arguments.dry_run:
        plan = scoring.plan(arguments.restart)
        scaling = choose(
            scaling, lambda: work_on(plan.archive.only(plan.todo), trainrun.pipeline)
        ).scaling
        lines.settle()
        print(f"pipeline {trainrun.config.pipeline}")
        done = len(plan.files) - len(plan.todo)
        print(f"frames   {len(plan.files)} of {arguments.split}, {done} of them scored before")
        print(f"outputs  {', '.join('.'.join(port) for port in plan.outputs)}")
        print_workers(scaling, scaling.resources.workers, scaling.measuring.gpus)
        print(f"result   {plan.folder.at(plan.files[0])}, ...")
        return 0
    record = scoring.run(ProgressLines(lines).scored, arguments.verbose, arguments.restart)
    lines.settle()
    print(f"frames   {record.frames}: {record.written} written, {record.there} before")
    for reason in (record.skipped or {}).values():
        print(f"skipped  {reason}")
    print(f"scores   {record.scores}")
    return 0
