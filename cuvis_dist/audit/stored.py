"""What does a store know of the frames of an archive, for an audit? No cube is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytorch_lightning as pl
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from torch import Tensor

from cuvis_dist.archive import Archive, Contents
from cuvis_dist.audit.groups import FrameStatistics
from cuvis_dist.errors import InputError
from cuvis_dist.initialization.levels import planned
from cuvis_dist.initialization.plan import Fit, Measurement, Pass
from cuvis_dist.initialization.served import storable
from cuvis_dist.initialization.stored import StoredPass
from cuvis_dist.scaling import Measuring
from cuvis_dist.statistics import Drawn, ExactMoments, Extrema, Moments, Statistic
from cuvis_dist.store import Store


@dataclass(frozen=True)
class Stored:
    """The frames of an archive as a store knows them.

    Attributes
    ----------
    frames : list of FrameStatistics
        Those that the store has, in the archive's order, at one port.
    source : str
        The port: ``<node>.<port>``.
    missing : int
        How many frames of the archive the store lacks.
    wavelengths : ndarray or None
        ``[C]`` in nm.
    fits : tuple of Fit
        The nodes that are fitted from what the store has.
    statistics : dict of str to list of Statistic
        By measurement, of each of the frames.
    probes : dict of str to Tensor
        By measurement, a few real pixels ``[N, C]``.
    archive : Archive or None
        All frames of the archive.
    step : Pass or None
        The pass that a store keeps, with the later levels that a sample of pixels would do for.
    why_not : dict of str to str
        The nodes that neither is enough for, each with the reason.
    drawn : list of Drawn or None
        The sampled pixels of each of the frames.
    counted : str
        Which pixels count: the setting ``measuring.pixels``.
    """

    frames: list[FrameStatistics]
    source: str
    missing: int
    wavelengths: np.ndarray | None
    fits: tuple[Fit, ...] = ()
    statistics: dict[str, list[Statistic]] = field(default_factory=dict)
    probes: dict[str, Tensor] = field(default_factory=dict)
    archive: Archive | None = None
    step: Pass | None = None
    why_not: dict[str, str] = field(default_factory=dict)
    drawn: list[Drawn | None] = field(default_factory=list)
    counted: str = "all"


def read_store(
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    archive: Archive,
    measuring: Measuring,
    fields: Mapping[str, dict[str, str]],
) -> Stored:
    """Return what a store knows of an archive.

    Parameters
    ----------
    pipeline : CuvisPipeline
        It is not fitted: what its first pass measures is what a store keeps.
    datamodule : LightningDataModule
        It would read the frames.
    archive : Archive
        The frames.
    measuring : Measuring
        It names the store, and which pixels count.
    fields : mapping of str to dict
        By uid, the rows of the universe.

    Raises
    ------
    InputError
        If the store has none of the frames, or the pipeline measures no covariance.
    DamagedFileError
        If a file is damaged; it is then set aside.
    """
    assert measuring.store is not None
    step, moments = _measured(pipeline, measuring)
    stored = StoredPass(Store(measuring.store), pipeline, datamodule, archive, step, measuring)
    contents = Contents.of(archive.frames)
    stored.look(contents)
    lacking = {archive.frames[i].uid for i in stored.missing()}
    first: dict[str, int] = {}
    for position, frame in enumerate(archive.frames):
        if frame.uid not in lacking:
            first.setdefault(frame.uid, position)
    positions = sorted(first.values())
    if not positions:
        raise InputError(
            f"the store {measuring.store} has none of the {len(archive)} frames of the train "
            "split: fill it with the same options, cuvis-dist measure TRAINRUN --store "
            f"{measuring.store}"
        )
    statistics: dict[str, dict[int, Statistic]] = {}
    probes: dict[str, Tensor] = {}
    for key in stored.keys:
        statistics[key] = {}
        for position, statistic, few in stored.statistics(key, positions):
            statistics[key][position] = statistic
            if few is not None:
                probes.setdefault(key, few)
    drawn = dict(stored.pixels(positions))
    extrema = next((m.key for m in step.measurements if _is_extrema(m, moments)), None)
    frames = []
    for i in positions:
        frame, of_frame = archive.frames[i], statistics[moments.key][i]
        assert isinstance(of_frame, Moments | ExactMoments)
        ends = statistics[extrema][i] if extrema else None
        frames.append(
            FrameStatistics(
                frame.uid,
                frame.recording,
                fields.get(frame.uid, {}),
                of_frame,
                ends if isinstance(ends, Extrema) else None,
                _pixels(drawn.get(i), moments.source, of_frame.channels),
            )
        )
    return Stored(
        frames,
        moments.source,
        len(lacking),
        _wavelengths(drawn, frames[0].moments.channels),
        step.fits,
        {key: [of[i] for i in positions] for key, of in statistics.items()},
        probes,
        archive,
        *_later(pipeline, step, measuring),
        [at and at.at(i) for i, at in ((i, drawn.get(i)) for i in positions)],
        measuring.pixels,
    )


def _later(
    pipeline: CuvisPipeline, step: Pass, measuring: Measuring
) -> tuple[Pass | None, dict[str, str]]:
    """Return the pass with what a sample would do for, and why it would not for other nodes."""
    plan = planned(pipeline, measuring.model_copy(update={"later_levels": "sampled"}))
    same = next((each for each in plan if each.by_key() == step.by_key()), None)
    why: dict[str, str] = {}
    for other in plan:
        if other.streamed is not None:
            why[other.streamed.name] = "it is fitted on whole frames, which a store does not keep"
        elif other is not same:
            why |= {fit.node.name: fit.again or "a pass of its own" for fit in other.fits}
    return same, why


def _measured(pipeline: CuvisPipeline, measuring: Measuring) -> tuple[Pass, Measurement]:
    """Return the pass that a store keeps, and its first measurement of a covariance."""
    for step in storable(planned(pipeline, measuring), pipeline)[:1]:
        for measurement in step.measurements:
            recipe = measurement.recipe
            if recipe.statistic is Moments and not recipe.options and recipe.shareable:
                return step, measurement
    raise InputError(
        f"the pipeline {pipeline.name} measures no covariance in its first pass (cuvis-dist plan): "
        "audit with a trainrun whose pipeline has a node that is fitted on one, such as RXGlobal"
    )


def _is_extrema(measurement: Measurement, moments: Measurement) -> bool:
    return measurement.recipe.statistic is Extrema and measurement.source == moments.source


def _pixels(drawn: Drawn | None, source: str, channels: int) -> np.ndarray:
    """Return ``[K, C]`` the sampled pixels at a port; none where they were not kept."""
    name = source.removeprefix("batch") if source.startswith("batch.") else source
    values = None if drawn is None else drawn.values.get(name)
    if values is None or values.ndim != 2 or values.shape[1] != channels:
        return np.empty((0, channels))
    return values


def _wavelengths(drawn: Mapping[int, Any], channels: int) -> np.ndarray | None:
    for each in drawn.values():
        if each is None:
            continue
        known = each.constants.get(".wavelengths")
        values = np.asarray([] if known is None else known, dtype=float).reshape(-1)
        if len(values) == channels:
            return values
    return None
