"""How is a store filled with what phase 1 measures of a split's frames, and nothing else done?"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import torch

from cuvis_dist.archive import Archive, Contents, open_archive
from cuvis_dist.errors import DataError, InputError
from cuvis_dist.execution.where import work_on
from cuvis_dist.initialization.from_store import Filler
from cuvis_dist.initialization.levels import planned
from cuvis_dist.initialization.measuring import Measurer
from cuvis_dist.initialization.plan import Pass
from cuvis_dist.initialization.served import storable, unseen
from cuvis_dist.initialization.stored import StoredPass
from cuvis_dist.runs.job import job
from cuvis_dist.runs.record import JobRecord
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling
from cuvis_dist.statistics import Statistic
from cuvis_dist.store import Store, identity_of

#: Relative difference of statistics that are rounded, from one processor to another.
_ROUNDING = 1e-9

OnFrames = Callable[[int, int], None]
"""Called with the number of frames that the store has, and the number of all of them."""


@dataclass(kw_only=True)
class MeasureRecord(JobRecord):
    """What ``measure`` finds out; None where it did not come so far.

    Attributes
    ----------
    store, split : str
        Which store was filled with which frames.
    frames, from_store, read : int
        Frames of the split that can be used; those that the store had; those that were measured.
    skipped : dict of str to str
        Frames that could not be used, by uid, each with its reason.
    seconds : float
        Wall-clock time of the job.
    """

    job: str = "measure"
    store: str
    split: str
    frames: int | None = None
    from_store: int | None = None
    read: int | None = None
    skipped: dict[str, str] | None = None
    seconds: float | None = None


def measure(
    trainrun: TrainRun,
    split: str = "train",
    scaling: Scaling | None = None,
    on_frames: OnFrames | None = None,
    verbose: bool = False,
) -> MeasureRecord:
    """Measure the frames of a split that a store lacks, and add them.

    Parameters
    ----------
    trainrun : TrainRun
        From :func:`~cuvis_dist.runs.trainrun.load_trainrun`. Its pipeline is not fitted.
    split : str
        ``train``, or ``predict`` for all frames.
    scaling : Scaling
        Its ``measuring.store`` names the store.

    Returns
    -------
    MeasureRecord
        As in ``<output_dir>/result.json``.

    Raises
    ------
    CuvisDistError
        With a message for people. What was measured until then is in the store.
    """
    scaling, started = scaling or Scaling(), time.perf_counter()
    measuring = scaling.measuring
    if measuring.store is None:
        raise InputError("measure fills a store: name it (measuring.store)")
    output, store = str(trainrun.output), str(Store(measuring.store))
    record = MeasureRecord(output_dir=output, store=store, split=split)
    with job(record, scaling, verbose) as entered:
        entered.begin()
        archive, contents, stored = look(trainrun, split, scaling)
        missing = len(stored.missing())
        entered.connect(False, partial(work_on, archive, trainrun.pipeline, missing))
        total = len(archive)
        say = on_frames or (lambda done, total: None)
        filler = Filler(
            stored, trainrun.pipeline, contents, entered.scaling, lambda done: say(done, total)
        )
        usable = filler.fill()
        read = filler.done.frames
        record.frames, record.read = len(usable), len(read)
        record.from_store = sum(identity_of(archive.frames[i]) not in read for i in usable)
        record.skipped = filler.done.skipped
        record.seconds = round(time.perf_counter() - started, 3)
        entered.done()
    return record


def look(trainrun: TrainRun, split: str, scaling: Scaling) -> tuple[Archive, Contents, StoredPass]:
    """Return a split, its files, and what the store has of it; the parameters are as above.

    Raises
    ------
    InputError
        If no store can keep what the pipeline measures, or the split cannot be set up.
    DataError
        If a file of the split cannot be seen from here.
    """
    measuring, step = scaling.measuring, _stored_pass(trainrun, scaling)
    assert measuring.store is not None
    datamodule = trainrun.datamodule(scaling, fitting=split == "train")
    archive = open_archive(datamodule, split).sampled(
        measuring.sample_frames, measuring.sample_fraction, measuring.sample_seed
    )
    contents = Contents.of(archive.frames, scaling.reading.verify)
    if hidden := unseen(archive, contents):
        raise DataError(
            f"the files of {len(hidden)} frames, such as {hidden[0]}, cannot be seen from here, so "
            "that nobody could tell whether they have changed: no store can keep them. Run where "
            "they are, or make the data module tell its frames' files"
        )
    store = Store(measuring.store)
    stored = StoredPass(store, trainrun.pipeline, datamodule, archive, step, measuring)
    stored.look(contents)
    return archive, contents, stored


def _stored_pass(trainrun: TrainRun, scaling: Scaling) -> Pass:
    """Return the pass whose measurements a store keeps; raises InputError if there is none."""
    if steps := storable(planned(trainrun.pipeline, scaling.measuring), trainrun.pipeline):
        return steps[0]
    raise InputError(
        f"no store can keep anything for the pipeline {trainrun.pipeline.name}: every node that "
        "phase 1 fits is given its inputs one after another (cuvis-dist plan), or there is none"
    )


def differing(
    trainrun: TrainRun, scaling: Scaling, frames: int
) -> tuple[list[str], dict[str, str]]:
    """Measure a few frames of the train split again, and compare them with a store.

    Parameters
    ----------
    trainrun : TrainRun
        It says which frames there are, and what is measured of them.
    scaling : Scaling
        Its ``measuring`` settings say which store it is, and which pixels count.
    frames : int
        How many frames, spread over those that the store has.

    Returns
    -------
    tuple of list of str and dict of str to str
        The names of the frames that were compared, and of those that measure otherwise with what
        differs.

    Raises
    ------
    DataError
        If a frame cannot be read, or the store has none of the archive.
    """
    archive, _, stored = look(trainrun, "train", scaling)
    missing = {*stored.missing()}
    there = [i for i in range(len(archive)) if i not in missing]
    if not there:
        raise DataError(f"{stored.store} has no frame of the train split of {trainrun.path}")
    few = there[:: max(1, len(there) // max(1, frames))][:frames]
    measurer = Measurer(trainrun.pipeline, stored.this_pass.by_key(), scaling.measuring.pixels, {})
    differ: dict[str, str] = {}
    for key in stored.keys:
        for position, statistic, _ in stored.statistics(key, few):
            measurer.ranks.clear()
            frame = archive.frames[position]
            now, _ = measurer.frame(archive.read(position), frame, position)
            if not _alike(now.statistics[key], statistic):
                name = str(frame)
                differ[name] = f"{differ[name]}, {key}" if name in differ else key
    return [str(archive.frames[i]) for i in few], differ


def _alike(a: Statistic, b: Statistic) -> bool:
    """Whether two statistics are the same, but for what another processor may have rounded."""
    if type(a) is not type(b) or a.exact:
        return a.to_bytes() == b.to_bytes()
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)]
    return all(
        torch.allclose(x, y, rtol=_ROUNDING, atol=_ROUNDING * float(x.abs().max()))
        if isinstance(x, torch.Tensor) and x.numel()
        else bool(x == y) or isinstance(x, torch.Tensor)
        for x, y in pairs
    )
