"""What is in a trainrun, for a person who looks before running it?"""

from __future__ import annotations

from typing import Any

from loguru import logger

from cuvis_dist.archive import open_archive
from cuvis_dist.errors import CuvisDistError
from cuvis_dist.nodes import upstream
from cuvis_dist.nodes.catalogue import recipe_for
from cuvis_dist.runs.trainrun import TrainRun


def describe(trainrun: TrainRun) -> dict[str, Any]:
    """Return what ``cuvis-dist info`` prints: nodes, their roles, frames per split.

    Raises
    ------
    InputError
        If the data module cannot be set up.
    """
    datamodule = trainrun.datamodule()
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
        nodes.append((node.name, type(node).__name__, roles))
    frames: dict[str, int | str] = {}
    for split in ("train", "val", "test"):
        try:
            frames[split] = len(open_archive(datamodule, split))
        except CuvisDistError as error:
            logger.debug(str(error))
            frames[split] = "none"
    return {"nodes": nodes, "frames": frames}
