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
        metric = results[f"{options['fx']}.{options['name']}"]
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
        What each of the former ranks had :func:`logged`. A value that they reduced in each step
        is the same on all of them; of one that is reduced at the epoch's end each has its part.
    world_size : int
        How many ranks there are now.
    """
    everyones = [
        {(v["options"]["fx"], v["options"]["name"]): v for v in each["values"]} for each in ranks
    ]
    values = []
    for key, first in everyones[0].items():
        if first["options"]["sync_dist"] and "value" in first["state"]:
            parts = [each[key]["state"] for each in everyones if key in each]
            reduction = first["options"]["reduce_fx"]
            together = {
                name: _together([part[name] for part in parts], reduction, world_size)
                for name in ("value", "cumulated_batch_size")
                if name in first["state"]
            }
            first = {**first, "state": first["state"] | together}
        values.append(first)
    return {**ranks[0], "values": values}


def _together(parts: list[torch.Tensor], reduction: str, world_size: int) -> torch.Tensor:
    stacked = torch.stack(parts)
    if reduction.endswith("max"):
        return stacked.amax(0)
    return stacked.amin(0) if reduction.endswith("min") else stacked.sum(0) / world_size


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
