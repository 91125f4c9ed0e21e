"""How did the run go: learning curves, where the time went, what was skipped or done again?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from cuvis_dist.report.kept import Kept
from cuvis_dist.report.plot import (
    BLUE,
    COLOURS,
    GREEN,
    GREY,
    LINES,
    ORANGE,
    PURPLE,
    VERMILLION,
    Plot,
    drawing,
    duration,
    literal,
    marker_of,
    number,
    several,
)
from cuvis_dist.report.section import Section, Table, label

#: Metrics that are drawn at most, beside the losses.
_METRICS = 4
#: Endings of metrics that are drawn rather than others.
_FIRST = ("/average_precision", "/f1_score", "/iou")
#: Rows of a table of skipped frames.
_LISTED = 20


# ---- learning ----------------------------------------------------------------------------


def learning(runs: Sequence[Kept]) -> Section:
    """Show losses and metrics per epoch, and which epoch was restored."""
    section = Section("learning", "Learning curves")
    for losses in (True, False):
        found = [(kept, _epochs(kept), LINES[i]) for i, kept in enumerate(runs)]
        plot = _curves([each for each in found if each[1]], losses, runs)
        if plot is not None:
            section.plots.append(plot)
    for kept in runs:
        if said := _restored(kept):
            section.said.append(said + f"{label(kept, runs)}.")
    calibrated = any((kept.record.get("calibration") or {}).get("reports") for kept in runs)
    if calibrated and any(plot.name == "metrics" for plot in section.plots):
        section.said.append(
            "Deciders were calibrated after training: metrics of decisions are those of the "
            "threshold before, unlike in the table above."
        )
    if not section.plots:
        section.missing = (
            "There was no gradient training: the pipeline is as phase 1 left it."
            if not any(kept.record.get("epochs") for kept in runs)
            else "The epochs of this training were not noted."
        )
    return section


def _epochs(kept: Kept) -> dict[int, dict[str, float]]:
    """Return the values of each epoch that was noted, by its number from 0, as Lightning counts."""
    return {
        note["epoch"] - 1: note["metrics"]
        for note in kept.diary
        if note["hook"] == "epoch_end" and "metrics" in note and "epoch" in note
    }


def _restored(kept: Kept) -> str:
    checkpoint = kept.record.get("checkpoint")
    if not checkpoint:
        return ""
    if not checkpoint.get("restored"):
        return f"The last epoch's weights are used ({checkpoint.get('reason') or 'none is best'})"
    score = checkpoint.get("score")
    value = f" with {checkpoint['monitor']} {number(score)}" if score is not None else ""
    return f"Epoch {checkpoint['epoch']} (counted from 0){value} was restored"


_Noted = list[tuple[Kept, dict[int, dict[str, float]], str]]


def _unlike(losses: list[str], found: _Noted) -> list[str]:
    """Return losses without those that say the same: the total of one loss is that loss."""
    said: dict[tuple[float | None, ...], str] = {}
    for name in sorted(losses, key=lambda n: "/" in n):
        said.setdefault(tuple(v.get(name) for _, e, _ in found for v in e.values()), name)
    return [name for name in losses if name in said.values()]


def _curves(found: _Noted, losses: bool, runs: Sequence[Kept]) -> Plot | None:
    names = list(dict.fromkeys(n for _, e, _ in found for values in e.values() for n in values))
    names = [n for n in names if losses or not n.startswith(("train", "val", "lr-"))]
    chosen = [n for n in names if ("loss" in n) == losses]
    if losses:
        chosen = _unlike(chosen, found)
    else:
        best = (found[0][0].record.get("checkpoint") or {}).get("monitor") if found else None
        chosen.sort(key=lambda n: (n != best, not n.endswith(_FIRST)))
        chosen = chosen[:_METRICS]
    if not chosen:
        return None
    what = "losses" if losses else "metrics on val"
    ends = [
        f"{n} {number(e[min(e)].get(n, np.nan))} to {number(e[max(e)].get(n, np.nan))}"
        for _, e, _ in found[:1]
        for n in chosen
    ]
    marked = any((k.record.get("checkpoint") or {}).get("restored") for k, _, _ in found)
    restored = "; the vertical line is the epoch that was restored" if marked else ""
    plot = Plot(
        "losses" if losses else "metrics",
        f"{what.capitalize()} per epoch: {'; '.join(ends)}.",
        f"{what.capitalize()} per epoch{restored}.",
    )
    epochs = sorted({number for _, e, _ in found for number in e})
    plot.columns = {"epoch": np.array(epochs)} | {
        f"{n}{label(kept, runs)}": np.array([e.get(i, {}).get(n, np.nan) for i in epochs])
        for kept, e, _ in found
        for n in chosen
    }
    with drawing(plot) as figure:
        axes = figure.subplots()
        for kept, values, line in found:
            for n, colour in zip(chosen, COLOURS, strict=False):
                x = [i for i in sorted(values) if n in values[i]]
                y = [values[i][n] for i in x]
                name = f"{n}{label(kept, runs)}"
                axes.plot(x, y, line, color=colour, **marker_of(len(x)), label=literal(name))
            checkpoint = kept.record.get("checkpoint") or {}
            if checkpoint.get("restored"):
                axes.axvline(checkpoint["epoch"], color=GREY, ls=":", label="restored epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        ylabel = "loss" if losses else "value"
        axes.set(xlabel="epoch, counted from 0", ylabel=ylabel, title=what)
    return plot


# ---- time --------------------------------------------------------------------------------


def time(runs: Sequence[Kept]) -> Section:
    """Show where the time went."""
    section = Section("time", "Time")
    for kept in runs:
        bars = sorted(_bars(kept), key=lambda bar: bar[2])
        if bars:
            section.plots.append(_timeline(kept, bars, runs))
        seconds = kept.record.get("seconds", {})
        rows = [[_PHASES.get(n, n), duration(s)] for n, s in seconds.items() if n != "report"]
        for i, each in enumerate(kept.record.get("passes", []), 1):
            rows.append([f"reading and measuring of {_pass(i, each)}", duration(each["seconds"])])
        if rows:
            title = f"Wall-clock time{label(kept, runs)}"
            section.tables.append(Table(title, ("what", "time"), rows, numbers=True))
    if not section.plots and not section.tables:
        section.missing = "No times were noted."
    return section


_PHASES = {
    "start": "start",
    "initialization": "phase 1",
    "training": "phase 2, with calibration and evaluation",
    "evaluation": "calibration and evaluation",
}
_KINDS = {"phase 1": BLUE, "epochs": GREEN, "calibration": ORANGE, "evaluation": PURPLE}


def _pass(index: int, each: dict[str, Any]) -> str:
    """Return what a pass is called: its number and the nodes that it fits."""
    names = list(each["nodes"])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"pass {index}: {', '.join(names[:3])}{more}"


def _bars(kept: Kept) -> Iterator[tuple[str, str, float, float]]:
    """Yield kind, name, beginning and end of each step of this try; of a pass once."""
    passes = {
        node: _pass(i, each)
        for i, each in enumerate(kept.record.get("passes", []), 1)
        for node in each["nodes"]
    }
    open_: dict[tuple[str, Any], float] = {}
    spans: dict[tuple[str, str], tuple[float, float]] = {}
    for note in kept.diary:
        hook, _, end = note["hook"].rpartition("_")
        if note.get("earlier") or end not in ("start", "end"):
            continue
        key = (hook, note.get("node") or note.get("split") or note.get("epoch"))
        if end == "start":
            open_.setdefault(key, note["at"])
        elif key in open_:
            kind, name = _named(hook, key[1])
            start, stop = open_.pop(key), note["at"]
            if kind != "phase 1":
                yield kind, name, start, stop
                continue
            lane = kind, passes.get(name, name)
            first, last = spans.get(lane, (start, stop))
            spans[lane] = min(first, start), max(last, stop)
    for (kind, name), span in spans.items():
        yield kind, name, *span


def _named(hook: str, what: Any) -> tuple[str, str]:
    if hook == "statistical_node":
        return "phase 1", str(what)
    if hook == "epoch":
        return "epochs", "training"
    return hook, hook if hook == "calibration" else f"evaluation of {what}"


def _timeline(kept: Kept, bars: list[tuple[str, str, float, float]], runs: Sequence[Kept]) -> Plot:
    lanes = list(dict.fromkeys(name for _, name, _, _ in bars))
    total = max(end for *_, end in bars)
    plot = Plot(
        "timeline" if kept is runs[0] else "timeline-other",
        f"Timeline of {duration(total)}{label(kept, runs)}: "
        + "; ".join(f"{lane} {duration(_spent(bars, lane))}" for lane in lanes)
        + ".",
        "From the start of the run on. An epoch is a bar; where there is no bar, programs were "
        f"loaded, workers started, the fit judged or results saved{label(kept, runs)}.",
        {
            "kind": [bar[0] for bar in bars],
            "name": [bar[1] for bar in bars],
            "start": [bar[2] for bar in bars],
            "end": [bar[3] for bar in bars],
        },
        wide=True,
    )
    with drawing(
        plot, (11.4, 0.9 + 0.28 * len(lanes)), pixels=len(bars) > 500, fitted=True
    ) as figure:
        axes = figure.subplots()
        axes.grid(axis="y", visible=False)
        for lane, name in enumerate(lanes):
            spans = [(b[2], max(b[3] - b[2], total / 500)) for b in bars if b[1] == name]
            (kind,) = {bar[0] for bar in bars if bar[1] == name}
            colour = _KINDS.get(kind, VERMILLION)
            axes.broken_barh(
                spans, (lane - 0.31, 0.62), facecolor=colour, edgecolor="white", lw=0.4
            )
        axes.set_yticks(range(len(lanes)), [literal(lane) for lane in lanes])
        axes.invert_yaxis()
        axes.set(xlabel="seconds", xlim=(0, total * 1.01))
    return plot


def _spent(bars: list[tuple[str, str, float, float]], lane: str) -> float:
    return sum(end - start for _, name, start, end in bars if name == lane)


# ---- what did not go well ----------------------------------------------------------------


def trouble(runs: Sequence[Kept]) -> Section:
    """Show what was skipped, restored or done again."""
    section = Section("trouble", "Skipped and repeated work")
    for kept in runs:
        for name, why in (
            ("skipped_frames", "left out of phase 1, since they could not be used"),
            ("left_out", "left out of phase 1, as they are far from the bulk"),
        ):
            if out := kept.record.get(name):
                more = f", the first {_LISTED}" if len(out) > _LISTED else ""
                title = f"{several(len(out), 'frame')} {why}{more}{label(kept, runs)}"
                rows = [[uid, reason] for uid, reason in list(out.items())[:_LISTED]]
                section.tables.append(Table(title, ("frame", "why"), rows))
        if without := kept.record.get("without"):
            section.said.append(
                f"Recordings that were left out as asked{label(kept, runs)}: {', '.join(without)}."
            )
        for i, each in enumerate(kept.record.get("passes", []), 1):
            section.said += [f"{said}{label(kept, runs)}." for said in _again(i, each)]
    if not section.tables and not section.said:
        section.missing = "Nothing was skipped, restored from an earlier try or done again."
    return section


def _again(number_: int, each: dict[str, Any]) -> Iterator[str]:
    if stored := each.get("from_store"):
        yield f"Pass {number_}: {number(stored)} frames were not read, but taken from a store"
    if restored := each.get("restored_frames"):
        yield f"Pass {number_}: {number(restored)} frames were measured by an earlier try"
    if repeated := each.get("repeated"):
        yield (
            f"Pass {number_}: {number(len(repeated))} of {number(each['shards'])} shards were run "
            "again, since a worker was lost or could not read them"
        )
