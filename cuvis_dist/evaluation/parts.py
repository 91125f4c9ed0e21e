"""What does a worker do with a run of batches? It reads, computes, and forgets the cubes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import ray
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.evaluation import forward_split
from cuvis_ai_schemas.execution import Context
from torch.utils.data import DataLoader

from cuvis_dist.archive import Archive
from cuvis_dist.errors import CuvisDistError, DataError, one_line
from cuvis_dist.execution.worker import fetch_once, prepare_worker
from cuvis_dist.nodes.state import adopt, state_mark
from cuvis_dist.nodes.upstream import pooled_objects

Port = tuple[str, str] | str
"""A port to keep, as ``pipeline.forward`` takes it: (node, port), or a port of any node."""

Outputs = dict[tuple[str, str], Any]
"""What ``pipeline.forward`` returns, by (node, port)."""


@dataclass(frozen=True)
class Job:
    """What a pass asks of every worker: archive and pipeline by reference, and settings.

    Attributes
    ----------
    metric_nodes : tuple of str
        Whose pooled metrics are reset before a part and sent back after it.
    keep : frozenset of Port
        Outputs to send back.
    context : Context
        Of the first batch of the split.
    """

    archive: Any
    pipeline: Any
    metric_nodes: tuple[str, ...]
    keep: frozenset[Port]
    context: Context
    threads: int
    on_gpu: bool


@dataclass(frozen=True)
class Part:
    """What a worker computed for a run of batches.

    Attributes
    ----------
    outputs : list of Outputs
        The kept outputs of each batch, tensors on the CPU.
    frames : int
        Frames that went through the pipeline.
    metric_nodes : dict of str to Node
        With the pooled metrics of this part alone.
    changed : dict of str to Node
        Nodes whose tensors the part changed, as they are after it.
    """

    outputs: list[Outputs]
    frames: int
    metric_nodes: dict[str, Node]
    changed: dict[str, Node]


def load(archive: Archive, batches: list[list[int]]) -> DataLoader:
    """Return a loader of these batches that reads in this process and names bad frames."""
    return DataLoader(archive.dataset, batch_sampler=batches, collate_fn=archive.collate)


def compute_part(job: Job, first: int, batches: list[list[int]], carried: dict[str, Node]) -> Part:
    """Run batches through the pipeline; a task, which may be repeated.

    Parameters
    ----------
    job : Job
        The pass.
    first : int
        Index of the first of these batches in the split.
    batches : list of list of int
        Frames of each batch.
    carried : dict of str to Node
        Nodes that the parts before changed.

    Raises
    ------
    DataError
        If a frame cannot be read, or the pipeline cannot use it.
    """
    prepare_worker(job.threads)
    archive, pipeline = fetch_once(job.archive), _fetch_pipeline(job.pipeline)
    nodes = {node.name: node for node in pipeline.nodes()}
    for name, node in carried.items():
        adopt(nodes[name], node)
    pipeline.to("cuda" if job.on_gpu else "cpu")
    metric_nodes = {name: nodes[name] for name in job.metric_nodes}
    for node in metric_nodes.values():
        for metric in pooled_objects(node).values():
            metric.reset()
    before = {name: state_mark(node) for name, node in nodes.items()}
    numbered: Any = _Numbered(pipeline, first)
    outputs: list[Outputs] = []
    frames = 0
    try:
        for item in forward_split(
            numbered,
            load(archive, batches),
            stage=job.context.stage,
            epoch=job.context.epoch,
            global_step=job.context.global_step,
            free_consumed_ports=True,
            keep_ports=job.keep,
        ):
            frames = item.frames_done
            outputs.append(_kept(item.outputs, job.keep))
    except CuvisDistError:
        raise
    except Exception as error:
        names = ", ".join(str(archive.frames[i]) for i in batches[len(outputs)])
        raise DataError(f"{names} cannot be used: {one_line(error)}") from error
    finally:
        changed = {name: node for name, node in nodes.items() if state_mark(node) != before[name]}
        if changed:  # the next part in this process must not start from here
            _fetch_pipeline.cache_clear()
        pipeline.cpu()
        if job.on_gpu:
            torch.cuda.empty_cache()  # the process stays, and training may want the memory
    return Part(outputs, frames, metric_nodes, changed)


class PartWorker:
    """An actor that computes parts, one after another."""

    def compute_part(self, *args: Any) -> Part:
        """Compute a part; see :func:`compute_part`."""
        return compute_part(*args)


@lru_cache(maxsize=1)
def _fetch_pipeline(ref: Any) -> CuvisPipeline:
    """Return the pipeline, the same one for every part in this process that leaves it as it was."""
    return ray.get(ref)


class _Numbered:
    """The pipeline, its batches counted from ``first``: upstream's loop counts from 0."""

    def __init__(self, pipeline: CuvisPipeline, first: int) -> None:
        self._pipeline, self._first = pipeline, first

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def forward(self, *, context: Context, **options: Any) -> Outputs:
        index = context.batch_idx + self._first
        return self._pipeline.forward(context=replace(context, batch_idx=index), **options)


def _kept(outputs: Outputs, keep: Collection[Port]) -> Outputs:
    """Return the outputs to send back: tensors cloned, since a view would take its cube along."""
    return {
        key: value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value
        for key, value in outputs.items()
        if key in keep or key[1] in keep
    }
