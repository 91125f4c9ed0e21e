"""What was run on what, how did it end, and how does it differ from another run?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from cuvis_dist.report.kept import SPLITS, Kept
from cuvis_dist.report.plot import duration, number, several
from cuvis_dist.report.section import Section, Table, label, which
from cuvis_dist.scaling import Scaling

#: Settings that differ between any two runs, and say nothing.
_ALWAYS_OTHERS = ("started", "finished", "seconds", "output_dir", "report", "pipeline")


def overview(runs: Sequence[Kept]) -> Section:
    """Show what was run, on what, with which result."""
    section = Section("overview", "What was run")
    names = [f"{which(kept, runs)}: {kept.name}" if len(runs) > 1 else "" for kept in runs]
    facts = [dict(_facts(kept)) for kept in runs]
    keys = list(dict.fromkeys(key for each in facts for key in each))
    rows = [[key, *(each.get(key, "-") for each in facts)] for key in keys]
    section.tables.append(Table("The run" if len(runs) == 1 else "The runs", ("", *names), rows))
    section.tables += _metrics(runs)
    if len(runs) > 1:
        section.tables.append(_differences(runs))
    return section


def _facts(kept: Kept) -> Iterator[tuple[str, str]]:
    record = kept.record
    yield "job", f"{record.get('job', '?')}, {_ending(record)}"
    yield "trainrun", f"{record.get('name', '')} ({record['trainrun']})"
    if record.get("weights"):
        yield "began with", str(record["weights"])
    if record.get("pipeline"):
        yield "pipeline", str(record["pipeline"])
    yield "output folder", kept.place
    yield "started", _when(record.get("started"))
    if (spent := _seconds(record)) is not None:
        yield "took", duration(spent) if spent >= 100 else f"{spent:.0f} s"
    if passes := record.get("passes"):
        pixels = [fit["pixels"] for each in passes for fit in each["nodes"].values()]
        known = [n for n in pixels if n is not None]
        what = several(max(each["frames"] for each in passes), "frame")
        what += f", {several(max(known), 'pixel')}" if known else ""
        yield "phase 1 on", what
        read = sum(each["bytes"] for each in passes)
        yield "read for it", f"{_size(read)} in {several(len(passes), 'pass')}"
    for port in kept.measured.get("ports", [])[:1]:
        if port["recordings"]:
            yield "recordings", number(len(port["recordings"]))
    yield "bands", _bands(kept)
    for split in SPLITS:
        if part := kept.seen.get(split):
            marked = (
                "annotated"
                if kept.has_anomalies(split)
                else "no pixel is annotated as an anomaly: metrics of it say nothing"
                if part["annotated"]
                else "without annotation"
            )
            yield split, f"{several(part['frames'], 'frame')}, {marked}"
    if record.get("epochs"):
        yield "phase 2", several(record["epochs"], "epoch")
    yield from _calibration(record)
    if chosen := _settings(record):
        yield "settings", ", ".join(f"{name} {value}" for name, value in chosen.items())
    if versions := record.get("versions"):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())


def _bands(kept: Kept) -> str:
    nm = kept.wavelengths
    if nm is None:
        return "their wavelengths are not known"
    low, high = (number(float(f(nm))) for f in (np.nanmin, np.nanmax))
    there = f"{number(len(nm))}, {low} to {high} nm" if low != high else f"{len(nm)}, at {low} nm"
    in_order = kept.axis(len(nm))[1] != "band"
    return there if in_order else f"{there}, not in ascending order: plots have their numbers"


def _settings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not as they are by default."""
    default = Scaling().model_dump(mode="json")
    return {
        name: value
        for part, values in record.get("scaling", {}).items()
        for name, value in values.items()
        if value != default.get(part, {}).get(name)
    }


def _size(count: int) -> str:
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _ending(record: Mapping[str, Any]) -> str:
    words = str(record.get("status", "?"))
    return f"{words}: {record['error']}" if record.get("error") else words


def _when(text: Any) -> str:
    try:
        return datetime.fromisoformat(str(text)).strftime("%Y-%m-%d %H:%M:%S UTC")
    except ValueError:
        return "?"


def _seconds(record: Mapping[str, Any]) -> float | None:
    try:
        ended, began = (datetime.fromisoformat(record[k]) for k in ("finished", "started"))
    except (KeyError, TypeError, ValueError):
        return None
    return (ended - began).total_seconds()


def _calibration(record: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    calibration = record.get("calibration") or {}
    if calibration.get("reason"):
        yield "thresholds", f"not calibrated: {calibration['reason']}"
    reports = calibration.get("reports") or {}
    for node, report in reports.items():
        threshold = report.get("threshold") if isinstance(report, dict) else None
        if isinstance(threshold, dict) and "new" in threshold:
            old, new = (threshold.get(key) for key in ("old", "new"))
            said = f"{number(new, 7)}, calibrated on val ({number(old)} before)"
            yield f"threshold of {node}", said


def _metrics(runs: Sequence[Kept]) -> list[Table]:
    columns, values = [""], []
    for kept in runs:
        for split, found in kept.record.get("metrics", {}).items():
            columns.append(f"{split}{label(kept, runs)}")
            values.append(found)
    names = list(dict.fromkeys(name for found in values for name in found))
    if not names:
        return []
    rows = [
        [name, *(f"{found[name]:z.4f}" if name in found else "-" for found in values)]
        for name in names
    ]
    return [Table("Metrics", columns, rows, numbers=True)]


def _differences(runs: Sequence[Kept]) -> Table:
    """Return what the records of two runs say that is not the same: settings and versions."""
    first, second = (
        dict(_flat({k: kept.record.get(k) for k in ("scaling", "versions", "job", "trainrun")}))
        for kept in runs[:2]
    )
    keys = [k for k in dict.fromkeys([*first, *second]) if first.get(k) != second.get(k)]
    rows = [[key, str(first.get(key, "-")), str(second.get(key, "-"))] for key in keys]
    initialized = [kept.record.get("initialized", "")[:12] for kept in runs[:2]]
    same = "the same" if initialized[0] == initialized[1] else "not the same"
    rows.append([f"state after phase 1 ({same})", *initialized])
    return Table(
        "What differs in settings and versions",
        ("", *(which(kept, runs) for kept in runs[:2])),
        rows,
    )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in _ALWAYS_OTHERS:
                yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def findings(runs: Sequence[Kept]) -> list[tuple[str, str, str]]:
    """Return what looks bad about each fit: the node, the message and the section that shows it."""
    found = []
    for kept in runs:
        of = label(kept, runs)
        kinds = {e["node"]: e["kind"] for e in kept.nodes.get("initialized", [])}
        for each in kept.record.get("findings", []):
            anchor = _SHOWN_IN.get(kinds.get(each["node"], ""), "spectra")
            if "score" in each["message"] and each["node"] not in kinds:
                anchor = "scores"
            found.append((each["node"] + of, each["message"], anchor))
        for split, part in kept.seen.items():
            if unknown := part.get("unknown"):
                said = f"{several(unknown, 'pixel')} of {split} have no finite score"
                found.append((f"scores{of}", said, "scores"))
    return found


_SHOWN_IN = {"gaussian": "correlation", "weights": "selection", "loadings": "components"}
