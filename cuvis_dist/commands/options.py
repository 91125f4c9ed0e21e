"""Which options do several commands share, and what do they stand for?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cuvis_dist.runs.lines import Lines

if TYPE_CHECKING:
    from cuvis_dist.runs.trainrun import TrainRun
    from cuvis_dist.scaling import Scaling

#: Options that stand for a setting, by the name that argparse gives them.
_SHORT = {
    "address": "resources.address",
    "workers": "resources.workers",
    "train_workers": "resources.train_workers",
    "train_gpus": "resources.train_gpus",
    "fold": "measuring.fold",
    "store": "measuring.store",
    "robust": "measuring.robust",
    "robust_pixels": "measuring.robust_pixels",
    "verify": "reading.verify",
}


def add_command(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    """Add a command, whose own help begins with what the list of commands says of it."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=f"{text[0].upper()}{text[1:]}."
    )
    return parser


def add_trainrun_options(parser: argparse.ArgumentParser) -> None:
    """Add what says which trainrun is meant, with ``restore-trainrun``'s spellings."""
    parser.add_argument("trainrun", metavar="TRAINRUN", help="trainrun YAML, flat or with defaults")
    _add_trainrun_settings(parser)


def add_saved_options(
    parser: argparse.ArgumentParser, splits: tuple[str, ...], default: str
) -> None:
    """Add what says which saved pipeline is applied to which split of which data."""
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
        help="another value of the trainrun, e.g. data.batch_size=16; repeatable",
    )
    parser.add_argument(
        "--output-dir",
        metavar="DIR",
        help="instead of the trainrun's output_dir: a folder, or a URI such as s3://bucket/run",
    )
    add_verbose(parser)


def add_scaling_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how many workers run, and where."""
    parser.add_argument(
        "--scaling", metavar="FILE", help="YAML file of settings: resources, measuring, reading"
    )
    parser.add_argument(
        "--address", metavar="A", help="Ray cluster to join; default: RAY_ADDRESS, or none"
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="workers that measure, evaluate and score; 0: this process; default: what is sooner",
    )
    parser.add_argument(
        "--train-workers", type=int, metavar="M", help="DDP workers of phase 2; 0: this process"
    )
    parser.add_argument(
        "--train-gpus", type=float, metavar="G", help="GPUs of each DDP worker; default: 0"
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
        add_verbose(parser)


def add_fold(parser: argparse.ArgumentParser) -> None:
    """Add what says how phase 1 comes by the statistics of ports behind affine nodes."""
    parser.add_argument(
        "--fold",
        action=argparse.BooleanOptionalAction,
        help="derive what affine nodes separate instead of reading the archive again (default)",
    )


def add_store(
    parser: argparse.ArgumentParser,
    text: str = "take from there what was measured of each frame, and add to it",
) -> None:
    """Add what says where statistics of frames are kept."""
    parser.add_argument("--store", metavar="S", help=f"a store's folder or URI: {text}")


def add_restart(parser: argparse.ArgumentParser) -> None:
    """Add what leaves an earlier try unused."""
    parser.add_argument(
        "--restart",
        action="store_true",
        help="run from the beginning, whatever an earlier run of the same trainrun left",
    )


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add what shows logs."""
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="show Ray's and cuvis.ai's logs"
    )


def add_without(parser: argparse.ArgumentParser) -> None:
    """Add what leaves recordings out of the train split."""
    parser.add_argument(
        "--without",
        action="append",
        default=[],
        metavar="RECORDING",
        help="leave a recording out of the train split: its name, or a glob; repeatable",
    )


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Add what only looks."""
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print what it would do and the resources it would ask for; starts no Ray",
    )


def trainrun_of(
    arguments: argparse.Namespace,
    lines: Lines,
    scaling: Scaling | None = None,
    saved: str | None = None,
) -> TrainRun:
    """Return the trainrun that is meant; workers import meanwhile what ``scaling`` asks for.

    Raises
    ------
    InputError
        If it cannot be run.
    """
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
        quiet_libraries()
    lines.wait("building the pipeline")
    without = getattr(arguments, "without", ())
    trainrun = build_trainrun(configuration, arguments.plugins_dir, without)
    lines.wait("setting up the data")
    return trainrun


def scaling_of(arguments: argparse.Namespace) -> Scaling:
    """Return the settings; options win over ``--set``, and these over the scaling file."""
    from cuvis_dist.scaling import Scaling

    options = {setting: getattr(arguments, option, None) for option, setting in _SHORT.items()}
    given = {setting: value for setting, value in options.items() if value is not None}
    return Scaling.load(arguments.scaling, arguments.settings, given)


def quiet_libraries() -> None:
    """Let these packages log errors alone; Lightning sets its own level where it is imported."""
    import logging

    for name in ("ray", "pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
