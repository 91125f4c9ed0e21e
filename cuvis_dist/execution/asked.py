"""Do the settings ask for workers, and so for a Ray cluster?

Imports nothing that takes long: a command knows it before it has imported cuvis.ai.
"""

from __future__ import annotations

import os
import sys

from cuvis_dist.errors import InputError
from cuvis_dist.scaling import Scaling


def why_workers(scaling: Scaling) -> str | None:
    """Return why work other than training needs workers, or None when that is open."""
    resources = scaling.resources
    if resources.workers == 0:
        return None
    if resources.workers:
        return "they are asked for"
    if resources.train_gpus or scaling.measuring.gpus:
        return "they have GPUs"
    return _cluster(scaling)


def trains_here(scaling: Scaling) -> bool:
    """Whether this process trains: it was asked to, or nothing asks for workers.

    Raises
    ------
    InputError
        If it was asked to, and for what it does not do.
    """
    _refuse_contradictions(scaling)
    resources = scaling.resources
    if "train_workers" in resources.model_fields_set:
        return resources.train_workers == 0
    asks = resources.train_gpus or resources.min_train_workers or scaling.reading.read_ahead
    return not asks and _cluster(scaling) is None


def _cluster(scaling: Scaling) -> str | None:
    """Return why there is a Ray cluster to use, or None when there is none."""
    if scaling.resources.address or os.environ.get("RAY_ADDRESS"):
        return "there is a cluster's address"
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return "this process has a Ray cluster"
    return None


def _refuse_contradictions(scaling: Scaling) -> None:
    resources = scaling.resources
    for setting, number, other, value in (
        ("workers", resources.workers, "measuring.gpus", scaling.measuring.gpus),
        ("train_workers", resources.train_workers, "resources.train_gpus", resources.train_gpus),
        (
            "train_workers",
            resources.train_workers,
            "reading.read_ahead",
            scaling.reading.read_ahead,
        ),
    ):
        if number == 0 and value:
            raise InputError(
                f"resources.{setting} is 0, so that this process does the work, without Ray; "
                f"{other} is {value:g}, which needs workers: ask for 1 or more"
            )
