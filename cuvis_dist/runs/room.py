"""Is there room on the disks for what a job will write? Asked before it reads any data.

Only what is sure to be written counts, so that nothing is refused that would have gone well.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.training.config import TrainingConfig

from cuvis_dist.archive import Contents
from cuvis_dist.errors import DataError
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling
from cuvis_dist.scoring.plan import ScorePlan
from cuvis_dist.staging import cache_of
from cuvis_dist.storage import OutputFolder, is_uri, require_free

#: Folders of an earlier try, whose files this one replaces.
_REPLACED = ("checkpoints", "resume", "trained_models")
#: What a file of scores has besides its maps.
_BESIDE_MAPS = 500
#: Frames that are tried to find out how large one is.
_TRIED = 3


def require_room_for_run(trainrun: TrainRun) -> None:
    """Raise ClusterError unless the output folder has room for checkpoints and results."""
    output = trainrun.output.local
    if output is not None:
        needed = bytes_of_run(trainrun) - bytes_replaced(trainrun.output)
        require_free(output, needed, "checkpoints and the saved pipeline")


def bytes_of_run(trainrun: TrainRun) -> int:
    """Return about how many bytes a run writes: its states, and checkpoints with the optimizer's.

    The state of phase 1 and the result are written once each, and the last epoch's again under
    another name before it is replaced.
    """
    nodes, training = list(trainrun.pipeline.nodes()), trainrun.config.training
    state = sum(map(_bytes_of, nodes))
    if training is None:
        return 2 * state
    names = set(trainrun.config.unfreeze_nodes)
    trained = sum(_bytes_of(node) for node in nodes if node.name in names)
    # Adam keeps two more values for each that is trained; others keep fewer.
    moments = 0 if training.optimizer.name.lower() == "sgd" else 2 * trained
    return 2 * state + (2 + _kept(training)) * (state + moments)


def _bytes_of(node: Node) -> int:
    tensors: Iterable[torch.Tensor] = node.state_dict().values()
    return sum(value.nbytes for value in tensors if isinstance(value, torch.Tensor))


def _kept(training: TrainingConfig) -> int:
    """Return how many checkpoints of its own a trainrun keeps in any case."""
    checkpoint = training.callbacks.checkpoint if training.callbacks else None
    if checkpoint is None:
        return 1
    if checkpoint.save_top_k >= 0:
        return min(checkpoint.save_top_k, training.max_epochs)
    stops = training.callbacks and training.callbacks.early_stopping
    steps = checkpoint.every_n_train_steps or checkpoint.train_time_interval
    return 1 if stops or steps else training.max_epochs // (checkpoint.every_n_epochs or 1)


def bytes_replaced(output: OutputFolder) -> int:
    """Return how many bytes an earlier try left that are replaced."""
    names = [name for folder in _REPLACED for name in output.names(folder)]
    return sum(Path(output.at(name)).stat().st_size for name in names)


def require_room_for_scores(trainrun: TrainRun, plan: ScorePlan) -> None:
    """Raise ClusterError unless the output folder has room for the scores that are missing.

    The first frame that can be read says how large they are.
    """
    if plan.folder.local is None:
        return
    archive = plan.archive.only(plan.todo)
    for index in range(min(_TRIED, len(archive))):
        try:
            batch = archive.read(index)
        except DataError:
            continue
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        sizes = [value.shape[1] * value.shape[2] for value in tensors if value.ndim == 4]
        if sizes:
            needed = len(archive) * bytes_of_scores(trainrun, plan.outputs, sizes[0])
            require_free(plan.folder.local, needed, f"the scores of {len(archive)} frames")
        return


def bytes_of_scores(trainrun: TrainRun, outputs: list[tuple[str, str]], pixels: int) -> int:
    """Return about how many bytes the file of a frame has, which has so many pixels."""
    nodes = {node.name: node for node in trainrun.pipeline.nodes()}
    size = _BESIDE_MAPS
    for name, port in outputs:
        spec: Any = nodes[name].OUTPUT_SPECS[port]
        if len(spec.shape) == 4:  # of other shapes there is little
            channels = spec.shape[3] if isinstance(spec.shape[3], int) else 1
            size += pixels * max(1, channels) * getattr(spec.dtype, "itemsize", 1)
    return size


def require_room_for_copies(contents: Contents, scaling: Scaling) -> None:
    """Raise ClusterError unless the largest file at a URI fits where this machine keeps copies.

    The machines of a cluster that is joined have disks of their own.
    """
    sizes = {name: stamp.size for name, stamp in contents.files.items() if is_uri(name)}
    if not sizes or scaling.resources.address or os.environ.get("RAY_ADDRESS"):
        return
    largest = max(sizes, key=lambda name: sizes[name])
    staging = cache_of(scaling)
    there = staging.room.counters().bytes
    require_free(staging.disk.folder, sizes[largest] - there, f"a copy of {largest}")
