"""Which pixels of one frame count, and what is measured of them?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from torch import Tensor

from cuvis_dist.archive import Frame
from cuvis_dist.errors import DataError, one_line
from cuvis_dist.initialization.inside import Inside
from cuvis_dist.nodes.catalogue import annotation_port, is_pixelwise
from cuvis_dist.nodes.recipe import Recipe
from cuvis_dist.nodes.strips import strips
from cuvis_dist.nodes.upstream import node_inputs, nodes_before
from cuvis_dist.statistics import PixelSample, Statistic, from_bytes

#: Pixels of a frame that are kept to check an affine map on.
_PROBES = 256


@dataclass(frozen=True)
class Partial:
    """The statistics of one frame, of one shard, or of several merged ones, by measurement.

    Without statistics: every frame was skipped.
    """

    statistics: dict[str, Statistic]
    first_frame: str

    def merge(self, other: Partial) -> Partial:
        """Merge two partials; raises DataError when their frames have different bands."""
        if not self.statistics or not other.statistics:
            return self if self.statistics else other
        merged = {}
        for key, statistic in self.statistics.items():
            theirs = other.statistics[key]
            if statistic.channels != theirs.channels:
                raise DataError(
                    f"{other.first_frame} has {theirs.channels} channels at {key}, "
                    f"{self.first_frame} has {statistic.channels}: recordings with "
                    "different bands cannot be fitted together"
                )
            merged[key] = statistic.merge(theirs)
        return Partial(merged, self.first_frame)

    def state(self) -> dict[str, Any]:
        """Return the statistics as bytes, and the name of the frame."""
        statistics = {key: value.to_bytes() for key, value in self.statistics.items()}
        return {"statistics": statistics, "first_frame": self.first_frame}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Partial:
        """Return the partial whose :meth:`state` this is; raises ValueError if it is none."""
        statistics = {key: from_bytes(data) for key, data in state["statistics"].items()}
        return cls(statistics, str(state["first_frame"]))


class Measurer:
    """Measures frames, one after another.

    Parameters
    ----------
    pipeline : CuvisPipeline
        As far as it is fitted.
    measurements : dict of str to (str, Recipe)
        By key: the node whose input is measured, and how.
    pixels : str
        Which pixels count: ``all``, ``unlabelled`` or ``finite`` (see ``Scaling.pixels``).
    ranks : dict of str to Tensor, optional
        Smallest ranks that this process has met per sampled measurement; updated. What lies
        above them cannot be in the sample of the archive and is left out of the next partials.
    inside : Inside, optional
        Which pixels are of the bulk: others do not count.
    """

    def __init__(
        self,
        pipeline: CuvisPipeline,
        measurements: dict[str, tuple[str, Recipe]],
        pixels: str = "all",
        ranks: dict[str, Tensor] | None = None,
        inside: Inside | None = None,
    ) -> None:
        self.pipeline, self.pixels, self.inside = pipeline, pixels, inside
        self.ranks: dict[str, Tensor] = {} if ranks is None else ranks
        named = {node.name: node for node in pipeline.nodes()}
        self.measurements = {key: (named[name], r) for key, (name, r) in measurements.items()}
        self.targets = list(dict.fromkeys(node for node, _ in self.measurements.values()))
        self.looked_at = [*self.targets]
        if inside is not None and named[inside.node] not in self.targets:
            self.looked_at.append(named[inside.node])
        self.before = nodes_before(pipeline, self.looked_at)
        self.by_strips = all(r.by_strips for _, r in self.measurements.values()) and all(
            is_pixelwise(node) for node in self.before
        )

    def frame(
        self, batch: dict[str, Any], frame: Frame, position: int, probed: bool = True
    ) -> tuple[Partial, dict[str, Tensor]]:
        """Measure one frame.

        Parameters
        ----------
        batch : dict
            The frame as a batch of one.
        frame : Frame
            Its identity.
        position : int
            The frame's position in the archive.
        probed : bool
            Whether pixels are wanted to check affine maps on.

        Returns
        -------
        tuple of Partial and dict
            The statistics, and some of the pixels that each measurement saw, if they are wanted.

        Raises
        ------
        DataError
            If a node cannot use the frame, or values are not finite; the message names it.
        """
        partial = Partial({}, str(frame))
        probes: dict[str, list[Tensor]] = {key: [] for key in self.measurements}
        for chosen in self._chosen(batch, frame):
            measured = {}
            for key, (pixels, index) in chosen.items():
                node, recipe = self.measurements[key]
                where: dict[str, Any] = {}
                if recipe.statistic.located:
                    where = {"uid": frame.uid, "position": position, "index": index}
                    where["bound"] = self._bound(key, recipe.options["size"])
                with _naming(f"{frame} cannot be measured for node {node.name}"):
                    measured[key] = recipe.statistic.measure(pixels, **recipe.options, **where)
                if probed:
                    probes[key].append(_thinned(pixels))
            partial = partial.merge(Partial(measured, str(frame)))
        for key, statistic in partial.statistics.items():
            if statistic.n and not statistic.is_finite():
                raise self._not_finite(key, batch, frame)
        self._note_ranks(partial)
        return partial, {key: _thinned(torch.cat(few)) for key, few in probes.items() if few}

    def _chosen(
        self, batch: dict[str, Any], frame: Frame
    ) -> Iterator[dict[str, tuple[Tensor, Tensor | None]]]:
        """Yield, strip by strip, the pixels ``[N, C]`` that count, by key.

        And their indices in the frame, for a statistic that asks where its pixels are.
        """
        seen = Counter[str]()
        for part in strips(batch, len(self.before)) if self.by_strips else [batch]:
            every_input = (
                compute_inputs(self.pipeline, n, part, str(frame)) for n in self.looked_at
            )
            inputs = dict(zip(self.looked_at, every_input, strict=True))
            wanted = self._wanted(part, frame)
            inside = self._inside(inputs)
            chosen = {}
            for key, (node, recipe) in self.measurements.items():
                with _naming(f"{frame} cannot be measured for node {node.name}"):
                    every = recipe.pixels(node, inputs[node])
                    pixels, index = _selected(
                        every, recipe.counts(node, inputs[node]), wanted, inside
                    )
                    if self.pixels == "finite":
                        pixels, index = _finite_only(pixels, index)
                    if recipe.statistic.located:
                        index = (torch.arange(len(pixels)) if index is None else index) + seen[key]
                chosen[key] = pixels, index
                seen[key] += len(every)
            yield chosen

    def _not_finite(self, key: str, batch: dict[str, Any], frame: Frame) -> DataError:
        """Return what to say about a frame with values that are not finite."""
        count = 0
        for chosen in self._chosen(batch, frame):
            count += int((~torch.isfinite(chosen[key][0])).any(dim=-1).sum())
        node, recipe = self.measurements[key]
        return DataError(
            f"{frame} has {count} pixels that are not finite at {node.name}.{recipe.port}; they "
            "would make every fitted value NaN. Correct the recording, leave it out of the train "
            "split, or leave such pixels out (pixels: finite)"
        )

    def _wanted(self, batch: dict[str, Any], frame: Frame) -> Tensor | None:
        """Return which pixels the annotation leaves, ``[N]``; None where all of them count."""
        if self.pixels != "unlabelled":
            return None
        anomalies = annotated(self.pipeline, batch)
        if anomalies is None:
            raise DataError(
                f"{frame} has no annotation (no mask in its batch): pixels: unlabelled leaves out "
                "annotated anomalies. Annotate the recording or use pixels: all"
            )
        return anomalies.reshape(-1) == 0

    def _inside(self, inputs: Mapping[Node, dict[str, Any]]) -> Tensor | None:
        """Return which pixels are of the bulk, ``[N]``; None where all of them count."""
        if self.inside is None:
            return None
        (given,) = (of for node, of in inputs.items() if node.name == self.inside.node)
        return self.inside.mask(given)

    def _bound(self, key: str, size: int) -> float:
        ranks = self.ranks.get(key)
        return 1.0 if ranks is None or len(ranks) < size else float(ranks[size - 1])

    def _note_ranks(self, partial: Partial) -> None:
        for key, sample in partial.statistics.items():
            if isinstance(sample, PixelSample):
                known = [self.ranks[key]] if key in self.ranks else []
                # Each rank once: a frame that is measured again must not count twice.
                self.ranks[key] = torch.cat([*known, sample.rank]).unique()[: sample.size]


def compute_inputs(
    pipeline: CuvisPipeline, node: Node, batch: dict[str, Any], frame: str
) -> dict[str, Any]:
    """Compute what a node receives for one frame; raises DataError that names both."""
    with _naming(f"{frame} cannot be used for node {node.name}"):
        return node_inputs(pipeline, node, batch)


def annotated(pipeline: CuvisPipeline, batch: dict[str, Any]) -> Tensor | None:
    """Return the annotation of a batch, nonzero where an anomaly is marked.

    What the pipeline's data node makes of it, since that node knows which classes are normal;
    the batch's own ``mask`` where there is no such node. None without annotation.
    """
    if batch.get("mask") is None:
        return None
    for node in pipeline.nodes():
        if annotation := annotation_port(node):
            ports = {port: batch[port] for port in node.INPUT_SPECS if port in batch}
            return node.forward(**ports)[annotation]
    return batch["mask"]


def _selected(pixels: Tensor, *masks: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the pixels that count by all masks, and their indices; None where all of them do."""
    given = [mask.to(pixels.device) for mask in masks if mask is not None]
    if not given:
        return pixels, None
    if any(len(mask) != len(pixels) for mask in given):
        raise ValueError(f"a mask has {len(given[-1])} pixels, the port has {len(pixels)}")
    index = torch.stack(given).all(dim=0).nonzero().flatten()
    return pixels[index], index.cpu()


def _finite_only(pixels: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
    finite = torch.isfinite(pixels).all(dim=-1)
    there = finite.nonzero().flatten().cpu()
    return pixels[finite], there if index is None else index[there]


def _thinned(pixels: Tensor) -> Tensor:
    return pixels[:: max(1, len(pixels) // _PROBES)].cpu().clone()


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turn any error into a DataError that opens with ``what``."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{what}: {one_line(error)}") from error
