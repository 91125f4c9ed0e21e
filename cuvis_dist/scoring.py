"""How does a saved pipeline score an archive? Workers write one file of maps per frame.

A frame's file is written by the worker that computed it, whole or not at all, so that no cube and
no map passes through the driver, and what is there need not be computed again. Frames go through
the pipeline one at a time: a file does not depend on how frames are batched or dealt. Only the
nodes that the outputs depend on run; labels are not needed unless these read them.

Where a node changes with every frame (running normalizers, trackers), a frame's maps depend on
the frames before it: all go through one process, in order, and again from the first one when the
job is continued.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.post_fit import EmitFn
from cuvis_ai_schemas.enums import ExecutionStage, NodeCategory, NodeTag
from cuvis_ai_schemas.execution import Context
from loguru import logger

from cuvis_dist.archive import Archive, Frame, open_archive
from cuvis_dist.errors import ClusterError, CuvisDistError, DataError, InputError, one_line
from cuvis_dist.initialization.passes import make_task, spread
from cuvis_dist.initialization.shards import StatefulNodesError, Task
from cuvis_dist.naming import file_names
from cuvis_dist.output import OutputFolder
from cuvis_dist.record import JobRecord, now
from cuvis_dist.resume import LOCK, only_run, sha256
from cuvis_dist.run import TrainRun, recorded
from cuvis_dist.scaling import Scaling
from cuvis_dist.session import connect, require_resources, terminable
from cuvis_dist.upstream import nodes_before
from cuvis_dist.workers import fetch_once, on_worker, raise_cause, state_mark

#: Ports of these names are written unless others are asked for.
DEFAULT_PORTS = ("scores", "decisions")
_FINGERPRINT, _INDEX = "fingerprint.json", "frames.csv"

OnFrames = Callable[[int, int], None]
"""Called with the number of frames done so far, and of those that there are to do."""


@dataclass(frozen=True)
class ScorePlan:
    """What a job is to write, and what of it is there.

    Attributes
    ----------
    folder : OutputFolder
        ``<output_dir>/scores``.
    archive : Archive
        The frames, each once, in canonical order.
    files : list of str
        Of each frame, relative to ``folder``.
    outputs : list of tuple of str
        Node and port of each map.
    todo : list of int
        The frames whose file is not there.
    leftover : list of str
        Files of an earlier job that go when this one begins.
    fingerprint : dict of str to str
        SHA-256 of each thing that the maps depend on, by name.
    """

    folder: OutputFolder
    archive: Archive
    files: list[str]
    outputs: list[tuple[str, str]]
    todo: list[int]
    leftover: list[str]
    fingerprint: dict[str, str]


def plan_scores(
    trainrun: TrainRun,
    split: str = "predict",
    outputs: str | None = None,
    scaling: Scaling | None = None,
    restart: bool = False,
) -> ScorePlan:
    """Find out what is to be written; reads no frame, and writes nothing.

    Parameters
    ----------
    trainrun : TrainRun
        From ``load_trainrun(..., saved=...)``.
    split : str
        ``train``, ``val``, ``test`` or ``predict``: all frames, unless the splits say otherwise.
    outputs : str, optional
        Ports to write, as ``node.port,node.port``; by default see :func:`ports`.
    restart : bool
        Count nothing as there.

    Raises
    ------
    InputError
        If the data module cannot be set up, an output does not exist, or the folder holds the
        scores of something else.
    """
    named = ports(trainrun.pipeline, outputs)
    archive = _each_once(open_archive(trainrun.datamodule(scaling, fitting=False), split))
    files = file_names(archive.frames, ".npz", taken=(_FINGERPRINT, _INDEX))
    folder = _scores_folder(trainrun)
    data = trainrun.config.data.model_dump(mode="json", include={"data_module", "params"})
    device = "gpu" if scaling and scaling.worker_gpus else "cpu"
    assert trainrun.weights is not None
    saved = Path(trainrun.config.pipeline)
    fingerprint = {
        "pipeline": sha256(saved, trainrun.weights),
        "data": _hash(data),
        "frames": _hash([frame.uid for frame in archive.frames]),
        "outputs": _hash(named),
        "device": _hash(device),
    }
    there = set(folder.names()) - {LOCK}
    earlier = _earlier(folder) if _FINGERPRINT in there else None
    if there and not restart:
        if earlier is None:
            raise InputError(
                f"{folder} holds files, but does not say of which job; choose another output "
                "folder, or --restart to replace them"
            )
        if differ := sorted(name for name in fingerprint if earlier.get(name) != fingerprint[name]):
            raise InputError(
                f"{folder} holds the scores of another {', another '.join(differ)}; choose "
                "another --output-dir, or --restart to replace them"
            )
    done: set[str] = set() if restart else there
    ours = re.compile(r".*\.npz" if restart else r"(.*/)?\.[^/]*\.npz\.\d+")  # of lost workers
    _refuse_links(folder.local, files)
    return ScorePlan(
        folder,
        archive,
        files,
        named,
        [i for i, file in enumerate(files) if file not in done],
        [file for file in sorted(there) if file == _INDEX or ours.fullmatch(file)],
        fingerprint,
    )


def score_archive(
    trainrun: TrainRun,
    split: str = "predict",
    outputs: str | None = None,
    scaling: Scaling | None = None,
    on_frames: OnFrames | None = None,
    verbose: bool = False,
    restart: bool = False,
) -> JobRecord:
    """Write ``<output_dir>/scores/<recording>/<index>.npz`` for each frame of a split.

    A file has one array per output, named ``<node>.<port>``, as the node computes it for a batch
    of one frame, without the axis of the batch (``[H, W, 1]`` float32 scores, bool decisions),
    and the frame's ``uid``. It is not compressed: that saved a third of a score map's size and
    took 30 times as long. ``scores/frames.csv`` says which file belongs to which frame.

    Frames whose file is there are left as they are. Options are those of :func:`plan_scores`;
    ``on_error`` and ``max_skipped`` of ``scaling`` say what happens to frames that cannot be used.

    Returns
    -------
    JobRecord
        As in ``<output_dir>/result.json``: ``frames`` listed, ``written``, ``there`` before, and
        ``skipped`` with reasons, by uid.

    Raises
    ------
    CuvisDistError
        With a message for people; ``result.json`` then says ``failed``, and finished files stay.
    """
    with only_run(_scores_folder(trainrun)):
        return _score_alone(
            trainrun,
            split,
            outputs,
            scaling or Scaling(),
            on_frames or (lambda done, total: None),
            verbose,
            restart,
        )


def _score_alone(
    trainrun: TrainRun,
    split: str,
    outputs: str | None,
    scaling: Scaling,
    on_frames: OnFrames,
    verbose: bool,
    restart: bool,
) -> JobRecord:
    started = time.perf_counter()
    values = {"pipeline": trainrun.config.pipeline, "split": split}
    record = JobRecord("score", trainrun.output, values)
    record.begin()
    with recorded(record), terminable():
        plan = plan_scores(trainrun, split, outputs, scaling, restart)
        for file in plan.leftover:
            plan.folder.remove(file)
        content = json.dumps(plan.fingerprint, indent=2) + "\n"
        plan.folder.write(_FINGERPRINT, content.encode())
        tally = _Tally(plan, scaling.max_skipped)
        record.values |= {
            "scores": str(plan.folder),
            "outputs": [".".join(port) for port in plan.outputs],
            "frames": len(plan.archive),
            "there": len(plan.archive) - len(plan.todo),
        }
        try:
            if plan.todo:
                with terminable():  # Ray sets a handler of its own
                    connect(scaling, verbose)
                    require_resources(scaling, training=False)
                _compute(trainrun.pipeline, plan, scaling, tally, on_frames)
        finally:
            record.values |= {"written": tally.written, "skipped": tally.skipped}
            record.values["seconds"] = round(time.perf_counter() - started, 3)
        tally.close()
        _write_index(plan, tally.skipped)
        record.status, record.exit_code, record.finished = "done", 0, now()
        record.write()
    return record


# ---- what is written -------------------------------------------------------------------


def ports(pipeline: CuvisPipeline, names: str | None = None) -> list[tuple[str, str]]:
    """Return node and port of each output, in the pipeline's order.

    Parameters
    ----------
    names : str, optional
        ``node.port,node.port``; by default every port called ``scores`` or ``decisions``.

    Raises
    ------
    InputError
        If one does not exist or is no array, with those that there are.
    """
    known = [
        (node.name, port)
        for node in pipeline.nodes()
        if node.should_execute(ExecutionStage.INFERENCE)
        and node.get_category() is not NodeCategory.SINK
        for port, spec in node.OUTPUT_SPECS.items()
        if not isinstance(spec, list) and spec.dtype not in (list, dict, str)
    ]
    there = f"There are: {', '.join('.'.join(port) for port in known)}"
    if names is None:
        found = [port for port in known if port[1] in DEFAULT_PORTS]
        if not found:
            raise InputError(
                f"the pipeline {pipeline.name} has no port called scores or decisions; name what "
                f"to write with --outputs. {there}"
            )
        return found
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in {".".join(port) for port in known}]
    if unknown or not wanted:
        raise InputError(
            f"the pipeline {pipeline.name} has no output {', '.join(unknown) or 'named'}. {there}"
        )
    return [port for port in known if ".".join(port) in wanted]


def _each_once(archive: Archive) -> Archive:
    """Return the archive without frames that ``samples_per_frame`` repeats."""
    first: dict[str, int] = {}
    for index, frame in enumerate(archive.frames):
        other = archive.frames[first.setdefault(frame.uid, index)]
        if other != frame:
            raise InputError(f"two frames have one uid, {frame.uid}: {other.path} and {frame.path}")
    return archive.only(list(first.values()))


def _scores_folder(trainrun: TrainRun) -> OutputFolder:
    place = trainrun.output.at("scores")
    if isinstance(place, Path):
        _refuse_links(place, [])
    return OutputFolder(place)


def _earlier(folder: OutputFolder) -> dict[str, str] | None:
    try:
        return dict(json.loads(folder.read(_FINGERPRINT)))
    except (OSError, ValueError, TypeError):
        return None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _refuse_links(folder: Path | None, files: list[str]) -> None:
    """Raise InputError if a link stands where a local folder of scores belongs."""
    if folder is None:
        return
    for path in (folder, *(folder / name for name in {os.path.dirname(f) for f in files})):
        if path.is_symlink():
            raise InputError(
                f"{path} is a link to {os.path.realpath(path)}; scores are written to the output "
                "folder alone. Remove the link, or choose another --output-dir"
            )


def _write_index(plan: ScorePlan, skipped: dict[str, str]) -> None:
    """Say which file belongs to which frame."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["uid", "recording", "file"])
    for frame, file in zip(plan.archive.frames, plan.files, strict=True):
        table.writerow([frame.uid, frame.recording, "" if frame.uid in skipped else file])
    plan.folder.write(_INDEX, text.getvalue().encode())


class _Tally:
    """Counts twice: frames listed are files written plus frames skipped, and all files are there.

    Parameters
    ----------
    plan : ScorePlan
        What was to be written.
    max_skipped : int
        How many frames may be left out.
    """

    def __init__(self, plan: ScorePlan, max_skipped: int) -> None:
        self.plan, self.max_skipped = plan, max_skipped
        self.clear()

    def clear(self) -> None:
        """Count from the beginning."""
        self.written = 0
        self.skipped: dict[str, str] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Count a row; raises DataError when too many frames were skipped."""
        self.written += row["written"]
        for uid, reason in pickle.loads(row["skipped"]):
            logger.warning(f"skipped: {reason}")
            self.skipped[uid] = reason
        if len(self.skipped) > self.max_skipped:
            raise DataError(
                f"{len(self.skipped)} frames cannot be used, more than max_skipped "
                f"({self.max_skipped}). The last: {list(self.skipped.values())[-1]}"
            )

    @property
    def done(self) -> int:
        """Frames dealt with."""
        return self.written + len(self.skipped)

    def close(self) -> None:
        """Raise DataError unless every frame was skipped or has its file."""
        there = set(self.plan.folder.names())
        frames = zip(self.plan.archive.frames, self.plan.files, strict=True)
        lost = [f"{frame}" for frame, file in frames if file not in there]
        if self.done != len(self.plan.todo) or len(lost) != len(self.skipped):
            raise DataError(
                f"of {len(self.plan.todo)} frames {self.written} were written and "
                f"{len(self.skipped)} skipped, but {len(lost)} have no file in {self.plan.folder}"
                f"{': ' if lost else ''}{', '.join(lost[:3])}"
            )


# ---- on the workers --------------------------------------------------------------------


def _compute(
    pipeline: CuvisPipeline, plan: ScorePlan, scaling: Scaling, tally: _Tally, on_frames: OnFrames
) -> None:
    """Let the workers write what is missing: side by side, or in order where that matters."""
    only_for(pipeline, plan.outputs)
    reason = _tracking(pipeline)
    if reason is None:
        some = plan.archive.only(plan.todo)
        files = [plan.files[i] for i in plan.todo]
        job = ScoreShard(
            make_task(pipeline, some, scaling), ray.put(files), plan.folder, plan.outputs
        )
        try:
            with raise_cause("scoring"):
                for row in spread(some.shards(scaling.shard_frames), job, scaling):
                    if row["error"]:
                        raise _error(row)
                    tally.add(row)
                    on_frames(tally.done, len(plan.todo))
            return
        except StatefulNodesError as error:
            reason = str(error)
    logger.warning(
        f"{reason} changes with every frame: all frames are computed in order, in one process"
    )
    todo = set(plan.todo)
    files = [file if i in todo else "" for i, file in enumerate(plan.files)]
    task = make_task(pipeline, plan.archive, scaling)
    tally.clear()

    def deliver(done: Any) -> None:
        on_frames(done, len(plan.archive))

    row = on_worker(
        _score_in_order,
        ScoreShard(task, ray.put(files), plan.folder, plan.outputs, carries_state=True),
        len(plan.archive),
        scaling.max_skipped,
        emit=deliver,
        scaling=scaling,
        gpus=scaling.worker_gpus,
        retries=3,
    )
    tally.add(row)


def only_for(pipeline: CuvisPipeline, outputs: list[tuple[str, str]]) -> None:
    """Let only the nodes run that the outputs depend on: no sinks, metrics or losses."""
    names = {node for node, _ in outputs}
    targets = [node for node in pipeline.nodes() if node.name in names]
    needed = nodes_before(pipeline, targets) | set(targets)
    for node in pipeline.nodes():
        if node not in needed:
            node.should_execute = _never


def _never(stage: object) -> bool:
    return False


def _running(pipeline: CuvisPipeline) -> list[Node]:
    return [n for n in pipeline.nodes() if n.should_execute(ExecutionStage.INFERENCE)]


def _tracking(pipeline: CuvisPipeline) -> str | None:
    """Name a node that depends on the frames before, whatever its tensors say."""
    found = (node.name for node in _running(pipeline) if NodeTag.TRACKING in node.get_tags())
    return next(found, None)


class ScoreShard:
    """Scores a shard and writes its files: one row that says how many, or what went wrong.

    Parameters
    ----------
    task : Task
        Pipeline and archive.
    files : ObjectRef of list of str
        The file of each frame, relative to ``folder``; empty where it is there already.
    folder : OutputFolder
        ``<output_dir>/scores``.
    outputs : list of tuple of str
        Node and port of each map.
    carries_state : bool
        Frames come in order, and what nodes keep of one is for the next.
    """

    ordered = False

    def __init__(
        self,
        task: Task,
        files: Any,
        folder: OutputFolder,
        outputs: list[tuple[str, str]],
        carries_state: bool = False,
    ) -> None:
        self.task, self.files, self.folder, self.outputs = task, files, folder, outputs
        self.carries_state = carries_state

    def __call__(self, shard: dict[str, int]) -> list[dict[str, Any]]:
        """Return the row of ``shard``."""
        written, skipped = 0, []
        try:
            for uid, reason in self.frames(range(shard["start"], shard["stop"])):
                if reason:
                    skipped.append((uid, reason))
                else:
                    written += 1
        except CuvisDistError as error:
            return [_row(error=str(error), kind=type(error).__name__)]
        return [_row(written=written, skipped=pickle.dumps(skipped))]

    def frames(self, indices: range) -> Iterator[tuple[str, str]]:
        """Score frames and write their files; yields each one's uid, and why it was skipped.

        Raises
        ------
        DataError
            If a frame cannot be used, and none may be skipped.
        StatefulNodesError
            Before a file is written that depends on the frames before.
        """
        archive, pipeline = self.task.open()
        files = fetch_once(self.files)
        running = _running(pipeline)
        for module in pipeline.torch_layers:
            module.eval()
        before = {node.name: state_mark(node) for node in running}
        for index in indices:
            frame = archive.frames[index]
            try:
                maps = self._maps(pipeline, archive, index)
            except DataError as error:
                if not self.task.skip:
                    raise
                yield frame.uid, str(error)
                continue
            if not self.carries_state:
                changed = [n.name for n in running if state_mark(n) != before[n.name]]
                if changed:
                    raise StatefulNodesError(", ".join(sorted(changed)))
            if files[index]:
                self._write(files[index], frame, maps)
            yield frame.uid, ""

    @torch.no_grad()
    def _maps(self, pipeline: CuvisPipeline, archive: Archive, index: int) -> dict[str, np.ndarray]:
        batch = archive.read(index)
        try:
            outputs = pipeline.forward(
                batch=pipeline.move_batch_to_device(batch),
                context=Context(stage=ExecutionStage.INFERENCE, batch_idx=index, global_step=index),
                free_consumed_ports=True,
                keep_ports=self.outputs,
            )
            return {".".join(port): _array(outputs[port]) for port in self.outputs}
        except Exception as error:
            raise DataError(f"{archive.frames[index]} cannot be used: {one_line(error)}") from error

    def _write(self, file: str, frame: Frame, maps: dict[str, np.ndarray]) -> None:
        _refuse_links(self.folder.local, [file])
        content = io.BytesIO()
        arrays: dict[str, Any] = maps | {"uid": np.array(frame.uid)}
        np.savez(content, **arrays)
        try:
            self.folder.write(file, content.getvalue())
        except OSError as error:
            raise ClusterError(
                f"the scores of {frame} cannot be written to {self.folder.at(file)}: "
                f"{one_line(error)}"
            ) from error


def _array(value: torch.Tensor) -> np.ndarray:
    array = value.detach().cpu().numpy()
    return array[0] if array.ndim and len(array) == 1 else array


def _row(**values: Any) -> dict[str, Any]:
    """Return a row with every column, since blocks must share a schema."""
    return {"error": "", "kind": "", "written": 0, "skipped": pickle.dumps([]), **values}


def _error(row: dict[str, Any]) -> CuvisDistError:
    """Return the error that a worker's row stands for."""
    kinds = (DataError, InputError, ClusterError, StatefulNodesError)
    by_name: dict[str, type[CuvisDistError]] = {kind.__name__: kind for kind in kinds}
    return by_name.get(row.get("kind", ""), CuvisDistError)(row["error"])


def _score_in_order(job: ScoreShard, frames: int, max_skipped: int, emit: EmitFn) -> dict[str, Any]:
    """Score all frames in this process and return one row for them."""
    files, written, skipped = fetch_once(job.files), 0, []
    say: Any = emit
    for done, (uid, reason) in enumerate(job.frames(range(frames)), 1):
        if reason:
            if not files[done - 1]:  # what follows would begin from another state
                raise DataError(f"{reason}. Its scores are there, but not those of later frames")
            skipped.append((uid, reason))
            if len(skipped) > max_skipped:
                break
        elif files[done - 1]:
            written += 1
        if done % math.ceil(frames / 100) == 0:
            say(done)
    return _row(written=written, skipped=pickle.dumps(skipped))
