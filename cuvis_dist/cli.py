"""The ``cuvis-dist`` command: what does a person type?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cuvis_dist.errors import INTERRUPTED, CuvisDistError, one_line

if TYPE_CHECKING:
    from cuvis_dist.run import TrainRun
    from cuvis_dist.scaling import Scaling


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0 done, 1 failed, 2 bad input, 3 unusable data, 4 lost or missing resources, 130 interrupted.
    """
    arguments = _parser().parse_args(argv)
    _quiet(arguments.verbose)
    try:
        return arguments.command(arguments)
    except CuvisDistError as error:
        print(f"cuvis-dist: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, SystemExit):  # Ray makes the latter of SIGTERM
        print("cuvis-dist: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if arguments.verbose:
            raise
        print(f"cuvis-dist: {one_line(error)} (-v shows where)", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cuvis-dist", description="Two-phase training of cuvis.ai pipelines on a Ray cluster."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run both phases of a trainrun and save the pipeline")
    add_trainrun_options(run)
    add_scaling_options(run)
    _add_restart(run)
    run.set_defaults(command=_run)

    info = commands.add_parser(
        "info", help="print nodes, what is statistical or unfrozen, and frames per split"
    )
    add_trainrun_options(info)
    info.set_defaults(command=_info)

    plan = commands.add_parser(
        "plan", help="print the passes over the archive: what each reads, measures and fits"
    )
    add_trainrun_options(plan)
    add_scaling_options(plan)
    plan.set_defaults(command=_plan)

    demo = commands.add_parser(
        "demo", help="generate a labelled archive and run the two-phase example on it"
    )
    demo.add_argument("--folder", type=Path, default=Path("outputs/demo"), metavar="DIR")
    for name, default in _demo_defaults().items():
        demo.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N")
    add_scaling_options(demo)
    _add_restart(demo)
    demo.set_defaults(command=_demo)
    return parser


def add_trainrun_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which trainrun is meant, with ``restore-trainrun``'s spellings."""
    parser.add_argument("trainrun", metavar="TRAINRUN", help="trainrun YAML, flat or with defaults")
    parser.add_argument(
        "--plugins-dir",
        action="append",
        default=[],
        metavar="DIR",
        help="folder of plugin manifests, beside those of the installed cuvis_ai; repeatable",
    )
    parser.add_argument(
        "--override",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="e.g. data.batch_size=16; repeatable",
    )
    parser.add_argument("--output-dir", metavar="DIR", help="instead of the trainrun's output_dir")
    _add_verbose(parser)


def add_scaling_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how many workers run, and where."""
    parser.add_argument("--scaling", metavar="FILE", help="YAML of scaling settings")
    parser.add_argument("--address", metavar="A", help="Ray cluster; default: start Ray here")
    parser.add_argument("--workers", type=int, metavar="N", help="workers of phase 1")
    parser.add_argument("--train-workers", type=int, metavar="M", help="DDP workers of phase 2")
    parser.add_argument("--gpus-per-worker", type=float, metavar="G", help="GPUs of each of them")
    parser.add_argument(
        "--fold",
        action="store_true",
        default=None,
        help="derive what affine nodes separate instead of reading the archive again",
    )
    if not any(action.dest == "verbose" for action in parser._actions):
        _add_verbose(parser)


def _add_restart(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--restart",
        action="store_true",
        help="run from the beginning, whatever an earlier run of the same trainrun left",
    )


def _add_verbose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show Ray's and cuvis.ai's logs"
    )


def _quiet(verbose: bool) -> None:
    """Leave the terminal to progress lines and results unless logs are asked for."""
    import logging
    import warnings

    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="DEBUG" if verbose else "WARNING")
    if not verbose:
        for name in ("ray", "pytorch_lightning", "lightning_fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")


def _trainrun(arguments: argparse.Namespace) -> TrainRun:
    from cuvis_dist.run import load_trainrun

    return load_trainrun(
        arguments.trainrun, arguments.override, arguments.plugins_dir, arguments.output_dir
    )


def _scaling(arguments: argparse.Namespace) -> Scaling:
    from cuvis_dist.scaling import Scaling

    names = ("address", "workers", "train_workers", "gpus_per_worker", "fold")
    return Scaling.load(arguments.scaling, **{name: getattr(arguments, name) for name in names})


def _run(arguments: argparse.Namespace) -> int:
    from cuvis_dist.progress import ProgressLines
    from cuvis_dist.run import run_trainrun

    scaling = _scaling(arguments)
    record = run_trainrun(
        _trainrun(arguments), scaling, ProgressLines(), arguments.verbose, arguments.restart
    )
    for split, metrics in record.metrics.items():
        for name, value in metrics.items():
            print(f"{split:5} {name} {value:.4f}")
    print(f"pipeline {record.pipeline}")
    print(f"record   {Path(record.output_dir) / 'run.json'}")
    return 0


def _info(arguments: argparse.Namespace) -> int:
    from cuvis_dist.run import describe

    trainrun = _trainrun(arguments)
    info = describe(trainrun)
    print(f"trainrun {trainrun.config.name}: {trainrun.path}")
    print(f"pipeline {trainrun.pipeline.name}")
    width = max(len(name) for name, _, _ in info["nodes"])
    for name, class_name, roles in info["nodes"]:
        print(f"  {name:{width}}  {class_name:24}  {'; '.join(roles)}".rstrip())
    print("frames   " + ", ".join(f"{split} {n}" for split, n in info["frames"].items()))
    phases = "both phases" if trainrun.config.training else "phase 1 alone (no training block)"
    print(f"runs     {phases}, result in {trainrun.saved_pipeline}")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from cuvis_dist.run import preview

    scaling = _scaling(arguments)
    preview_ = preview(_trainrun(arguments), scaling)
    frame, frames = preview_.frame_bytes, preview_.frames
    print(f"{frames} frames in {preview_.shards} shards, {frame / 1e6:.1f} MB a frame")
    for number, this_pass in enumerate(preview_.passes, 1):
        print(f"pass {number}: reads {frame * frames / 1e9:.3g} GB, {this_pass}")
        for fit in this_pass.fits:
            print(f"  {fit.node.name}: {fit}")
    if not preview_.passes:
        print("nothing to fit: the pipeline has no statistical node")
    return 0


def _demo_defaults() -> dict[str, int]:
    from dataclasses import asdict

    from cuvis_dist.demo import DemoSettings

    return asdict(DemoSettings())


def _demo(arguments: argparse.Namespace) -> int:
    from cuvis_dist.demo import DemoSettings, write_demo

    settings = DemoSettings(**{name: getattr(arguments, name) for name in _demo_defaults()})
    trainrun = write_demo(arguments.folder, settings)
    size = f"{settings.height} x {settings.width} x {settings.bands}"
    print(f"archive  {settings.frames} frames of {size} in {trainrun.parent / 'archive'}")
    print(f"trainrun {trainrun}")
    for name in ("plugins_dir", "override"):
        setattr(arguments, name, [])
    arguments.trainrun, arguments.output_dir = trainrun, None
    return _run(arguments)


if __name__ == "__main__":
    sys.exit(main())
