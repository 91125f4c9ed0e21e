"""How are nodes fitted on a sample of pixels, and how far may they be from an exact fit?

What a pass has kept goes through the nodes that are fitted by then, level after level, in the
driver's process. The sample is cut into random groups, each of which one thread computes, so that
nothing depends on how many there are: each statistic is merged from those of the groups, and how
much it changes without each of them gives the standard errors of all that a node froze, by the
node's own code.

They say how far the node is from one that all pixels had been measured for, the nodes before it
being as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger
from torch import Tensor

from cuvis_dist.archive import Archive
from cuvis_dist.errors import DataError, one_line
from cuvis_dist.initialization.drawing import Frontier, given
from cuvis_dist.initialization.measured import Outcome
from cuvis_dist.initialization.passes import derived, freeze_fit, freeze_fits
from cuvis_dist.initialization.plan import Fit, Measurement, Pass, measured_directly, share
from cuvis_dist.nodes.health import exact_mean
from cuvis_dist.nodes.upstream import edges_into, inputs_of, nodes_before, run_nodes
from cuvis_dist.scaling import Scaling
from cuvis_dist.statistics import DrawnSample, Moments, Statistic
from cuvis_dist.statistics.drawn import error_by_groups, error_of_mean

#: Groups of a sample, each of which is computed at a time: 4 MB of 61 bands for 2**20 pixels. The
#: standard errors are known to 9 % with so many.
_GROUPS = 64
#: Pixels that an affine map is checked on.
_PROBES = 256
#: A sample of fewer pixels gives no standard errors worth the name.
FEWEST = 512
#: Groups that are computed at a time, at most.
_THREADS = 8


@dataclass
class Sampled:
    """What was fitted on a sample.

    Attributes
    ----------
    nodes : dict of str to dict
        Per node, as in a pass's record: ``statistic``, ``pixels`` and ``sampled``, which says

        - ``of``: how many pixels the sample was drawn from;
        - ``given``: which nodes before were fitted on it, too;
        - ``standard_errors``: of the mean and the standard deviation of what was measured, and of
          what the node froze, by name (the largest of several entries), with the ``value`` where
          that is one number;
        - ``check``: the mean and what it is exactly, where that follows from the first reading.
    left : list of Pass
        What has to be read after all.
    """

    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    left: list[Pass] = field(default_factory=list)


class _UnusableError(Exception):
    """The frames have kept no sample; why not."""


def fit_later(
    pipeline: CuvisPipeline, archive: Archive, this_pass: Pass, outcome: Outcome, scaling: Scaling
) -> Sampled:
    """Fit the later levels of a pass on the pixels that it has kept.

    Parameters
    ----------
    pipeline : CuvisPipeline
        The pipeline, in which the pass's own nodes are fitted.
    outcome : Outcome
        What the pass has measured and kept.

    Raises
    ------
    DataError
        If values of the sample are not finite at a node, and no frame may be skipped, or no pixel
        is left.
    CuvisDistError
        If a node's own fit failed.
    """
    result, levels = Sampled(), [*this_pass.later]
    again = "the archive is read again for {}: {}"
    try:
        sample = _sample(outcome, scaling)
        fitter = Fitter(pipeline, archive, this_pass, sample, scaling.measuring.pixels)
        exact = {
            fit.node.name: derived(fit, outcome.statistics, outcome.probes)
            for fit in this_pass.fits
            if fit.recipe.statistic is Moments
        }
        with one_thread_each() as threads, ThreadPoolExecutor(threads) as pool:
            while levels:
                fitted, left = fitter.fit(levels[0], exact, pool)
                result.nodes |= fitted
                del levels[0]
                if left:
                    result.left = [share([measured_directly(pipeline, fit)]) for fit in left]
                    break
    except _UnusableError as why:
        logger.warning(again, _names(levels), why)
    except DataError as error:
        if scaling.measuring.on_error != "skip":
            raise
        logger.warning(again, _names(levels), f"it may skip frames, and {error}")
    result.left += levels
    return result


def _names(levels: Sequence[Pass]) -> str:
    return ", ".join(node.name for level in levels for node in level.nodes)


def _sample(outcome: Outcome, scaling: Scaling) -> DrawnSample:
    parts = outcome.drawn
    if parts is None:
        raise _UnusableError("a frame has images of several sizes, so that no pixels could be kept")
    try:
        return DrawnSample(parts, scaling.measuring.sample_pixels)
    except ValueError as error:
        raise _UnusableError(f"no sample can be made of the frames, since {error}") from error


@contextmanager
def one_thread_each() -> Iterator[int]:
    """Let one thread compute a group, and yield how many groups to compute at a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield min(before, _THREADS)
    finally:
        torch.set_num_threads(before)


class Fitter:
    """Fits one level of nodes after another on a sample."""

    def __init__(
        self,
        pipeline: CuvisPipeline,
        archive: Archive,
        this_pass: Pass,
        sample: DrawnSample,
        pixels: str,
    ) -> None:
        self.pipeline, self.archive, self.sample, self.pixels = pipeline, archive, sample, pixels
        self.beyond = Frontier(pipeline, this_pass).beyond
        self.constants = sample.parts[0].constants if sample.parts else {}
        self.done: list[str] = []

    def fit(
        self, level: Pass, exact: dict[str, Any], pool: ThreadPoolExecutor
    ) -> tuple[dict[str, dict[str, Any]], list[Fit]]:
        """Fit a level; return what a record says of its nodes, and fits that need a reading."""
        parts, probes = self.measure(level, pool)
        whole = {key: merged(some) for key, some in parts.items()}
        if self.sample.fraction < 1 and min(each.n for each in whole.values()) < FEWEST:
            raise _UnusableError("too few pixels of the sample count for standard errors")
        fitted, left = freeze_fits(level, whole, probes)
        for fit in level.fits:
            if fit.node.name in fitted:
                said = self._said(fit, parts[fit.source.key], probes, exact)
                fitted[fit.node.name]["sampled"] = said
        self.done += fitted
        return fitted, left

    def measure(
        self, level: Pass, pool: ThreadPoolExecutor
    ) -> tuple[dict[str, list[Statistic]], dict[str, Tensor]]:
        """Return by measurement the statistics of each group of pixels, and some of the pixels.

        Raises
        ------
        DataError
            If none is left, or values are not finite.
        """
        parts: dict[str, list[Statistic]] = {m.key: [] for m in level.measurements}
        probes: dict[str, Tensor] = {}
        groups = range(min(_GROUPS, self.sample.k))
        for found in pool.map(lambda number: self._group(level, number, len(groups)), groups):
            for key, statistic, few in found:
                probes.setdefault(key, few)
                parts[key].append(statistic)
        if not all(parts.values()):
            raise DataError(
                f"no pixel is left for node {level.nodes[0].name}: masks and the setting pixels "
                "leave all out"
            )
        return parts, probes

    def _group(self, level: Pass, number: int, groups: int) -> list[tuple[str, Statistic, Tensor]]:
        """Return the statistics of one group of pixels by measurement, and some of its pixels."""
        found: list[tuple[str, Statistic, Tensor]] = []
        kept, frames = self.sample.group(number, groups)
        if not len(frames):
            return found
        rows = {name: v.reshape(1, len(frames), 1, *v.shape[1:]) for name, v in kept.items()}
        outputs, batch = given(rows | self.constants)
        before = nodes_before(self.pipeline, [m.node for m in level.measurements])
        try:
            outputs = run_nodes(self.pipeline, self.beyond & before, outputs, batch)
            for m in level.measurements:
                inputs = inputs_of(self.pipeline, m.node, outputs, batch)
                pixels = m.recipe.pixels(m.node, inputs)
                finite = torch.isfinite(pixels).all(dim=-1)
                if self.pixels == "finite":
                    pixels = pixels[finite]
                elif not bool(finite.all()):
                    raise self._not_finite(m, frames[~finite.numpy()])
                if len(pixels):
                    statistic = m.recipe.statistic.measure(pixels, **m.recipe.options)
                    found.append((m.key, statistic, pixels[:_PROBES].clone()))
            return found
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"the sample of pixels cannot be used for {_names([level])}: {one_line(error)}"
            ) from error

    def _not_finite(self, measurement: Measurement, frames: Any) -> DataError:
        """Return what to say about pixels that are not finite, of these frames by position."""
        port = f"{measurement.node.name}.{measurement.recipe.port}"
        return DataError(
            f"{self.archive.frames[frames.min()]} has pixels that are not finite at {port}; they "
            "would make every fitted value NaN. Correct the recording, leave it out of the train "
            "split, or leave such pixels out (pixels: finite)"
        )

    def _said(
        self,
        fit: Fit,
        parts: Sequence[Statistic],
        probes: dict[str, Tensor],
        exact: dict[str, Any],
    ) -> dict[str, Any]:
        """Return what a record says of a node that was fitted on the sample."""
        fraction = self.sample.fraction
        moments: Any = derived(fit, {fit.source.key: merged(parts)}, probes)
        without = [moments, moments]  # nothing is left out of a sample of all pixels
        if fraction < 1:
            without = [derived(fit, {fit.source.key: each}, probes) for each in without_each(parts)]
        errors = {
            "mean": _entry(moments.mean, error_of_mean(_variances(moments), moments.n, fraction)),
            "standard deviation": _entry(
                _variances(moments).sqrt(),
                error_by_groups(torch.stack([_variances(m).sqrt() for m in without]), fraction),
            ),
        }
        errors |= _frozen(fit, without, fraction)
        before = {node.name for node in nodes_before(self.pipeline, [fit.node])}
        said = {
            "of": self.sample.n,
            "given": [name for name in self.done if name in before],
            "standard_errors": errors,
        }
        if check := self._check(fit, exact, errors["mean"]):
            said["check"] = check
        return said

    def _check(
        self, fit: Fit, exact: dict[str, Any], mean: dict[str, float]
    ) -> dict[str, float] | None:
        """Compare the mean of a port with what it is exactly, where that is known."""
        at, port = fit.source.node, fit.source.recipe.port
        for node, output, to in edges_into(self.pipeline, at):
            moments = exact.get(node.name)
            if to == port and moments is not None and not fit.chain:
                known = exact_mean(node, output, moments)
                if known and moments.n == self.sample.n:
                    return {"mean": mean["value"], "exact": known[0], "rounding": known[1]}
        return None


def merged(parts: Sequence[Statistic]) -> Statistic:
    """Return the statistic of all parts together."""
    return reduce(_merge, parts)


def _merge(a: Statistic, b: Statistic) -> Statistic:
    return a.merge(b)


def without_each(parts: Sequence[Statistic]) -> list[Statistic]:
    """Return the statistic of all parts but one, for each of them."""
    ahead = [None, *accumulate(parts, _merge)][:-1]
    behind = [None, *accumulate(reversed(parts), lambda b, a: a.merge(b))][:-1][::-1]
    pairs = zip(ahead, behind, strict=True)
    return [a.merge(b) if a and b else a or b or parts[0] for a, b in pairs]


def _variances(moments: Any) -> Tensor:
    return moments.only_diagonal().M2 / max(1, moments.n - 1)


def _frozen(fit: Fit, without: Sequence[Statistic], fraction: float) -> dict[str, dict[str, float]]:
    """Return the errors of what the node froze, by fitting a copy without each group."""
    fit_copy = replace(fit, node=copy.deepcopy(fit.node))
    values: dict[str, list[Tensor]] = {}
    for statistic in without:
        freeze_fit(fit_copy, statistic)
        for name, value in fit_copy.node.state_dict().items():
            if value.is_floating_point() and value.numel():
                values.setdefault(name, []).append(value.detach().double().cpu().clone())
    frozen = fit.node.state_dict()
    errors = {n: error_by_groups(torch.stack(v), fraction) for n, v in values.items()}
    return {n: _entry(frozen[n], e) for n, e in errors.items() if fraction == 1 or bool(e.any())}


def _entry(value: Tensor, error: Tensor) -> dict[str, float]:
    entry = {"standard_error": float(error.max())}
    return {"value": float(value)} | entry if value.numel() == 1 else entry
