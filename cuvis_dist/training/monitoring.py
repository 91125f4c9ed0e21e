"""Will training log what its callbacks and its scheduler wait for? Told before phase 1."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.training.config import TrainingConfig

from cuvis_dist.errors import InputError
from cuvis_dist.misspelt import closest

#: What upstream and Lightning log of every training.
_ALWAYS = ("train_loss", "val_loss", "epoch", "step")
#: How alike a key is to what may be meant: a whole part of it may be another.
_CLOSE = 0.6


def check_monitored(
    config: TrainingConfig, loss_nodes: Sequence[str], metric_nodes: Sequence[str]
) -> None:
    """Refuse to wait for a value that no node logs.

    A loss node logs ``train/<node>`` and ``val/<node>``, a metric node ``<node>/<metric>``; which
    metrics it has shows when it is run.

    Parameters
    ----------
    config : TrainingConfig
        The ``training`` block of a trainrun.
    loss_nodes, metric_nodes : sequence of str
        The names of these nodes.

    Raises
    ------
    InputError
        Naming the setting, what is logged, and what may be meant.
    """
    losses = [f"{stage}/{name}" for stage in ("train", "val") for name in loss_nodes]
    for setting, key in monitored(config).items():
        node, _, metric = key.rpartition("/")
        if key in _ALWAYS or key.startswith(("lr-", *losses)) or (metric and node in metric_nodes):
            continue
        metrics = [f"{name}/{metric or '<metric>'}" for name in metric_nodes]
        logged = [*_ALWAYS[:2], *losses, *metrics]
        close = closest(key, logged, _CLOSE)
        meant = f"; did you mean {close}?" if close else ""
        raise InputError(
            f"training.{setting} is {key!r}, which nothing logs: there are "
            f"{', '.join([*_ALWAYS[:2], *losses, *(f'{name}/<metric>' for name in metric_nodes)])}"
            f"{meant}"
        )


def measuring_nodes(metric_nodes: Iterable[Node]) -> list[str]:
    """Return the names of the metric nodes that log: those that upstream does not pass over."""
    return [
        node.name
        for node in metric_nodes
        if "metrics" in type(node).OUTPUT_SPECS or hasattr(node, "pooled_metrics")
    ]


def monitored(config: TrainingConfig) -> dict[str, str]:
    """Return what must be logged, by the setting that says so."""
    keys: dict[str, str] = {}
    callbacks = config.callbacks
    if callbacks is not None:
        if callbacks.checkpoint is not None and callbacks.checkpoint.save_top_k:
            keys["callbacks.checkpoint.monitor"] = callbacks.checkpoint.monitor
        for number, stopping in enumerate(callbacks.early_stopping):
            if stopping.strict:
                keys[f"callbacks.early_stopping[{number}].monitor"] = stopping.monitor
    scheduler = config.scheduler
    if scheduler is not None and "plateau" in (scheduler.name or "").lower():
        keys["scheduler.monitor"] = scheduler.monitor or "val_loss"
    return keys
