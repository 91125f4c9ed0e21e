"""What has an epoch logged so far, and how does another process go on with it?

Lightning accumulates logged values in objects of its own, which no checkpoint has. Here they are
plain values: what each was logged with, and what it has come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import move_data_to_device
from pytorch_lightning.trainer.connectors.logger_connector.result import _ResultMetric

#: What ``log`` takes as ``reduce_fx``, by the names by which it is kept.
_REDUCTIONS = {
    **{f"torch.{name}": getattr(torch, name) for name in ("mean", "sum", "max", "min")},
    **{"sum": sum, "max": max, "min": min},
}


def logged(trainer: pl.Trainer) -> dict[str, Any]:
    """Return what one rank has logged, and what callbacks can monitor."""
    connector = trainer._logger_connector
    found = {
        "values": [
            _written(value)
            for value in trainer.fit_loop.epoch_loop._results.values()
            if not value.has_reset
        ],
        "callback": dict(connector._callback_metrics),
        "logged": dict(connector._logged_metrics),
        "bar": dict(connector._progress_bar_metrics),
        "first": connector._first_loop_iter,
        "current": connector._current_fx,
    }
    return move_data_to_device(found, "cpu")


def log_again(trainer: pl.Trainer, module: pl.LightningModule, found: dict[str, Any]) -> None:
    """Let a rank go on with what :func:`logged` returned."""
    connector, results = trainer._logger_connector, trainer.fit_loop.epoch_loop._results
    for each in found["values"]:
        options = {**each["options"], "reduce_fx": _REDUCTIONS[each["options"]["reduce_fx"]]}
        attribute = options["metric_attribute"]
        value = torch.zeros((), device=module.device)
        results.log(
            value=value if attribute is None else module.get_submodule(attribute),
            sync_dist_fn=trainer.strategy.reduce,
            batch_size=1,
            **options,
        )
        metric = results[_key(each)]
        for name, state in move_data_to_device(each["state"], module.device).items():
            setattr(metric, name, state)
    moved = move_data_to_device(found, module.device)
    connector._callback_metrics = moved["callback"]
    connector._logged_metrics = moved["logged"]
    connector._progress_bar_metrics = moved["bar"]
    connector._first_loop_iter, connector._current_fx = found["first"], found["current"]


def for_other_ranks(ranks: Sequence[dict[str, Any]], world_size: int) -> dict[str, Any]:
    """Return what each of another number of ranks goes on with.

    Parameters
    ----------
    ranks : sequence of dict
        What each of the former ranks had :func:`logged`. A value of a training step is that of all
        frames, on all ranks alike; of others each rank has its own, and they are reduced in the
        end.
    world_size : int
        How many ranks there are now.
    """
    everyones = [{_key(value): value for value in each["values"]} for each in ranks]
    values = []
    for key, first in everyones[0].items():
        options, state = first["options"], first["state"]
        alone = len(ranks) == 1 and options["fx"] != "training_step"
        if "value" in state and (options["sync_dist"] or alone):
            parts = torch.stack([each[key]["state"]["value"] for each in everyones if key in each])
            value = _together(parts, options["reduce_fx"], world_size)
            options, state = options | {"sync_dist": True}, state | {"value": value}
        values.append({"options": options, "state": state})
    return {**ranks[0], "values": values}


def reduce_as_asked(trainer: pl.Trainer, key: str, sync_dist: bool) -> None:
    """Let a value that another number of ranks began to log be reduced as it is asked for here."""
    value = trainer.fit_loop.epoch_loop._results.get(key)
    if value is not None:
        value.meta.sync.should = sync_dist and trainer._accelerator_connector.is_distributed


def _together(parts: torch.Tensor, reduction: str, world_size: int) -> torch.Tensor:
    """Return what each rank shall have, so that it comes to the same when it is reduced."""
    if reduction.endswith("max"):
        return parts.amax(0)
    if reduction.endswith("min"):
        return parts.amin(0)
    return parts.mean(0) if reduction.endswith("mean") else parts.sum(0) / world_size


def _key(value: dict[str, Any]) -> str:
    return f"{value['options']['fx']}.{value['options']['name']}"


def _written(metric: _ResultMetric) -> dict[str, Any]:
    meta = metric.meta
    (reduction,) = [name for name, each in _REDUCTIONS.items() if each is meta.reduce_fx]
    names = ("fx", "name", "prog_bar", "logger", "on_step", "on_epoch", "enable_graph")
    options = {name: getattr(meta, name) for name in (*names, "add_dataloader_idx")}
    options |= {
        "reduce_fx": reduction,
        "metric_attribute": meta.metric_attribute,
        "sync_dist": meta.sync.should,
        "rank_zero_only": meta.sync.rank_zero_only,
    }
    state = {**metric.metric_state, "_update_count": metric._update_count}
    return {"options": options, "state": state | {"_forward_cache": metric._forward_cache}}
