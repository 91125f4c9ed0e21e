"""What does a worker do with a run of batches? It reads, computes, and forgets the cubes."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.evaluation import forward_split
from cuvis_ai_schemas.execution import Context
from loguru import logger
from torch.utils.data import DataLoader

from cuvis_dist.archive import Archive, NamingCollate, Numbered
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.evaluation.seen import Look, Seen
from cuvis_dist.execution.spread import Order, Row
from cuvis_dist.execution.worker import forget_pipeline
from cuvis_dist.nodes.state import StateWatch, adopt
from cuvis_dist.nodes.survey import evolving_nodes
from cuvis_dist.nodes.upstream import pooled_objects

Port = tuple[str, str] | str
"""A port to keep, as ``pipeline.forward`` takes it: (node, port), or a port of any node."""

Outputs = dict[tuple[str, str], Any]
"""What ``pipeline.forward`` returns, by (node, port)."""


@dataclass(frozen=True)
class Part:
    """Batches ``start .. stop - 1`` of a split; the shard of an evaluation."""

    ordinal: int
    start: int
    stop: int
    staged: str | None = None


@dataclass(frozen=True)
class Evaluated:
    """What a worker computed for a part.

    Attributes
    ----------
    outputs : list of Outputs
        The kept outputs of each batch, tensors on the CPU.
    metric_nodes : dict of str to Node
        Metric nodes with the pooled metrics of this part alone.
    changed : dict of str to Node
        Nodes that the part changed, as they are after it: those whose tensors it changed, and
        those that are carried from part to part.
    seen : Seen or None
        What a person can look at, where that is wanted.
    """

    outputs: list[Outputs]
    metric_nodes: dict[str, Node]
    changed: dict[str, Node]
    seen: Seen | None = None


def load(archive: Archive, batches: list[list[int]]) -> DataLoader:
    """Return a loader of these batches that reads in this process and names bad frames."""
    collate = NamingCollate(archive.collate, archive.dataset.frames)
    frames = Numbered(archive.dataset, archive.dataset.in_time)
    return DataLoader(frames, batch_sampler=batches, collate_fn=collate)


class EvaluatePart:
    """Runs the batches of a part through the pipeline: one row, with an :class:`Evaluated`.

    Parameters
    ----------
    order : Order
        Pipeline and archive.
    batches : list of list of int
        The frames of each batch of the split.
    metric_nodes : tuple of str
        Nodes whose pooled metrics are reset before a part and sent back after it.
    keep : frozenset of Port
        Outputs to send back.
    context : Context
        The context of the first batch of the split.
    carried : dict of str to Node, optional
        Nodes that change with every frame, as the parts before left them.

    Attributes
    ----------
    look : Look or None
        It looks at the batches, where that is wanted.
    """

    ordered = True
    look: Look | None = None

    def __init__(
        self,
        order: Order,
        batches: list[list[int]],
        metric_nodes: tuple[str, ...],
        keep: frozenset[Port],
        context: Context,
        carried: dict[str, Node] | None = None,
    ) -> None:
        self.order, self.batches, self.metric_nodes = order, batches, metric_nodes
        self.keep, self.context, self.carried = keep, context, carried or {}

    def carrying(self, changed: dict[str, Node]) -> EvaluatePart:
        """Return the function for the next part, after one that changed these nodes."""
        after = copy.copy(self)
        after.carried = self.carried | changed
        return after

    def __call__(self, shard: Part) -> list[Row]:
        """Return the row of a part.

        Raises
        ------
        DataError
            If a frame cannot be read, or the pipeline cannot use it.
        """
        archive, pipeline = self.order.open()
        nodes = {node.name: node for node in pipeline.nodes()}
        for name, node in self.carried.items():
            adopt(nodes[name], node)
        if self.carried:  # what was adopted is on the CPU
            pipeline.to("cuda" if self.order.on_gpu else "cpu")
        metric_nodes = {name: nodes[name] for name in self.metric_nodes}
        for node in metric_nodes.values():
            for metric in pooled_objects(node).values():
                metric.reset()
        watch = StateWatch(nodes.values())
        outputs: list[Outputs] = []
        seen = Seen() if self.look else None
        frames, numbered = 0, _Numbered(pipeline, shard.start)
        found: list[str] = []
        try:
            for item in self._forward(numbered, archive, shard):
                frames = item.frames_done
                if seen is not None:
                    seen = self._seen(
                        seen, numbered.batch, item.outputs, shard.start + len(outputs)
                    )
                outputs.append(_kept(item.outputs, self.keep))
        except DataError as error:
            self.order.leave_out(error)
            raise
        except CuvisDistError:
            raise
        except Exception as error:
            batch = self.batches[shard.start + len(outputs)]
            names = ", ".join(str(archive.frames[i]) for i in batch)
            raise DataError(f"{names} cannot be used: {one_line(error)}") from error
        else:
            found = [] if shard.ordinal else self._found_out(numbered)
        finally:
            changed = {node.name: node for node in watch.changed()}
            changed |= {name: nodes[name] for name in (*self.carried, *found)}
            if changed:  # the next part in this process must not start from here
                forget_pipeline()
            pipeline.cpu()
            if self.order.on_gpu:
                torch.cuda.empty_cache()  # the process stays, and training may want the memory
        return [Row(shard.ordinal, Evaluated(outputs, metric_nodes, changed, seen), frames)]

    def _seen(self, seen: Seen, batch: Any, outputs: Outputs, number: int) -> Seen | None:
        """Look at a batch; None, and no other is looked at, where that fails."""
        assert self.look is not None
        positions = self.batches[number]
        frames = self.order.open()[0].frames
        try:
            looked = self.look.batch(batch, outputs, [frames[i] for i in positions], positions)
            return seen.merge(looked, 1, 1)
        except Exception as error:  # nobody's result may depend on it
            logger.debug(f"no pictures of batch {number}: {one_line(error)}")
            return None

    def _found_out(self, numbered: _Numbered) -> list[str]:
        """Return which nodes change with every frame, though nobody said so of their class.

        They run again, on copies, on the last batch of the first part, so that it does not depend
        on the cluster what is found.
        """
        batch = numbered.batch
        if batch is None:
            return []
        return evolving_nodes(numbered.pipeline, lambda: batch, self.context.stage)

    def _forward(self, numbered: Any, archive: Archive, part: Part) -> Iterator[Any]:
        return forward_split(
            numbered,
            load(archive, self.batches[part.start : part.stop]),
            stage=self.context.stage,
            epoch=self.context.epoch,
            global_step=self.context.global_step,
            free_consumed_ports=True,
            keep_ports=self.keep | self.look.judged.ports() if self.look else self.keep,
        )


class _Numbered:
    """The pipeline, its batches counted from ``first``: upstream's loop counts from 0.

    It remembers the last batch that went through.
    """

    def __init__(self, pipeline: CuvisPipeline, first: int) -> None:
        self.pipeline, self._first = pipeline, first
        self.batch: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def forward(self, *, batch: dict[str, Any], context: Context, **options: Any) -> Outputs:
        at = replace(context, batch_idx=context.batch_idx + self._first)
        outputs: Outputs = self.pipeline.forward(batch=batch, context=at, **options)
        self.batch = batch
        return outputs


def _kept(outputs: Outputs, keep: Collection[Port]) -> Outputs:
    """Return the outputs to send back: tensors cloned, since a view would take its cube along."""
    return {
        key: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        for key, value in outputs.items()
        if key in keep or key[1] in keep
    }
