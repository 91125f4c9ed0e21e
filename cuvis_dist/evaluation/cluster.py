"""How does a loop of upstream's over a split run on all workers, with no line of it changed?

Upstream's loops (evaluation, calibration) take a pipeline and a loader. Here the loader hands out
which frames make a batch, without reading them, and the pipeline's ``forward`` hands out what a
worker computed for that batch. What is averaged, pooled, counted and reported stays upstream's.

The batches are cut into parts, the shards of an evaluation. A part starts with reset metrics and
sends them back; they are merged in the order of the batches. The parts do not depend on the
cluster, so neither does the result. Where nodes change with every frame (running normalizers,
counters), the parts run one after another and hand that state on: from the start where that is
known of their class, else from the part on which it is found out.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytorch_lightning as pl
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.calibration import calibratable_deciders
from cuvis_ai_schemas.execution import Context
from loguru import logger
from torch.utils.data import DataLoader

from cuvis_dist.archive import Archive, FrameCache, open_split
from cuvis_dist.errors import DataError
from cuvis_dist.evaluation.merging import merge_pooled
from cuvis_dist.evaluation.parts import Evaluated, EvaluatePart, Outputs, Part, Port, load
from cuvis_dist.evaluation.seen import Look, Seen
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.pool import Workers
from cuvis_dist.execution.spread import Engine, Row, spread
from cuvis_dist.execution.where import engine_for
from cuvis_dist.nodes.shown import judged
from cuvis_dist.nodes.state import adopt
from cuvis_dist.nodes.survey import evolving_nodes
from cuvis_dist.nodes.upstream import edges_into
from cuvis_dist.scaling import Scaling

#: At most so many tasks per pass, however many frames: what comes back stays bounded.
MAX_PARTS = 512


class Split:
    """The batches of a split as the data module's own loader makes them, not yet read.

    Iterating yields batches for :class:`ClusterPipeline`; :meth:`loader` is for one process.

    Parameters
    ----------
    datamodule : LightningDataModule
        Set up for ``name`` here.
    name : str
        ``val`` or ``test``.
    cache : FrameCache, optional
        Where each node keeps the frames that it has read.

    Raises
    ------
    InputError
        If the data module cannot serve the split.
    """

    def __init__(
        self, datamodule: pl.LightningDataModule, name: str, cache: FrameCache | None = None
    ) -> None:
        loader, frames = open_split(datamodule, name)
        self.name = name
        self.archive = Archive(loader, frames, cache.of(name) if cache else None)
        self.dataset = self.archive.dataset  # where upstream looks for the number of frames
        self._sampler: Any = loader.batch_sampler

    def batches(self) -> list[list[int]]:
        """Return the frames of each batch; raises DataError unless each frame is in one."""
        batches = [list(batch) for batch in self._sampler]
        served = [index for batch in batches for index in batch]
        if sorted(served) != list(range(len(self.archive))):
            raise DataError(
                f"the {self.name} loader serves {len(set(served))} of {len(self.archive)} frames, "
                f"in {len(served)} readings; every frame must count once. Check its sampler and "
                "drop_last"
            )
        return batches

    def loader(self) -> DataLoader:
        """Return a loader of these batches that reads in this process and names bad frames."""
        return load(self.archive, self.batches())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = self.batches()
        for batch in batches:
            yield {"frames": torch.empty(len(batch)), "split": self, "batches": batches}


class ClusterPipeline:
    """A pipeline whose ``forward`` runs on the workers; in all else it is the pipeline.

    For upstream's ``evaluate_split`` and ``PostFitCallback``, over the batches of a
    :class:`Split`. A finished pass leaves the pipeline's nodes as one process would.

    Parameters
    ----------
    pipeline : CuvisPipeline
        On the CPU.
    metric_nodes : sequence of Node
        Whose pooled metrics are merged.
    scaling : Scaling
        How many workers, on what.

    Attributes
    ----------
    seen : dict of str to Seen, or None
        What people can look at of each evaluated split; None where nobody wants to.
    """

    def __init__(
        self, pipeline: CuvisPipeline, metric_nodes: Sequence[Node], scaling: Scaling
    ) -> None:
        self.pipeline, self.scaling = pipeline, scaling
        self.seen: dict[str, Seen] | None = None
        self.metric_nodes = tuple(node.name for node in metric_nodes)
        self._outputs: Any = iter(())
        self._engine: Engine | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def move_batch_to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Leave the batch as it is: the workers read it."""
        return batch

    def forward(
        self,
        *,
        batch: dict[str, Any],
        context: Context,
        keep_ports: Collection[Port] | None = None,
        **_: Any,
    ) -> Outputs:
        """Return what a worker computed for the batch; the first batch of a pass starts it.

        Raises
        ------
        DataError
            If a frame cannot be read or used, or frames are missing at the end.
        ClusterError
            If a part lost its worker again and again.
        """
        if context.batch_idx == 0:
            self._end_pass()
            self._outputs = self._compute(batch["split"], batch["batches"], context, keep_ports)
        return next(self._outputs)

    def close(self) -> None:
        """End what a pass that was not finished left, and the workers."""
        self._end_pass()
        if self._engine is not None:
            self._engine.close()

    def _end_pass(self) -> None:
        if hasattr(self._outputs, "close"):
            self._outputs.close()

    def _compute(
        self,
        split: Split,
        batches: list[list[int]],
        context: Context,
        keep_ports: Collection[Port] | None,
    ) -> Iterator[Outputs]:
        """Yield the kept outputs of each batch, in order."""
        # Calibration alone names no ports: upstream gives it all of them, cubes too.
        evaluating = keep_ports is not None
        if self._engine is None:
            self._engine = engine_for(Workers.evaluating(self.scaling))
        compute = EvaluatePart(
            self._engine.make_order(self.pipeline, split.archive),
            batches,
            self.metric_nodes if evaluating else (),
            frozenset(keep_ports if keep_ports is not None else calibration_ports(self.pipeline)),
            context,
        )
        if evaluating and self.seen is not None:
            compute.look = Look(judged(self.pipeline), len(split.archive))
        nodes = {node.name: node for node in self.pipeline.nodes()}
        if known := evolving_nodes(self.pipeline, None, context.stage):
            _say_in_order(known, split.name)
            compute = compute.carrying({name: nodes[name] for name in known})
        pooled: list[dict[str, Node]] = []
        frames = done = 0
        for row in self._rows(self._engine, compute, split.name):
            part: Evaluated = row.payload
            frames, done = frames + row.frames, done + len(part.outputs)
            pooled.append(part.metric_nodes)
            if self.seen is not None and part.seen is not None:
                looked = copy.deepcopy(part.seen)  # what comes out of Ray stays there
                self.seen[split.name] = self.seen.get(split.name, Seen()).merge(looked)
            for name, node in part.changed.items():
                adopt(nodes[name], node)
            if done == len(batches):  # upstream reads the metrics after the last batch
                if frames != len(split.archive):
                    raise DataError(
                        f"the {split.name} split lists {len(split.archive)} frames, but {frames} "
                        "went through the pipeline"
                    )
                merge_pooled(nodes, pooled)
            yield from part.outputs

    def _rows(self, engine: Engine, compute: EvaluatePart, split: str) -> Iterator[Row]:
        """Yield the rows of all parts in order, computed side by side until nodes change."""
        parts = cut_into_parts(len(compute.batches))
        while parts:
            some = parts[:1] if compute.carried else parts
            with (
                raise_cause(f"the pass over {split}"),
                closing(spread(some, compute, engine)) as rows,
            ):
                for row in rows:
                    parts = parts[1:]
                    yield row
                    changed = row.payload.changed
                    if changed and not compute.carried:
                        _say_in_order(changed, split)
                    if changed:
                        compute = compute.carrying(changed)
                        break  # what was computed ahead did not start from here


def _say_in_order(names: Iterable[str], split: str) -> None:
    changing = ", ".join(sorted(names))
    logger.info(f"{changing} changes with every frame: {split} is computed in order")


def cut_into_parts(n_batches: int) -> list[Part]:
    """Cut the batches into at most :data:`MAX_PARTS` runs of nearly equal length."""
    n = min(n_batches, MAX_PARTS)
    return [Part(i, n_batches * i // n, n_batches * (i + 1) // n) for i in range(n)]


def calibration_ports(pipeline: CuvisPipeline) -> set[Port]:
    """Return what upstream's calibration collects: the deciders' scores and the mask."""
    scores: set[Port] = {
        (source.name, port)
        for decider in calibratable_deciders(pipeline)
        for source, port, target in edges_into(pipeline, decider)
        if target == "logits"
    }
    return scores | {"mask"}
