"""What changed between two initializations, and by how much?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from cuvis_ai_core.node.node import Node
from torch import Tensor

from cuvis_dist.archive.contents import Stamp
from cuvis_dist.initialization.card import Card, Initialization, UsedFrame, UsedFrames
from cuvis_dist.initialization.matching import structural_changes
from cuvis_dist.nodes.catalogue import yardsticks_of

#: So many recordings, frames, or what else there is a long list of, are named in a line.
_NAMED = 3


@dataclass(frozen=True)
class BufferChange:
    """By how much a buffer or parameter changed.

    Attributes
    ----------
    name : str
        ``<node>.<buffer>``.
    largest : float
        The largest absolute difference of an entry.
    relative : float
        That by the largest absolute value that there was.
    drift : float
        The mean absolute difference by the mean absolute value that there was: the drift ratio of
        the two-phase guide.
    entry : tuple of int
        Where the change is largest, in units where there are some.
    units : float or None
        That change in a unit that a person can judge.
    unit : str
        What the unit is: see :mod:`cuvis_dist.nodes.yardsticks`.
    other : str
        What changed otherwise: the shape, or that it is new or gone. The numbers are infinite then.
    """

    name: str
    largest: float = torch.inf
    relative: float = torch.inf
    drift: float = torch.inf
    entry: tuple[int, ...] = ()
    units: float | None = None
    unit: str = ""
    other: str = ""

    @property
    def size(self) -> float:
        """What changes are sorted by: the units where there are some, else relative."""
        return self.relative if self.units is None else self.units

    def __str__(self) -> str:
        if self.other:
            return f"{self.name}: {self.other}"
        at = f" at {list(self.entry)}" if self.entry else ""
        judged = "" if self.units is None else f"{self.units:.3g} {self.unit}{at}; "
        at = "" if judged else at
        return (
            f"{self.name}: {judged}by at most {self.largest:.3g}{at}, {self.relative:.2g} of the "
            f"largest value; mean drift {self.drift:.2g}"
        )


@dataclass(frozen=True)
class Comparison:
    """What differs between two initializations.

    Attributes
    ----------
    before, after : Initialization
        The two.
    buffers : list of BufferChange
        Those that changed, the largest change first.
    same : int
        How many buffers and parameters did not change.
    causes : list of str
        What changed of what they were made from: frames, settings, packages, nodes.
    """

    before: Initialization
    after: Initialization
    buffers: list[BufferChange]
    same: int
    causes: list[str]

    def lines(self) -> list[str]:
        """Return what a person is told, one thing a line."""
        made = f", made {self.before.card.made}" if self.before.card else ""
        lines = [f"compared with {self.before}{made}", *self.causes]
        if not self.buffers:
            return [*lines, f"state    the same, in all {self.same} buffers and parameters"]
        number = f"{len(self.buffers)} of {len(self.buffers) + self.same}"
        lines.append(f"state    {number} buffers and parameters changed, the most first:")
        return lines + [f"  {change}" for change in self.buffers]


def compare(before: Initialization, after: Initialization, nodes: Iterable[Node]) -> Comparison:
    """Return what differs between two initializations.

    Parameters
    ----------
    before, after : Initialization
        The earlier and the later one.
    nodes : iterable of Node
        The nodes of the later one's pipeline, whose classes say how changes are judged.
    """
    changes = [*_buffers(before, after, {node.name: node for node in nodes})]
    changed = [change for change in changes if change is not None]
    return Comparison(
        before,
        after,
        sorted(changed, key=lambda change: (-change.size, change.name)),
        len(changes) - len(changed),
        [*_causes(before, after)],
    )


# ---- the state -------------------------------------------------------------------------


def _buffers(
    before: Initialization, after: Initialization, nodes: Mapping[str, Node]
) -> Iterator[BufferChange | None]:
    """Yield for each buffer and parameter how it changed, None where it did not."""
    for node in {**after.states, **before.states}:
        was, now = before.states.get(node, {}), after.states.get(node, {})
        known = yardsticks_of(type(nodes[node])) if node in nodes else {}
        wide = {name: value.detach().double() for name, value in was.items()}
        for name in {**now, **was}:
            full = f"{node}.{name}"
            if name not in was or name not in now:
                yield BufferChange(full, other="it is new" if name in now else "it is gone")
            elif was[name].shape != now[name].shape:
                shapes = f"its shape was {[*was[name].shape]} and is {[*now[name].shape]}"
                yield BufferChange(full, other=shapes)
            else:
                change = _changed(full, wide[name], now[name].detach().double())
                yardstick = known.get(name)
                if change is not None and yardstick is not None:
                    one = yardstick.of(wide).expand_as(wide[name])
                    yield _judged(change, wide[name], now[name].double(), one, yardstick.unit)
                else:
                    yield change


def _difference(was: Tensor, now: Tensor) -> Tensor:
    """Return absolute differences; values that are not finite differ by 0 or infinity."""
    same = (was == now) | (was.isnan() & now.isnan())
    return torch.where(same, 0.0, (now - was).abs()).nan_to_num(nan=torch.inf, posinf=torch.inf)


def _changed(name: str, was: Tensor, now: Tensor) -> BufferChange | None:
    difference = _difference(was, now)
    if not bool(difference.any()):
        return None
    return BufferChange(
        name,
        float(difference.max()),
        _ratio(difference.max(), was.abs().nan_to_num().max()),
        _ratio(difference.mean(), was.abs().nan_to_num().mean()),
        _place_of_largest(difference),
    )


def _judged(change: BufferChange, was: Tensor, now: Tensor, one: Tensor, unit: str) -> BufferChange:
    """Return a change with its largest entry in units of ``one``, a tensor of the same shape."""
    difference = _difference(was, now)
    units = torch.where(difference == 0, 0.0, difference / one.nan_to_num())
    entry = _place_of_largest(units)
    return replace(change, entry=entry, units=float(units.max()), unit=unit)


def _place_of_largest(values: Tensor) -> tuple[int, ...]:
    place = torch.unravel_index(values.argmax(), values.shape)
    return tuple(int(index) for index in place)


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part / whole) if whole else torch.inf


# ---- what it was made from -------------------------------------------------------------


def _causes(before: Initialization, after: Initialization) -> Iterator[str]:
    """Yield a line for each thing that changed of what the two were made from."""
    was, now = before.card, after.card
    if was is None or now is None:
        without = " and ".join(str(each.file) for each in (before, after) if each.card is None)
        yield f"made     from what, is not compared: nothing says it of {without}"
        return
    yield from _frames(was, now)
    for change in structural_changes(was.pipeline, now.pipeline):
        yield f"nodes    {change}"
    for what, old, new in (
        ("settings", _settings(was), _settings(now)),
        ("versions", was.versions, now.versions),
        ("metrics ", _validation(was), _validation(now)),
    ):
        for key in sorted({*old, *new}):
            if old.get(key) != new.get(key):
                yield f"{what} {key} was {old.get(key)} and is {new.get(key)}"


def _settings(card: Card) -> dict[str, Any]:
    """Return the settings of a fit, those of the trainrun that it may depend on included."""
    trainrun = card.trainrun or {}
    data = trainrun.get("data", {})
    theirs = {f"data.params.{name}": value for name, value in data.get("params", {}).items()}
    theirs["data.batch_size"] = data.get("batch_size")
    theirs["training.seed"] = trainrun.get("training", {}).get("seed")
    return theirs | card.settings


def _validation(card: Card) -> dict[str, str]:
    """Return the metrics of the validation split, as they are told."""
    found = card.metrics.get("val", {}).items()
    return {f"val {name}": f"{value:.4f}" for name, value in found if value is not None}


def _frames(before: Card, after: Card) -> Iterator[str]:
    if before.frames is None or after.frames is None:
        yield "frames   not compared: one of the cards says nothing of them"
        return
    was = {frame.uid: frame for frame in before.frames.used}
    now = {frame.uid: frame for frame in after.frames.used}
    for what, uids, frames in (
        ("added", now.keys() - was.keys(), now),
        ("removed", was.keys() - now.keys(), was),
    ):
        if uids:
            counts = Counter(frame.recording for uid, frame in frames.items() if uid in uids)
            of = [f"{number} of {recording}" for recording, number in counts.items()]
            yield f"frames   {len(uids)} {what}: {_few(of, 'recordings')}"
    changed = {}
    for uid in now.keys() & was.keys():
        files = _files(before.frames, was[uid]), _files(after.frames, now[uid])
        if what := _other_content(*files):
            changed[uid] = what
    if changed:
        named = [f"{uid} ({what})" for uid, what in sorted(changed.items())]
        yield f"frames   {len(changed)} changed: {_few(named, 'frames')}"
    for uid in sorted(after.frames.skipped.keys() - before.frames.skipped.keys()):
        yield f"frames   skipped now: {uid}: {after.frames.skipped[uid]}"
    if was.keys() == now.keys() and [*was] != [*now]:
        yield "frames   the same ones come in another order"


def _files(frames: UsedFrames, frame: UsedFrame) -> list[tuple[str, Stamp | None]]:
    """Return the files of a frame, each with what it was known by."""
    found = ((name, frames.files.get(name)) for name in frame.files)
    return [(name, Stamp(**stamp.model_dump()) if stamp else None) for name, stamp in found]


def _other_content(
    before: list[tuple[str, Stamp | None]], after: list[tuple[str, Stamp | None]]
) -> str:
    """Return in what the files of a frame differ from those that it was read from before."""
    for (path, stamp), (earlier_path, earlier) in zip(after, before, strict=False):
        if stamp is None or earlier is None:
            continue
        if path != earlier_path:  # when a copy was made says nothing
            earlier = replace(earlier, changed=stamp.changed, etag=stamp.etag)
        if what := stamp.differs(earlier):
            return what
    return ""


def _few(items: list[str], what: str) -> str:
    more = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {more} other {what}" if more > 0 else "")
