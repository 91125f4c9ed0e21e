"""What stands out in a trainrun's archive, or has changed since? ``cuvis-dist audit``"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cuvis_dist.commands.options import (
    add_command,
    add_store,
    add_trainrun_options,
    scaling_of,
    trainrun_of,
)
from cuvis_dist.errors import DriftError, InputError
from cuvis_dist.runs.lines import Lines

if TYPE_CHECKING:
    from cuvis_dist.audit.audit import Audit
    from cuvis_dist.audit.drift import NodeDrift
    from cuvis_dist.audit.groups import Group
    from cuvis_dist.audit.stored import Stored
    from cuvis_dist.runs.trainrun import TrainRun
    from cuvis_dist.scaling import Scaling
    from cuvis_dist.storage import Location


def add(commands: Any) -> None:
    """Add ``audit``."""
    audit = add_command(
        commands, "audit", "print which recordings stand out from the rest, and why; reads no cube"
    )
    add_trainrun_options(audit)
    add_store(audit, "what it has of each frame is audited, and nothing added")
    audit.add_argument(
        "--scaling", metavar="FILE", help="YAML file of settings, as for the run that measured"
    )
    audit.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="PART.NAME=VALUE",
        help="any setting of it, e.g. measuring.pixels=unlabelled; repeatable",
    )
    audit.add_argument(
        "--by",
        default="recording",
        metavar="FIELD",
        help="recording (default), frame, or a column of the universe",
    )
    audit.add_argument(
        "--against",
        metavar="PIPELINE",
        help="a pipeline that init or run has saved: say how far the archive is from it",
    )
    audit.add_argument(
        "--max-drift",
        type=float,
        metavar="X",
        help="with --against: exit code 5 if a node's mean has drifted by a larger part of itself",
    )
    audit.add_argument("--json", action="store_true", help="print JSON instead of a table")
    audit.add_argument(
        "--report", metavar="FILE", help="write a page for people, too: FILE.html, or its URI"
    )
    audit.add_argument(
        "--data", action="store_true", help="with --report: the data of each plot as CSV beside it"
    )
    audit.set_defaults(command=_audit)


def _audit(arguments: argparse.Namespace, lines: Lines) -> int:
    most = arguments.max_drift
    if most is not None and not arguments.against:
        raise InputError("--max-drift needs a pipeline to compare with: --against PIPELINE")
    if most is not None and not (math.isfinite(most) and most >= 0):
        raise InputError(f"--max-drift is {most}: it must be 0 or a larger number")
    if arguments.data and not arguments.report:
        raise InputError("--data is the data of the plots on a page: name it, as in --report FILE")
    if arguments.report:
        from cuvis_dist.report.audit_page import page_at

        page_at(arguments.report)  # before anything is read
    scaling = scaling_of(arguments)
    if scaling.measuring.store is None:
        raise InputError("audit looks into a store: name it, as in --store FOLDER")
    trainrun = trainrun_of(arguments, lines)
    before = None
    if arguments.against:
        before = trainrun_of(arguments, lines, saved=arguments.against).pipeline
    lines.wait(f"reading {scaling.measuring.store}")
    stored = _stored(trainrun, scaling)
    from cuvis_dist.audit.audit import audit
    from cuvis_dist.audit.drift import drift
    from cuvis_dist.audit.groups import grouped
    from cuvis_dist.audit.outliers import Outliers, outliers
    from cuvis_dist.audit.table import as_json, as_text, drift_text

    lines.wait(f"comparing {len(stored.frames)} frames")
    found = audit(stored.frames, arguments.by, stored.wavelengths)
    groups = grouped(stored.frames, arguments.by)
    foreign = outliers(stored, {frame.uid: g.name for g in groups for frame in g.frames})
    drifts, why_not = drift(stored, before, groups) if before else ([], {})
    if before:
        from cuvis_dist.audit.later import later_drift

        lines.wait("fitting later nodes again")
        later, further = later_drift(stored, before)
        drifts, why_not = drifts + later, why_not | further
        if not drifts:
            reasons = "; ".join(f"{name}: {why}" for name, why in why_not.items())
            raise InputError(
                f"no node of {arguments.against} can be compared with what the store has: {reasons}"
            )
    place = None
    if arguments.report:
        lines.wait("drawing the report")
        facts = {"name": trainrun.config.name, "store": str(scaling.measuring.store)}
        facts["pixels outside"] = foreign if isinstance(foreign, str) else foreign.summary
        place = _report(arguments, facts, stored, groups, found, drifts)
    lines.settle()
    if arguments.json:
        said = asdict(foreign) if isinstance(foreign, Outliers) else {"unknown": foreign}
        print(json.dumps(as_json(found, drifts, why_not) | {"outside_of_bulk": said}, indent=2))
    else:
        pixels = sum(row.pixels for row in found.rows)
        print(
            f"{len(stored.frames):,} frame{'s' * (len(stored.frames) > 1)}, {pixels:,} pixels at "
            f"{stored.source} from {scaling.measuring.store}"
        )
        if stored.missing:
            print(f"{stored.missing:,} frames of the train split are not in it (measure adds them)")
        told = [f"outside  of the bulk of pixels is not known: {foreign}"]
        if isinstance(foreign, Outliers):
            told = foreign.lines()
        print(*as_text(found), *told, *drift_text(drifts, why_not), sep="\n")
        if place is not None:
            print(f"report   {place}")
    largest = max(drifts, key=lambda each: each.surely, default=None)
    if most is not None and largest is not None and largest.surely > most:
        raise DriftError(
            f"the {largest.of} of {largest.node} has drifted by {largest.ratio:.4g} of itself "
            f"since {arguments.against}, and {most:g} is allowed (--max-drift): look at the "
            "recordings that stand out, or initialize again"
        )
    return 0


def _report(
    arguments: argparse.Namespace,
    facts: dict[str, str],
    stored: Stored,
    groups: list[Group],
    found: Audit,
    drifts: list[NodeDrift],
) -> Location:
    """Write the page about an audit."""
    from cuvis_dist.report.audit_page import write_audit
    from cuvis_dist.report.audited import Audited

    facts |= {
        "trainrun": str(arguments.trainrun),
        "frames": f"{len(stored.frames):,}",
        "pixels": f"{sum(row.pixels for row in found.rows):,}",
        "groups": f"{len(found.rows):,}, by {found.by}",
        "values": stored.source,
    }
    if arguments.against:
        facts["against"] = str(arguments.against)
    remarks = []
    if stored.missing:
        remarks.append(
            f"{stored.missing:,} frames of the train split are not in the store, and not on this "
            "page: cuvis-dist measure adds them."
        )
    by_name = {group.name: group for group in groups}
    audited = Audited(
        found, by_name, stored.wavelengths, facts, remarks, drifts, arguments.max_drift
    )
    return write_audit(audited, arguments.report, arguments.data)


def _stored(trainrun: TrainRun, scaling: Scaling) -> Stored:
    """Return what the store knows of the train split."""
    from cuvis_dist.archive import open_archive
    from cuvis_dist.audit.stored import read_store
    from cuvis_dist.store import UnusableFileError

    datamodule, measuring = trainrun.datamodule(scaling), scaling.measuring
    archive = open_archive(datamodule, "train").sampled(
        measuring.sample_frames, measuring.sample_fraction, measuring.sample_seed
    )
    while True:
        try:
            return read_store(trainrun.pipeline, datamodule, archive, measuring, _fields(trainrun))
        except UnusableFileError:  # set aside or gone, and said: go on with the others
            continue


def _fields(trainrun: TrainRun) -> dict[str, dict[str, str]]:
    """Return the rows of the universe by the uid of the frame; none where there is no such file."""
    from cuvis_dist.universe import MODULES, read_universe

    data = trainrun.config.data
    place = (data.params or {}).get("universe_csv")
    if data.data_module not in MODULES or not place:
        return {}
    path = Path(str(place)).resolve()  # as upstream reads it
    if not path.is_file():
        return {}
    _, rows = read_universe(path.read_bytes(), str(path), data.data_module)
    return {f"{row['source']}#{row['index']}": {k: str(v) for k, v in row.items()} for row in rows}
