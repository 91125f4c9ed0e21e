"""How is one pass over the archive carried out on the workers?

The shards are spread over the cluster; only partials come back. The driver merges them in a fixed
tree, so the result does not depend on who finished first, and lets the nodes freeze.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger

from cuvis_dist.archive import Archive, Shard
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.pool import Workers
from cuvis_dist.execution.spread import Row, spread
from cuvis_dist.execution.tally import Tally
from cuvis_dist.execution.where import engine_for
from cuvis_dist.initialization.drawing import drawing_for
from cuvis_dist.initialization.kept_pass import KeptPass
from cuvis_dist.initialization.measured import Measured, Outcome
from cuvis_dist.initialization.plan import Fit, Pass
from cuvis_dist.initialization.shards import MeasureShard
from cuvis_dist.nodes.affine import probe
from cuvis_dist.scaling import Scaling
from cuvis_dist.statistics import ExactMoments, Moments, Statistic

OnShard = Callable[[int], None]
"""Called with the number of frames done so far."""


@dataclass(frozen=True)
class PassRecord:
    """What one pass read and fitted, as it stands in ``run.json``.

    Attributes
    ----------
    nodes : dict of str to dict
        Per fitted node: ``statistic`` (or ``streamed``), the number of ``pixels``, whether what
        was measured is ``exact``, that is free of rounding, and the ``sha256`` of that; where it
        was fitted on a sample, what :class:`~cuvis_dist.initialization.sampling.Sampled` says.
    frames, bytes : int
        Frames measured, and the bytes of their tensors.
    shards : int
        Units of work.
    seconds : float
        Wall-clock time, that of an earlier run which was cut off included.
    peak_worker_bytes : int
        Largest resident memory of a worker process up to the end of the pass.
    skipped : dict of str to str
        Frames that were left out, by uid, each with its reason.
    restored_shards, restored_frames : int
        How many of them an earlier run, which was cut off, had dealt with.
    repeated : list of int
        Ordinals of the shards that were run again, since a worker or node was lost (with the
        others of the same task, where shards are read from one staged file) or the node could not
        read the recording.
    from_store : int or None
        How many of the frames were not read, since a store had what was measured of them; None
        where the pass used no store.
    inside : dict or None
        Which pixels counted, where only those of the bulk did (the setting
        ``measuring.robust_pixels``): see :class:`~cuvis_dist.initialization.inside.Inside`.
    """

    nodes: dict[str, dict[str, Any]]
    frames: int
    bytes: int
    shards: int
    seconds: float
    peak_worker_bytes: int
    skipped: dict[str, str] = field(default_factory=dict)
    restored_shards: int = 0
    restored_frames: int = 0
    repeated: list[int] = field(default_factory=list)
    from_store: int | None = None
    inside: dict[str, Any] | None = None


def measure_pass(
    pipeline: CuvisPipeline,
    archive: Archive,
    this_pass: Pass,
    scaling: Scaling,
    on_shard: OnShard,
    stored: KeptPass | None = None,
) -> tuple[PassRecord, list[Fit], Outcome]:
    """Carry out the measurements of ``this_pass`` over the archive and freeze its nodes.

    Nodes of its later levels are left to :func:`~cuvis_dist.initialization.sampling.fit_later`.

    Parameters
    ----------
    stored : KeptPass, optional
        Where to keep what is measured; what an earlier run left there is not measured again.

    Returns
    -------
    tuple of PassRecord, list of Fit and Outcome
        The second: fits whose chain turned out not to be affine, and all that follow; they have
        to be measured directly.

    Raises
    ------
    DataError
        If a frame cannot be read or measured, or frames are missing at the end.
    StatefulNodesError
        If what is measured depends on the order of the frames.
    ClusterError
        If the cluster lost the work.
    """
    shards = archive.shards(scaling.measuring.shard_frames)
    names = [archive.frames[shard.start].recording for shard in shards]

    def nothing() -> Measured:
        return Measured(len(shards), Tally(len(archive), scaling.measuring.max_skipped), names)

    earlier = stored.taken(lambda state: nothing().take(state, stored)) if stored else None
    measured = earlier or nothing()
    missing = [shard for shard in shards if shard.ordinal not in measured.tree]
    restored = len(shards) - len(missing), measured.tally.done
    if missing:
        rows = _rows(pipeline, archive, missing, this_pass, scaling)
        _merge(rows, measured, this_pass.by_key(), on_shard, stored)
    tally = measured.tally
    tally.close()
    outcome = measured.outcome()
    fitted, left = freeze_fits(this_pass, outcome.statistics, outcome.probes)
    record = PassRecord(
        fitted,
        tally.frames,
        tally.bytes,
        len(shards),
        measured.seconds,
        tally.peak,
        tally.skipped,
        *restored,
        sorted(tally.repeated),
        inside=this_pass.inside.described() if this_pass.inside else None,
    )
    return record, left, outcome


def _rows(
    pipeline: CuvisPipeline,
    archive: Archive,
    shards: list[Shard],
    this_pass: Pass,
    scaling: Scaling,
) -> Generator[Row, None, None]:
    """Yield what the workers measured of each shard, as it comes."""
    with (
        raise_cause("the pass over the archive"),
        engine_for(Workers.measuring(scaling)) as engine,
    ):
        order = engine.make_order(pipeline, archive, scaling.measuring.on_error == "skip")
        drawing = drawing_for(pipeline, this_pass, scaling.measuring, len(archive))
        measure = MeasureShard(order, this_pass.by_key(), scaling, drawing, this_pass.inside)
        yield from spread(shards, measure, engine)


def _merge(
    rows: Generator[Row, None, None],
    measured: Measured,
    measurements: Iterable[str],
    on_shard: OnShard,
    stored: KeptPass | None,
) -> None:
    """Add rows to ``measured``, which is kept however this ends."""
    started = time.perf_counter() - measured.seconds
    whole = False  # an interruption can come at any moment, in the middle of a merge too
    try:
        with closing(rows):
            for row in rows:
                whole = False
                added = measured.add(row, measurements)
                measured.seconds = time.perf_counter() - started
                whole = True
                if added:
                    if stored:
                        stored.save_if_due(lambda: measured.state(stored))
                    on_shard(measured.tally.done)
    finally:
        if stored and whole:
            stored.save(measured.state(stored))


def freeze_fits(
    this_pass: Pass, merged: dict[str, Statistic], probes: dict[str, torch.Tensor]
) -> tuple[dict[str, dict[str, Any]], list[Fit]]:
    """Let the nodes of a pass freeze what was measured for them, in order.

    Parameters
    ----------
    this_pass : Pass
        What was measured, and for which nodes.
    merged : dict of str to Statistic
        By measurement, of the whole archive.
    probes : dict of str to Tensor
        By measurement, real pixels ``[N, C]`` to check affine maps on.

    Returns
    -------
    tuple of dict and list of Fit
        Per fitted node what :attr:`PassRecord.nodes` says, and the fits that have to be measured
        directly (see :func:`measure_pass`).
    """
    fitted: dict[str, dict[str, Any]] = {}
    left: list[Fit] = []
    for fit in this_pass.fits:
        try:
            if fit.chain and left:
                raise ValueError(f"{left[0].node.name} is not fitted yet")
            statistic = derived(fit, merged, probes)
        except ValueError as error:
            logger.info(f"{fit.node.name} is measured directly: {error}")
            left.append(fit)
            continue
        freeze_fit(fit, statistic)
        how = {"statistic": str(fit), "pixels": statistic.n}
        measured = merged[fit.source.key]
        fitted[fit.node.name] = how | {"exact": measured.exact, "sha256": measured.sha256()}
    return fitted, left


def derived(fit: Fit, merged: dict[str, Statistic], probes: dict[str, torch.Tensor]) -> Statistic:
    """Return what a node is fitted from; raises ValueError if its chain is not affine.

    The parameters are those of :func:`freeze_fits`.
    """
    statistic = merged[fit.source.key]
    if fit.chain:
        return statistic.affine(*probe(fit.chain, probes[fit.source.key]))
    return statistic


def freeze_fit(fit: Fit, statistic: Statistic) -> None:
    """Let a node freeze a statistic, by its own code.

    Raises
    ------
    DataError
        If there are no pixels.
    CuvisDistError
        If the node's own code fails.
    """
    if not statistic.n:
        raise DataError(
            f"no pixel is left for node {fit.node.name}: masks and the setting pixels leave all out"
        )
    if isinstance(statistic, Moments | ExactMoments) and fit.recipe.options.get("diagonal"):
        statistic = statistic.only_diagonal()
    try:
        fit.recipe.freeze(fit.node, statistic)
    except Exception as error:
        raise CuvisDistError(
            f"node {fit.node.name} could not be fitted: {one_line(error)}"
        ) from error
