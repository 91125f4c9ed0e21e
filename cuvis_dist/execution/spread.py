"""How does work on the shards of an archive reach all workers, and what comes back?

Ray Data runs a function on each shard; rows come back, of plain values. Problems come back as rows,
too, and not as exceptions: Ray would retry those, or drop work without saying which.
"""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import ray
import ray.data
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cuvis_dist.archive import Archive, Shard
from cuvis_dist.errors import ClusterError, CuvisDistError, DataError, InputError, one_line
from cuvis_dist.execution.failures import causes
from cuvis_dist.execution.worker import attempts_before, fetch_once, places, prepare_worker
from cuvis_dist.scaling import Scaling

#: How many other nodes are asked for a recording that one cannot read.
_OTHER_NODES = 3
#: Tasks at most, unless there are very many workers, which need some each.
_TASKS, _TASKS_PER_WORKER = 1000, 32


class StatefulNodesError(CuvisDistError):
    """Nodes before those that are asked for change their state with every frame."""


class UnreadableError(DataError):
    """A file that this node cannot read; another one may have it."""


@dataclass(frozen=True)
class Task:
    """What a pass asks of every worker.

    Attributes
    ----------
    archive, pipeline : ObjectRef
        As they are at the start of the pass.
    threads : int
        Of a worker.
    skip : bool
        Leave out frames that cannot be used.
    probed : int
        Up to this ordinal shards send pixels to check affine maps on. Those of the first shard
        with a frame are used, and only so many can be without one.
    pixels : str
        Which count.
    on_gpu : bool
        Compute there.
    elsewhere : bool
        Whether another node can be asked for what this one cannot read.
    """

    archive: Any
    pipeline: Any
    threads: int
    skip: bool
    probed: int
    pixels: str
    on_gpu: bool
    elsewhere: bool

    def leave_out(self, error: DataError) -> None:
        """Return if a frame with this error may be left out.

        Raises
        ------
        UnreadableError
            If another node may be able to read it.
        DataError
            The error, if no frame may be left out.
        """
        # The file system said no: a path that is missing here may exist elsewhere.
        if self.elsewhere and any(isinstance(cause, OSError) for cause in causes(error)):
            raise UnreadableError(str(error)) from error
        if not self.skip:
            raise error

    def open(self) -> tuple[Archive, CuvisPipeline]:
        """Prepare this process and return archive and pipeline, the same ones for every shard."""
        prepare_worker(self.threads)
        pipeline = fetch_once(self.pipeline)
        if self.on_gpu:
            pipeline.to("cuda")
        return fetch_once(self.archive), pipeline


def make_task(pipeline: CuvisPipeline, archive: Archive, scaling: Scaling) -> Task:
    """Put the pipeline as it is now, and the archive, where every worker can fetch them."""
    threads = math.floor(scaling.resources.cpus_per_worker)
    skip, on_gpu = scaling.measuring.on_error == "skip", scaling.measuring.gpus > 0
    elsewhere = len(_readers(scaling)) > 1
    refs = ray.put(archive), ray.put(pipeline)
    probed = scaling.measuring.max_skipped if skip else 0
    return Task(*refs, threads, skip, probed, scaling.measuring.pixels, on_gpu, elsewhere)


def _readers(scaling: Scaling) -> list[str]:
    """Return the ids of the nodes that can run a worker."""
    need = {"CPU": scaling.resources.cpus_per_worker, "GPU": scaling.measuring.gpus}
    return [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and all(node["Resources"].get(k, 0) >= v for k, v in need.items())
    ]


class _OneByOne:
    """Runs a function on the shards of a task, one after another."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the rows of all shards of the task; what is raised becomes a row."""
        for shard in task["shards"]:
            try:
                yield from self.function(shard)
            except CuvisDistError as error:
                yield make_row(shard["ordinal"], error=str(error), kind=type(error).__name__)
            except Exception as error:  # such as a class that this node cannot import
                yield make_row(shard["ordinal"], error=f"a worker failed: {one_line(error)}")


def make_row(ordinal: int, **values: Any) -> dict[str, Any]:
    """Return a row with every column, since blocks must share a schema.

    Parameters
    ----------
    ordinal : int
        Of the shard.
    values
        ``frames`` dealt with and their ``bytes``; ``peak`` memory of the process in bytes;
        ``skipped``: pickled pairs of uid and reason; ``partials``, ``first_frame``, ``samples`` as
        the function likes.
    """
    counts = {"frames": 0, "bytes": 0, "peak": 0}
    data = {"first_frame": "", "partials": [b""], "samples": b"", "skipped": pickle.dumps([])}
    node = ray.get_runtime_context().get_node_id()
    known = {"ordinal": ordinal, "again": attempts_before() > 0, "node": node}
    return {**known, "error": "", "kind": "", **counts, **data, **values}


_KINDS: dict[str, type[CuvisDistError]] = {
    kind.__name__: kind
    for kind in (InputError, DataError, ClusterError, StatefulNodesError, UnreadableError)
}


def _error(row: dict[str, Any], *tried: str) -> CuvisDistError:
    """Return the error that a row stands for; it names the nodes, where there are several.

    Parameters
    ----------
    tried : str
        Ids of nodes that could not read the frame before.
    """
    kind, text = _KINDS.get(row["kind"], CuvisDistError), row["error"]
    address = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    if issubclass(kind, DataError) and len(address) > 1:
        nodes = (address.get(node, node) for node in [*tried, row["node"]])
        text = f"{text} (on node {', '.join(nodes)})"
    return kind(text)


def _elsewhere(
    row: dict[str, Any], function: Any, shard: Shard, scaling: Scaling
) -> dict[str, Any]:
    """Run a shard whose recording a node cannot read on other nodes; return the row of one.

    The last node that is tried decides whether the frame is skipped.

    Raises
    ------
    DataError
        If none of them can read it; the message names them.
    """
    tried = [row["node"]]
    others = [node for node in _readers(scaling) if node not in tried][:_OTHER_NODES]
    for node in others:
        logger.warning(f"{_error(row)}; another node is asked")
        there = copy.copy(function)
        # Actors keep their GPUs, so this runs beside them, on the CPU and with its rounding.
        there.task = replace(function.task, elsewhere=node != others[-1], on_gpu=False)
        options: dict[str, Any] = {
            "num_cpus": 0 if scaling.measuring.gpus else scaling.resources.cpus_per_worker,
            "max_retries": 3,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=True),
        }
        (row,) = ray.get(ray.remote(**options)(_run).remote(there, _as_row(shard)))
        if not row["error"]:
            return row | {"again": True}
        if row["kind"] != UnreadableError.__name__:
            break
        tried.append(row["node"])
    raise _error(row, *(node for node in tried if node != row["node"]))


def _run(function: Any, shard: dict[str, int]) -> list[dict[str, Any]]:
    return list(_OneByOne(function)({"shards": [shard]}))


def _as_row(shard: Shard) -> dict[str, int]:
    return {"ordinal": shard.ordinal, "start": shard.start, "stop": shard.stop}


def share_files(shards: list[Shard], at_least: int) -> list[range]:
    """Cut the shards into tasks, each of one staged file; more per file if files are few.

    Parameters
    ----------
    shards : list of Shard
        In canonical order.
    at_least : int
        How many tasks keep the workers busy to the end.
    """
    runs: list[range] = []
    for i, shard in enumerate(shards):
        if runs and shard.staged and shard.staged == shards[i - 1].staged:
            runs[-1] = range(runs[-1].start, i + 1)
        else:
            runs.append(range(i, i + 1))
    pieces = math.ceil(at_least / len(runs))
    return [
        run[len(run) * k // n : len(run) * (k + 1) // n]
        for run in runs
        for n in [min(pieces, len(run))]
        for k in range(n)
    ]


def spread(shards: list[Shard], function: Any, scaling: Scaling) -> Iterator[dict[str, Any]]:
    """Run ``function`` on every shard, and yield its rows as they come.

    A task takes one shard; those of one file that has to be staged, so that few nodes fetch it; or
    several where there are very many: Ray Data needs some ten milliseconds of the driver for each
    task. (Not where the rows carry cubes.)

    Parameters
    ----------
    function : callable
        Takes a shard as ``ordinal``, ``start`` and ``stop``, and returns rows as :func:`make_row`
        makes them. Has ``ordered`` (whether rows come in the order of the shards) and ``task``.

    Raises
    ------
    DataError
        If a frame cannot be used, on this node or others.
    CuvisDistError
        What else the function raised.
    """
    cpus = ray.cluster_resources().get("CPU", 1) / scaling.resources.cpus_per_worker
    runs = share_files(shards, 4 * math.ceil(scaling.resources.workers or cpus))
    tasks = max(_TASKS, int(_TASKS_PER_WORKER * (scaling.resources.workers or cpus)))
    each = 1 if function.ordered else math.ceil(len(runs) / tasks)
    rows = []
    for first in range(0, len(runs), each):
        start, stop = runs[first].start, runs[first : first + each][-1].stop
        rows.append({"shards": [_as_row(shard) for shard in shards[start:stop]]})
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).flat_map(
        **_on_workers(function, len(rows), scaling), num_cpus=scaling.resources.cpus_per_worker
    )
    dataset.context.execution_options.preserve_order = function.ordered
    dataset.context.enable_progress_bars = False
    by_ordinal = {shard.ordinal: shard for shard in shards}
    for row in dataset.iter_rows():
        if row["kind"] == UnreadableError.__name__:
            row = _elsewhere(row, function, by_ordinal[row["ordinal"]], scaling)
        if row["error"]:
            raise _error(row)
        yield row


def _on_workers(function: Any, tasks: int, scaling: Scaling) -> dict[str, Any]:
    """Return how Ray Data shall run the function: in tasks, or in actors where GPUs are used.

    Ray ends the process of a task that had a GPU, and a new one would need ten seconds to import
    what it runs.
    """
    if not scaling.measuring.gpus:
        size = min(scaling.resources.workers, tasks) if scaling.resources.workers else None
        return {"fn": _OneByOne(function), "compute": ray.data.TaskPoolStrategy(size=size)}
    size = min(scaling.resources.workers or tasks, tasks, places(scaling.measuring.gpus))
    pool = ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
    return {
        "fn": _OneByOne,
        "fn_constructor_args": [function],
        "compute": pool,
        "num_gpus": scaling.measuring.gpus,
    }


class Tally:
    """Counts what came back, twice: frames listed are frames measured plus frames skipped.

    Parameters
    ----------
    listed : int
        Frames that were asked for.
    max_skipped : int
        How many frames may be left out.
    """

    def __init__(self, listed: int, max_skipped: int) -> None:
        self.listed, self.max_skipped = listed, max_skipped
        self.clear()

    def clear(self) -> None:
        """Count from the beginning."""
        self.frames = self.bytes = self.peak = self.left_out = 0
        self.skipped: dict[str, str] = {}
        self.repeated: set[int] = set()

    def add(self, row: dict[str, Any]) -> None:
        """Count a row; raises DataError when too many frames were skipped."""
        self.frames += row["frames"]
        self.bytes += row["bytes"]
        self.peak = max(self.peak, row["peak"])
        if row["again"]:
            self.repeated.add(row["ordinal"])
        for uid, reason in pickle.loads(row["skipped"]):
            logger.warning(f"skipped: {reason}")
            self.skipped[uid] = reason
            self.left_out += 1  # a frame that samples_per_frame repeats has one uid
        if self.left_out > self.max_skipped:
            raise DataError(
                f"{self.left_out} frames cannot be used, more than max_skipped "
                f"({self.max_skipped}). The last: {list(self.skipped.values())[-1]}"
            )

    @property
    def done(self) -> int:
        """Frames dealt with."""
        return self.frames + self.left_out

    def close(self) -> None:
        """Raise DataError unless every frame of the archive was measured or skipped."""
        if self.done != self.listed:
            raise DataError(
                f"the archive lists {self.listed} frames, but {self.frames} were measured "
                f"and {self.left_out} skipped"
            )
        if not self.frames:
            raise DataError(f"none of {self.listed} frames could be used")
