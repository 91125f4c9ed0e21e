"""What does a person ask of a store, and what is the answer? ``measure`` and ``store ...``"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cuvis_dist.commands.options import (
    add_command,
    add_dry_run,
    add_fold,
    add_scaling_options,
    add_store,
    add_trainrun_options,
    add_verbose,
    scaling_of,
    trainrun_of,
)
from cuvis_dist.errors import DataError, InputError
from cuvis_dist.runs.lines import Lines

if TYPE_CHECKING:
    from cuvis_dist.store import Store

#: Frames that ``verify`` measures again, by default.
_FRAMES = 3


def add(commands: Any) -> None:
    """Add ``measure``, and ``store list``, ``show``, ``verify`` and ``prune``."""
    measure = add_command(
        commands, "measure", "measure the frames of a split that a store lacks; fit nothing"
    )
    add_trainrun_options(measure)
    measure.add_argument(
        "--split",
        choices=("train", "predict"),
        default="train",
        help="default: train; predict: all frames",
    )
    add_scaling_options(measure)
    add_fold(measure)
    add_store(measure, "what is filled; needed, here or as measuring.store")
    add_dry_run(measure)
    measure.set_defaults(command=_measure)

    store = add_command(commands, "store", "list, show, verify or prune what a store has")
    asked = store.add_subparsers(required=True, metavar="WHAT")
    every = {
        "list": (_list, "print what was measured, of how many frames"),
        "show": (_show, "print what there is of each recording"),
        "verify": (_verify, "check every file, and a few frames against the archive"),
        "prune": (_prune, "remove what no frame has any more, and join small files"),
    }
    for name, (command, text) in every.items():
        parser = add_command(asked, name, text)
        parser.add_argument("store", metavar="S", help="the store's folder or URI")
        add_verbose(parser)
        parser.set_defaults(command=command)
        if name == "show":
            parser.add_argument(
                "recording", nargs="?", metavar="RECORDING", help="a recording or glob: its frames"
            )
        if name == "verify":
            parser.add_argument(
                "--data",
                dest="trainrun",
                metavar="TRAINRUN",
                help="measure a few frames of its train split again, and compare",
            )
            parser.add_argument(
                "--frames",
                type=int,
                default=_FRAMES,
                metavar="N",
                help="with --data: how many; default: %(default)s",
            )
            for option, dest, form in (
                ("--plugins-dir", "plugins_dir", "DIR"),
                ("--override", "override", "KEY=VALUE"),
                ("--set", "settings", "PART.NAME=VALUE"),
            ):
                parser.add_argument(
                    option,
                    dest=dest,
                    action="append",
                    default=[],
                    metavar=form,
                    help="as for measure, when these frames were measured; repeatable",
                )
        if name == "prune":
            parser.add_argument(
                "--dry-run", action="store_true", help="only say what would be removed"
            )


def _measure(arguments: argparse.Namespace, lines: Lines) -> int:
    scaling = scaling_of(arguments)
    if scaling.measuring.store is None:
        raise InputError("measure fills a store: name it, as in --store FOLDER")
    trainrun = trainrun_of(arguments, lines, scaling)
    from cuvis_dist.runs.measure import look, measure
    from cuvis_dist.runs.progress import ProgressLines

    split = arguments.split
    if arguments.dry_run:
        archive, _, stored = look(trainrun, split, scaling)
        missing = len(stored.missing())
        lines.settle()
        there = len(archive) - missing
        print(f"{there:,} of {len(archive):,} frames from the store, {missing:,} to read")
        return 0
    record = measure(trainrun, split, scaling, ProgressLines(lines).measured, arguments.verbose)
    lines.settle()
    for reason in (record.skipped or {}).values():
        print(f"skipped  {reason}")
    print(f"{record.from_store:,} of {record.frames:,} frames from the store, {record.read:,} read")
    return 0


def _opened(arguments: argparse.Namespace, lines: Lines) -> Store:
    """Return the store; raises InputError if there is none."""
    lines.wait(f"reading {arguments.store}")
    from cuvis_dist.store import Store

    store = Store(arguments.store)
    if not store.folder.names():
        raise InputError(f"there is no store at {store}, or it is empty")
    return store


def _list(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.store.upkeep import kinds

    found = kinds(_opened(arguments, lines))
    lines.settle()
    for kind in found:
        files = "file" if kind.files == 1 else "files"
        size = f"{kind.bytes / 1e6:,.1f} MB in {kind.files} {files}"
        print(f"{kind.measured}: {kind.frames:,} frames, {size}")
        print(f"  read by {kind.data_module}, last written {kind.written}, folder {kind.key}")
    return 0


def _show(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.runs.leaving_out import is_called, some_of
    from cuvis_dist.store.upkeep import recordings

    found, wanted = recordings(_opened(arguments, lines)), arguments.recording
    lines.settle()
    names = [name for name in found if wanted is None or is_called(name, wanted)]
    if not names:
        raise InputError(f"the store has no recording {wanted}: it has {some_of(found)}")
    for name in names:
        measured = ", ".join(f"{what} {len(uids)}" for what, uids in sorted(found[name].items()))
        print(f"{name}: {len(set().union(*found[name].values()))} frames ({measured})")
        if wanted is not None:
            for uid in sorted(set().union(*found[name].values())):
                print(f"  {uid}")
    return 0


def _verify(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.store.upkeep import damaged

    store = _opened(arguments, lines)
    lines.wait("checking every file against its manifest")
    wrong, files = damaged(store), len(store.files())
    lines.settle()
    print(f"{files - len(wrong)} of {files} files are as their manifests say")
    for each in wrong:
        print(f"damaged  {each}")
    if arguments.trainrun:
        if arguments.frames < 1:
            raise InputError(f"--frames is {arguments.frames}; the least is 1")
        lines.wait(f"reading {arguments.trainrun}")
        from cuvis_dist.runs.measure import differing
        from cuvis_dist.runs.trainrun import load_trainrun

        trainrun = load_trainrun(arguments.trainrun, arguments.override, arguments.plugins_dir)
        from cuvis_dist.scaling import Scaling

        scaling = Scaling.load(None, arguments.settings, {"measuring.store": str(store)})
        checked, differ = differing(trainrun, scaling, arguments.frames)
        lines.settle()
        print(f"{len(checked) - len(differ)} of {len(checked)} frames measure as they did")
        for frame, what in differ.items():
            print(f"differs  {what} of {frame}")
        wrong += differ
    if wrong:
        raise DataError(
            f"{store} is not sound: a run that uses it sets damaged files aside and measures "
            "their frames again; remove the files that differ, or begin a new store"
        )
    return 0


def _prune(arguments: argparse.Namespace, lines: Lines) -> int:
    from cuvis_dist.runs.leaving_out import some_of
    from cuvis_dist.store.upkeep import prune

    store = _opened(arguments, lines)
    lines.wait("looking for frames that are gone or have changed")
    found = prune(store, arguments.dry_run)
    lines.settle()
    would = "would be " if arguments.dry_run else ""
    for recording, uids in sorted(found.stale.items()):
        print(f"{recording}: {len(uids)} frames are gone or have changed")
    if found.hidden:
        names = some_of(sorted(found.hidden))
        print(f"kept     files that cannot be seen from here, nor their folders: {names}")
    gone = sum(map(len, found.stale.values()))
    print(
        f"{gone} frames {would}removed, {found.again} rows that were measured again, and "
        f"{len(found.rubbish)} files that do not count; {found.rows} rows stay"
    )
    return 0
