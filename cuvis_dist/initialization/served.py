"""Which passes does a store serve, and how many frames are then left to read?"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import pytorch_lightning as pl
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.archive import Archive, Contents, Frame
from cuvis_dist.initialization.levels import planned
from cuvis_dist.initialization.plan import Pass
from cuvis_dist.initialization.stored import StoredPass
from cuvis_dist.nodes.upstream import nodes_before
from cuvis_dist.scaling import Measuring
from cuvis_dist.store import Store


def can_be_stored(this_pass: Pass, pipeline: CuvisPipeline, fitted: Collection[str]) -> bool:
    """Whether a store keeps what a pass measures.

    Parameters
    ----------
    fitted : collection of str
        Names of the nodes that earlier passes fit.
    """
    if this_pass.inside is not None:  # which pixels these are changes with every frame
        return False
    before = nodes_before(pipeline, [m.node for m in this_pass.measurements])
    return this_pass.streamed is None and not {node.name for node in before} & {*fitted}


def storable(plan: Iterable[Pass], pipeline: CuvisPipeline) -> list[Pass]:
    """Return the passes of a plan whose measurements a store keeps."""
    fitted, found = set[str](), []
    for step in plan:
        if can_be_stored(step, pipeline, fitted):
            found.append(step)
        fitted |= {node.name for node in step.nodes}
    return found


def readings(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    archive: Archive,
    contents: Contents,
    measuring: Measuring,
) -> list[tuple[Pass, int]]:
    """Return the passes of phase 1, and how many frames each of them reads.

    What is read before them, so that the bulk can be looked for, is not among it: see
    :func:`filling`.

    Parameters
    ----------
    contents : Contents
        The files of the archive; needed where the settings name a store.
    """
    plan = planned(pipeline, measuring)
    if measuring.store is None or measuring.robust_pixels or unseen(archive, contents):
        return [(step, len(archive)) for step in plan]
    store, kept, found = Store(measuring.store), storable(plan, pipeline), []
    filled = measuring.robust is not None
    for step in plan:
        frames = len(archive)
        if filled and step is plan[0]:
            frames = 0
        elif step in kept:
            stored = StoredPass(store, pipeline, datamodule, archive, step, measuring)
            stored.look(contents)
            frames = len(stored.missing())
        found.append((step, frames))
    return found


def filling(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    archive: Archive,
    contents: Contents,
    measuring: Measuring,
) -> int | None:
    """Return how many frames are read into the store before the bulk is looked for in it.

    Returns
    -------
    int or None
        None where no bulk is looked for (``measuring.robust``, ``robust_pixels``), or where phase 1
        says that it cannot.
    """
    plan = planned(pipeline, measuring)
    if measuring.store is None or (measuring.robust is None and measuring.robust_pixels is None):
        return None
    if not plan or not can_be_stored(plan[0], pipeline, ()) or unseen(archive, contents):
        return None
    store = Store(measuring.store)
    stored = StoredPass(store, pipeline, datamodule, archive, plan[0], measuring)
    stored.look(contents)
    return len(stored.missing())


def frames_read(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    archive: Archive,
    contents: Contents,
    measuring: Measuring,
) -> int:
    """Return how many frames phase 1 reads, each as often as it is read."""
    args = pipeline, datamodule, archive, contents, measuring
    return sum(frames for _, frames in readings(*args)) + (filling(*args) or 0)


def unseen(archive: Archive, contents: Contents) -> list[Frame]:
    """Return the frames whose own file is none that can be seen from here: no store knows them."""
    return [f for f in archive.frames if not f.reads or f.reads[0] not in contents.files]
