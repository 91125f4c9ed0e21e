"""How does a loop of upstream's over a split run on all workers, with no line of it changed?

Upstream's loops (evaluation, calibration) take a pipeline and a loader. Here the loader hands out
which frames make a batch, without reading them, and the pipeline's ``forward`` hands out what a
worker computed for that batch. What is averaged, pooled, counted and reported stays upstream's.

The batches are cut into parts, each a task that Ray repeats when its worker dies. A part starts
with reset metrics and sends them back; they are merged in the order of the batches. The parts do
not depend on the cluster, so neither does the result. Where nodes turn out to change their tensors
with every frame (running normalizers), the remaining parts run one after another and hand that
state on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import ray
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.calibration import calibratable_deciders
from cuvis_ai_schemas.execution import Context
from loguru import logger
from torch.utils.data import DataLoader

from cuvis_dist.archive import Archive, open_split
from cuvis_dist.errors import DataError
from cuvis_dist.evaluation.merging import merge_pooled
from cuvis_dist.evaluation.parts import Job, Outputs, Part, PartWorker, Port, compute_part, load
from cuvis_dist.execution.failures import raise_cause
from cuvis_dist.execution.worker import places
from cuvis_dist.nodes.state import adopt
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

    Raises
    ------
    InputError
        If the data module cannot serve the split.
    """

    def __init__(self, datamodule: pl.LightningDataModule, name: str) -> None:
        loader, frames = open_split(datamodule, name)
        self.name = name
        self.archive = Archive(loader, frames)
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
    """

    def __init__(
        self, pipeline: CuvisPipeline, metric_nodes: Sequence[Node], scaling: Scaling
    ) -> None:
        self.pipeline, self.scaling = pipeline, scaling
        self.metric_nodes = tuple(node.name for node in metric_nodes)
        self._outputs: Any = iter(())
        self._workers: _Workers | None = None

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
        if self._workers is not None:
            self._workers.close()

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
        job = Job(
            ray.put(split.archive),
            ray.put(self.pipeline),
            self.metric_nodes if evaluating else (),
            frozenset(keep_ports if keep_ports is not None else calibration_ports(self.pipeline)),
            context,
            int(self.scaling.resources.cpus_per_worker),
            self.scaling.resources.train_gpus > 0,
        )
        nodes = {node.name: node for node in self.pipeline.nodes()}
        pooled: list[dict[str, Node]] = []
        frames = done = 0
        for part in self._parts(job, batches, split.name):
            frames, done = frames + part.frames, done + len(part.outputs)
            pooled.append(part.metric_nodes)
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

    def _parts(self, job: Job, batches: list[list[int]], split: str) -> Iterator[Part]:
        """Yield the parts in order, computed side by side until one changes its nodes."""
        cuts = cut_into_parts(len(batches))
        if self._workers is None:
            self._workers = _Workers(self.scaling)
        workers = self._workers
        limit = workers.limit or len(cuts)
        carried: dict[str, Node] = {}
        running: dict[ray.ObjectRef, int] = {}
        done: dict[int, ray.ObjectRef] = {}
        todo = deque(range(len(cuts)))
        try:
            for ordinal in range(len(cuts)):
                while ordinal not in done:
                    while todo and len(running) < limit:
                        cut = cuts[todo[0]]
                        mine = batches[cut.start : cut.stop]
                        running[workers.compute(job, cut.start, mine, carried)] = todo.popleft()
                    (ref,), _ = ray.wait(list(running))
                    done[running.pop(ref)] = ref
                    workers.release(ref)
                with raise_cause(f"the pass over {split}"):
                    part: Part = ray.get(done.pop(ordinal))
                if part.changed and not carried:
                    names = ", ".join(sorted(part.changed))
                    logger.info(f"{names} changes with every frame: {split} is computed in order")
                    workers.cancel(running)
                    running, done, limit = {}, {}, 1
                    todo = deque(range(ordinal + 1, len(cuts)))
                carried = carried | part.changed
                yield part
        finally:
            workers.cancel(running)


class _Workers:
    """Who computes the parts: tasks, or on GPUs actors.

    Ray ends the process of a task that had a GPU, since the next one might be given another; an
    actor keeps both.

    Attributes
    ----------
    limit : int or None
        How many parts may be computed at the same time.
    """

    def __init__(self, scaling: Scaling) -> None:
        options: dict[str, Any] = {
            "num_cpus": scaling.resources.cpus_per_worker,
            "scheduling_strategy": "SPREAD",
        }
        gpus, self.limit = scaling.resources.train_gpus, scaling.resources.workers
        self._task: Any = None
        self._idle: deque[Any] = deque()
        self._busy: dict[ray.ObjectRef, Any] = {}
        if not gpus:
            self._task = ray.remote(max_retries=3, **options)(compute_part)
            return
        self.limit = min(scaling.resources.train_workers, places(gpus))
        options |= {"num_gpus": gpus, "max_restarts": 3, "max_task_retries": 3}
        actor: Any = ray.remote(**options)(PartWorker)
        self._idle.extend(actor.remote() for _ in range(self.limit))

    def compute(self, *args: Any) -> ray.ObjectRef:
        """Start a part, of at most ``limit`` at a time."""
        if self._task is not None:
            return self._task.remote(*args)
        actor = self._idle.popleft()
        ref = actor.compute_part.remote(*args)
        self._busy[ref] = actor
        return ref

    def release(self, ref: ray.ObjectRef) -> None:
        """Note that a part is computed, or no longer wanted."""
        if ref in self._busy:
            self._idle.append(self._busy.pop(ref))

    def cancel(self, refs: Collection[ray.ObjectRef]) -> None:
        """Drop parts that are being computed."""
        for ref in refs:
            ray.cancel(ref)
            self.release(ref)

    def close(self) -> None:
        """End the actors."""
        for actor in [*self._idle, *self._busy.values()]:
            ray.kill(actor)


def cut_into_parts(n_batches: int) -> list[range]:
    """Cut the batches into at most :data:`MAX_PARTS` runs of nearly equal length."""
    n = min(n_batches, MAX_PARTS)
    return [range(n_batches * i // n, n_batches * (i + 1) // n) for i in range(n)]


def calibration_ports(pipeline: CuvisPipeline) -> set[Port]:
    """Return what upstream's calibration collects: the deciders' scores and the mask."""
    scores: set[Port] = {
        (source.name, port)
        for decider in calibratable_deciders(pipeline)
        for source, port, target in edges_into(pipeline, decider)
        if target == "logits"
    }
    return scores | {"mask"}
