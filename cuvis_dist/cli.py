"""The ``cuvis-dist`` command: what does a person type?"""

from __future__ import annotations

import argparse
import atexit
import gc
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from cuvis_dist.errors import INTERRUPTED, CuvisDistError, InputError, one_line
from cuvis_dist.runs.audits import add_audit_command
from cuvis_dist.runs.lines import Lines
from cuvis_dist.runs.stores import add_store_commands
from cuvis_dist.stopping import stoppable

if TYPE_CHECKING:
    from pytorch_lightning import LightningDataModule

    from cuvis_dist.runs.record import RunRecord
    from cuvis_dist.runs.trainrun import TrainRun
    from cuvis_dist.scaling import Scaling


#: A line of the log; loguru would add the traceback of an exception.
_LOG = "{time:YYYY-MM-DD HH:mm:ss.SSS} | <level>{level: <8}</level> | {name}:{line} - {message}\n"
#: Options that stand for a setting, by the name that argparse gives them.
_SHORT = {
    "address": "resources.address",
    "workers": "resources.workers",
    "train_workers": "resources.train_workers",
    "train_gpus": "resources.train_gpus",
    "fold": "measuring.fold",
    "store": "measuring.store",
    "robust": "measuring.robust",
    "verify": "reading.verify",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0 done, 1 failed, 2 bad input, 3 unusable data, 4 lost or missing resources, 5 drift,
    130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    atexit.register(gc.freeze)  # else Python looks for seconds through all that it has loaded
    verbose, in_session = arguments.verbose, _in_ray()
    # Ray's logs come between the lines, and would be rewritten with them.
    with Lines(rewriting=False if verbose else None) as lines, stoppable(lines.last):
        # The command alone: an address in its options may carry a secret, before it is refused.
        print(f"cuvis-dist {version('cuvis-dist')}: {_what(arguments, argv)}", file=lines.stream)
        try:
            _quiet(verbose, lines)
            return arguments.command(arguments, lines)
        except CuvisDistError as error:
            lines.last(str(error))
            return error.exit_code
        except KeyboardInterrupt:
            lines.last("interrupted")
            return INTERRUPTED
        except Exception as error:
            if verbose:
                raise
            lines.last(f"{one_line(error)} (-v shows where)")
            return 1
        finally:
            if not in_session:
                _leave_ray(lines)


def _what(arguments: argparse.Namespace, argv: Sequence[str]) -> str:
    """Return the command and the files that it is about."""
    files = (getattr(arguments, name, None) for name in ("pipeline", "trainrun"))
    words = argv[:2] if argv[0] == "store" else argv[:1]
    return shlex.join([*words, *(str(file) for file in files if file)])


def _in_ray() -> bool:
    ray = sys.modules.get("ray")  # not loaded for this question
    return ray is not None and ray.is_initialized()


def _leave_ray(lines: Lines) -> None:
    """Stop the Ray that the command started, or leave the one it joined; else Python's end does."""
    if _in_ray():
        lines.wait("leaving Ray")
        sys.modules["ray"].shutdown()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cuvis-dist", description="Two-phase training of cuvis.ai pipelines on a Ray cluster."
    )
    parser.add_argument(
        "--version", action="version", version=f"cuvis-dist {version('cuvis-dist')}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run both phases of a trainrun and save the pipeline")
    add_trainrun_options(run)
    add_scaling_options(run)
    run.set_defaults(command=_run)

    init = commands.add_parser(
        "init", help="run phase 1 alone, say whether the fit looks sound, and save the pipeline"
    )
    add_trainrun_options(init)
    add_scaling_options(init)
    init.add_argument(
        "--compare",
        metavar="OTHER",
        help="say what changed since this initialization (.yaml, .pt or .json), and by how much",
    )
    init.set_defaults(command=_init)

    train = commands.add_parser(
        "train", help="run phase 2 alone, on what init left, and save the pipeline"
    )
    add_trainrun_options(train)
    train.add_argument(
        "--initialization",
        metavar="FILE",
        help="take the state of this one instead: .yaml, .pt or .json of what init left elsewhere",
    )
    add_scaling_options(train)
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="print a saved pipeline's metrics on a split")
    _add_saved_options(evaluate, ("val", "test"), "test")
    add_scaling_options(evaluate)
    evaluate.set_defaults(command=_evaluate)

    score = commands.add_parser(
        "score", help="write a saved pipeline's score maps and decisions, one file per frame"
    )
    _add_saved_options(score, ("train", "val", "test", "predict"), "predict: all frames")
    score.add_argument(
        "--outputs",
        metavar="NODE.PORT,...",
        help="what to write; default: every port called scores or decisions",
    )
    add_scaling_options(score)
    score.set_defaults(command=_score)
    for command in (run, init, train, evaluate, score):
        if command is not evaluate:
            _add_restart(command)
        command.add_argument(
            "--dry-run",
            action="store_true",
            help="print what it would do and the resources it would ask for; starts no Ray",
        )

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
    plan.add_argument(
        "--calibrate",
        action="store_true",
        help="try each pass on a few frames to estimate its time",
    )
    plan.set_defaults(command=_plan)

    for command in (run, init):
        command.add_argument(
            "--robust",
            type=float,
            metavar="PART",
            help="fit phase 1 on the bulk of the frames, at least this part of them, e.g. 0.9",
        )
    for command in (run, init, plan):
        _add_store(command)
        command.add_argument(
            "--without",
            action="append",
            default=[],
            metavar="RECORDING",
            help="leave a recording out of the train split: its name, or a glob; repeatable",
        )

    measure = commands.add_parser(
        "measure", help="measure the frames of a split that a store lacks; fit nothing"
    )
    add_trainrun_options(measure)
    measure.add_argument(
        "--split",
        choices=("train", "predict"),
        default="train",
        help="default: train; predict: all frames",
    )
    add_scaling_options(measure)
    _add_store(measure)
    measure.set_defaults(command=_measure, dry_run=False)
    add_store_commands(commands)
    add_audit_command(commands, add_trainrun_options, _add_store)

    demo = commands.add_parser(
        "demo", help="generate a labelled archive and run the two-phase example on it"
    )
    demo.add_argument("--folder", type=Path, default=Path("outputs/demo"), metavar="DIR")
    for name, default in _demo_defaults().items():
        demo.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="N")
    add_scaling_options(demo)
    _add_restart(demo)
    demo.set_defaults(command=_demo)

    submit = commands.add_parser(
        "submit", help="run a command as a job of a cluster and end with its exit code"
    )
    submit.add_argument(
        "--address",
        metavar="URL",
        help="the head node's dashboard; default: RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265",
    )
    submit.add_argument(
        "--working-dir",
        type=Path,
        metavar="DIR",
        help="folder to upload and run in; without it the job's paths are the cluster's",
    )
    submit.add_argument("--no-follow", action="store_true", help="do not wait for the job to end")
    _add_verbose(submit)
    submit.add_argument(
        "job",
        nargs=argparse.REMAINDER,
        metavar="COMMAND ...",
        help="e.g. run trainrun.yaml --train-workers 2",
    )
    submit.set_defaults(command=_submit)
    return parser


def add_trainrun_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which trainrun is meant, with ``restore-trainrun``'s spellings."""
    parser.add_argument("trainrun", metavar="TRAINRUN", help="trainrun YAML, flat or with defaults")
    _add_trainrun_settings(parser)


def _add_saved_options(
    parser: argparse.ArgumentParser, splits: tuple[str, ...], default: str
) -> None:
    parser.add_argument("pipeline", metavar="PIPELINE", help="saved pipeline, .yaml beside its .pt")
    parser.add_argument(
        "--data",
        dest="trainrun",
        required=True,
        metavar="TRAINRUN",
        help="trainrun YAML whose data block is used",
    )
    parser.add_argument(
        "--split",
        choices=splits,
        default=default.partition(":")[0],
        help=f"of that data; default: {default}",
    )
    _add_trainrun_settings(parser)


def _add_trainrun_settings(parser: argparse.ArgumentParser) -> None:
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
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="instead of the trainrun's output_dir: a folder, or a URI such as s3://bucket/run",
    )
    _add_verbose(parser)


def add_scaling_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how many workers run, and where."""
    parser.add_argument(
        "--scaling", metavar="FILE", help="YAML file of settings: resources, measuring, reading"
    )
    parser.add_argument("--address", metavar="A", help="Ray cluster; default: start Ray here")
    parser.add_argument("--workers", type=int, metavar="N", help="workers of phase 1")
    parser.add_argument("--train-workers", type=int, metavar="M", help="DDP workers of phase 2")
    parser.add_argument("--train-gpus", type=float, metavar="G", help="GPUs of each of them")
    parser.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        help="derive what affine nodes separate instead of reading the archive again (default)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        default=None,
        help="compare checksums of all files, too, with those that an earlier run has read",
    )
    parser.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="PART.NAME=VALUE",
        help="any setting of the scaling file, e.g. measuring.pixels=unlabelled; repeatable",
    )
    if not any(action.dest == "verbose" for action in parser._actions):
        _add_verbose(parser)


def _add_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store",
        metavar="S",
        help="folder or URI: take from there what was measured of each frame, and add to it",
    )


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


def _quiet(verbose: bool, lines: Lines) -> None:
    """Leave the terminal to progress lines and results unless logs are asked for."""
    import warnings

    from loguru import logger

    level = "DEBUG" if verbose else "WARNING"
    logger.remove()
    logger.add(
        lines.log,
        level=0,
        format=lambda record: _LOG + ("{exception}" if verbose else ""),
        colorize=lines.stream.isatty(),
        filter=lambda record: bool(
            record["extra"].get("waiting") or record["level"].no >= logger.level(level).no
        ),
    )
    if not verbose:
        _quiet_libraries()
        warnings.filterwarnings("ignore")


def _quiet_libraries() -> None:
    """Let these packages log errors alone; Lightning sets its own level where it is imported."""
    import logging

    for name in ("ray", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _trainrun(
    arguments: argparse.Namespace,
    lines: Lines,
    scaling: Scaling | None = None,
    saved: str | None = None,
) -> TrainRun:
    lines.wait(f"reading {arguments.trainrun}")
    from cuvis_dist.runs.configuration import read_configuration

    configuration = read_configuration(
        arguments.trainrun, arguments.override, arguments.output_dir, saved
    )
    lines.wait("loading cuvis.ai")
    if scaling is not None and not arguments.dry_run:
        from cuvis_dist.execution.importing import import_everywhere

        import_everywhere(scaling, arguments.verbose)
        lines.wait("loading cuvis.ai")
    from cuvis_dist.runs.trainrun import build_trainrun

    if not arguments.verbose:
        _quiet_libraries()
    lines.wait("building the pipeline")
    without = getattr(arguments, "without", ())
    trainrun = build_trainrun(configuration, arguments.plugins_dir, without)
    lines.wait("setting up the data")
    return trainrun


def _scaling(arguments: argparse.Namespace) -> Scaling:
    from cuvis_dist.scaling import Scaling

    options = {setting: getattr(arguments, option, None) for option, setting in _SHORT.items()}
    given = {setting: value for setting, value in options.items() if value is not None}
    return Scaling.load(arguments.scaling, arguments.settings, given)


def _run(arguments: argparse.Namespace, lines: Lines) -> int:
    scaling = _scaling(arguments)
    trainrun = _trainrun(arguments, lines, scaling)
    if arguments.dry_run:
        return _dry_run(trainrun, scaling, lines)
    _run_and_print(arguments, trainrun, scaling, lines)
    return 0


def _init(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.initialization.place import find

    scaling = _scaling(arguments)
    if arguments.compare:
        find(arguments.compare)
    trainrun = _trainrun(arguments, lines, scaling).initialization_only()
    other = None
    if arguments.compare:  # before this one, which may take its place
        from cuvis_dist.initialization.saved import read_initialization

        other = read_initialization(arguments.compare)
    if arguments.dry_run:
        return _dry_run(trainrun, scaling, lines)
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

    scaling = _scaling(arguments)
    if arguments.initialization:
        find(arguments.initialization)
    trainrun = _trainrun(arguments, lines, scaling).training_only(arguments.initialization)
    if arguments.dry_run:
        return _dry_run(trainrun, scaling, lines)
    _run_and_print(arguments, trainrun, scaling, lines)
    return 0


def _measure(arguments: argparse.Namespace, lines: Lines) -> int:
    scaling = _scaling(arguments)
    if scaling.measuring.store is None:
        raise InputError("measure fills a store: name it, as in --store FOLDER")
    trainrun = _trainrun(arguments, lines, scaling)
    from cuvis_dist.runs.measure import measure
    from cuvis_dist.runs.progress import ProgressLines

    record = measure(
        trainrun, arguments.split, scaling, ProgressLines(lines).measured, arguments.verbose
    )
    lines.settle()
    for reason in (record.skipped or {}).values():
        print(f"skipped  {reason}")
    print(f"{record.from_store:,} of {record.frames:,} frames from the store, {record.read:,} read")
    return 0


def _evaluate(arguments: argparse.Namespace, lines: Lines) -> int:
    scaling = _scaling(arguments)
    trainrun = _trainrun(arguments, lines, scaling, arguments.pipeline)
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
        _print_workers(
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
    scaling = _scaling(arguments)
    trainrun = _trainrun(arguments, lines, scaling, arguments.pipeline)
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
        _print_workers(scaling, scaling.resources.workers, scaling.measuring.gpus)
        print(f"result   {plan.folder.at(plan.files[0])}, ...")
        return 0
    record = scoring.run(ProgressLines(lines).scored, arguments.verbose, arguments.restart)
    lines.settle()
    print(f"frames   {record.frames}: {record.written} written, {record.there} before")
    for reason in (record.skipped or {}).values():
        print(f"skipped  {reason}")
    print(f"scores   {record.scores}")
    return 0


def _print_workers(scaling: Scaling, workers: int | None, gpus: float) -> None:
    on_gpus = f" and {gpus:g} GPUs" if gpus else ""
    each = f"{scaling.resources.cpus_per_worker:g} CPUs{on_gpus} each"
    there = f"{workers or 'one per CPU of the cluster'}, {each}"
    print(f"workers  {'none: in this process' if workers == 0 else there}")


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
    for line in record.sampled():
        print(f"sampled  {line}")
    print(f"pipeline {record.pipeline}")
    print(f"record   {record.output.at(record.file)}")
    for finding in record.findings:
        print(f"warning: {finding}")
    return record


def _dry_run(trainrun: TrainRun, scaling: Scaling, lines: Lines) -> int:
    from cuvis_dist.execution.asked import trains_here

    each = f"{scaling.resources.cpus_per_worker:g} CPUs each"
    if trainrun.weights is None:
        scaling = _print_plan(trainrun, scaling, lines)
        workers = scaling.resources.workers
        there = f"{workers or 'one per CPU of the cluster'} workers, {each}"
        print(f"phase 1  {'in this process' if workers == 0 else there}")
    else:
        lines.settle()
        print(f"phase 1  none: its result is that of {trainrun.weights}")
        _print_training(trainrun, trainrun.datamodule(scaling))
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


def _info(arguments: argparse.Namespace, lines: Lines) -> int:
    trainrun = _trainrun(arguments, lines)
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
    scaling = _scaling(arguments)
    _print_plan(_trainrun(arguments, lines), scaling, lines, arguments.calibrate)
    return 0


def _print_plan(
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
    print(f"{frames} frames in {plan.shards} shards, {frame / 1e6:.1f} MB a frame")
    for number, cost in enumerate(plan.costs, 1):
        memory = f"{cost.worker_bytes / 1e9:.2f} GB per worker"
        read = frames - cost.from_store
        print(f"pass {number}: reads {frame * read / 1e9:.3g} GB, {memory}, {cost.step}")
        if cost.from_store:
            print(f"  {cost.from_store:,} of {frames:,} frames from the store, {read:,} to read")
        for fit in cost.step.fits:
            again = f" (read again: {fit.again})" if fit.again else ""
            print(f"  {fit.node.name}: {fit}{again}")
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
        _print_training(trainrun, datamodule)
    return choice.scaling


def _print_training(trainrun: TrainRun, datamodule: LightningDataModule) -> None:
    from cuvis_dist.runs.description import foresee_nodes

    print("training step on several workers:")
    for name, words in foresee_nodes(trainrun, datamodule).items():
        print(f"  {name}: {words}")


def _submit(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.runs.submission import Submission, submit
    from cuvis_dist.storage import is_uri

    command = arguments.job[arguments.job[:1] == ["--"] :]
    job = _parser().parse_args(command)  # a wrong option is found here, not on the cluster
    if job.command is _submit:
        raise InputError("a job that submits a job would wait for itself")
    for name in ("trainrun", "pipeline", "scaling", "initialization", "compare"):
        path = getattr(job, name, None)
        if path and not is_uri(path):
            _check_uploaded(Path(path), arguments.working_dir)
            if name not in ("trainrun", "scaling"):
                _check_uploaded(Path(path).with_suffix(".pt"), arguments.working_dir)
    options = {"address": arguments.address} if arguments.address else {}
    submission = Submission(command, working_dir=arguments.working_dir, **options)
    print(submission.as_ray_command(), flush=True)

    def show(text: str) -> None:
        lines.settle()
        print(text, end="", flush=True)

    return submit(submission, not arguments.no_follow, show)


def _check_uploaded(path: Path, working_dir: Path | None) -> None:
    """Refuse a relative path that the job would not find."""
    if path.is_absolute():
        return
    if working_dir is None:
        raise InputError(
            f"{path} is relative to a folder that is not uploaded: give that folder "
            "(--working-dir .), or a path that the cluster knows"
        )
    if not (working_dir / path).is_file():
        raise InputError(f"{path} is not in {working_dir}, the folder that the job runs in")


def _demo_defaults() -> dict[str, int]:
    from dataclasses import asdict

    from cuvis_dist.demo import DemoSettings

    return asdict(DemoSettings())


def _demo(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.demo import DemoSettings, write_demo

    settings = DemoSettings(**{name: getattr(arguments, name) for name in _demo_defaults()})
    lines.wait(f"writing an archive to {arguments.folder}")
    trainrun = write_demo(arguments.folder, settings)
    lines.settle()
    size = f"{settings.height} x {settings.width} x {settings.bands}"
    print(f"archive  {settings.frames} frames of {size} in {trainrun.parent / 'archive'}")
    print(f"trainrun {trainrun}")
    for name in ("plugins_dir", "override"):
        setattr(arguments, name, [])
    arguments.trainrun, arguments.output_dir, arguments.dry_run = trainrun, None, False
    return _run(arguments, lines)


if __name__ == "__main__":
    sys.exit(main())
