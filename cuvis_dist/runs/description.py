"""What is in a trainrun, for a person who looks before running it?"""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from loguru import logger

from cuvis_dist.archive import NamedFrames, open_archive, open_split
from cuvis_dist.errors import CuvisDistError
from cuvis_dist.nodes import upstream
from cuvis_dist.nodes.catalogue import recipe_for
from cuvis_dist.nodes.survey import outline
from cuvis_dist.runs.lock import writer_of
from cuvis_dist.runs.record import RunRecord
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.training.agreement import Head, foresee_training


def describe(trainrun: TrainRun) -> dict[str, Any]:
    """Return what ``cuvis-dist info`` prints: nodes and roles, frames per split, the last run.

    Raises
    ------
    InputError
        If the data module cannot be set up.
    """
    datamodule = trainrun.datamodule()
    treatments = outline(trainrun.pipeline, trainrun.loss_nodes)
    nodes = []
    for node in upstream.topological_order(trainrun.pipeline):
        roles = []
        if node.requires_initial_fit:
            roles.append(f"statistical: {recipe_for(node) or 'streamed'}")
        for key, role in (
            ("unfreeze_nodes", "unfrozen"),
            ("loss_nodes", "loss"),
            ("metric_nodes", "metric"),
        ):
            if node.name in getattr(trainrun.config, key):
                roles.append(role)
        roles.append(treatments[node.name])
        nodes.append((node.name, type(node).__name__, roles))
    frames: dict[str, int | str] = {}
    for split in ("train", "val", "test"):
        try:
            frames[split] = len(open_archive(datamodule, split))
        except CuvisDistError as error:
            logger.debug(str(error))
            frames[split] = "none"
    return {"nodes": nodes, "frames": frames, "last": _last(trainrun)}


def _last(trainrun: TrainRun) -> str:
    """Say how the last run in the output folder stands, or ended; nothing where there was none."""
    try:
        record = RunRecord.load(trainrun.output.location)
    except (CuvisDistError, OSError, ValueError, TypeError, KeyError) as error:
        logger.debug(f"no record of an earlier run: {error}")
        return ""
    words = f"{record.job}, {record.status} since {record.finished or record.started}"
    if record.status == "running" and (writer := writer_of(trainrun.output)):
        words += f", {writer}"
    return f"{words}: {record.error}" if record.error else words


def foresee_nodes(trainrun: TrainRun, datamodule: pl.LightningDataModule) -> dict[str, str]:
    """Return how each node would take part in a training step; reads two frames if it has to.

    Raises
    ------
    InputError
        If the data module cannot serve the train split.
    DataError
        If a frame cannot be read.
    """

    def head() -> Head:
        loader, frames = open_split(datamodule, "train")
        return Head(NamedFrames(loader.dataset, frames), loader.collate_fn)

    return foresee_training(trainrun.pipeline, trainrun.config.loss_nodes, head)
