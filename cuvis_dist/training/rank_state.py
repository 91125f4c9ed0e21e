"""What has each rank in the middle of a fit that Lightning's checkpoint leaves out?

The states of its random generators and of torchmetrics, and what it has logged. The ranks of a fit
that goes on may be others, in another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed
from lightning_fabric.utilities import move_data_to_device
from torchmetrics import Metric

from cuvis_dist.nodes.probing import random_states, set_random_states
from cuvis_dist.training.dealing import DealtBatches
from cuvis_dist.training.logged import for_other_ranks, log_again, logged


def states_of_ranks(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """Return what every rank has, in the order of ranks; all of them must ask."""
    mine = {
        "random": random_states(),
        "samplers": [generator.get_state() for generator in dealt_to(trainer).generators()],
        "metrics": _metric_states(trainer.lightning_module),
        "logged": logged(trainer),
    }
    states = [mine] * ranks_now()
    if len(states) > 1:
        torch.distributed.all_gather_object(states, mine)
    return states


def give_back(trainer: pl.Trainer, states: Sequence[dict[str, Any]]) -> None:
    """Let this rank go on with what :func:`states_of_ranks` returned.

    If there are more or fewer ranks now, all take over the random state of rank 0: the order of
    frames, and what joint nodes draw, is rank 0's in any case.
    """
    module, rank, world_size = trainer.lightning_module, rank_here(), ranks_now()
    same = len(states) == world_size
    mine = states[rank if same else 0]
    if same:
        _see_again(module, [mine["metrics"]])
        log_again(trainer, module, mine["logged"])
    else:
        if rank == 0:  # what ranks have seen is merged in the end, whoever has it
            _see_again(module, [each["metrics"] for each in states])
        found = for_other_ranks([each["logged"] for each in states], world_size)
        log_again(trainer, module, found)
    set_random_states(mine["random"])
    for generator, state in zip(dealt_to(trainer).generators(), mine["samplers"], strict=True):
        generator.set_state(state)


def dealt_to(trainer: pl.Trainer) -> DealtBatches:
    """Return the training batches that are dealt to this rank."""
    return trainer.train_dataloader.batch_sampler  # type: ignore[union-attr]


def rank_here() -> int:
    """Return which rank this process is."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def ranks_now() -> int:
    """Return how many ranks there are."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _metrics(module: torch.nn.Module) -> dict[str, Metric]:
    return {name: each for name, each in module.named_modules() if isinstance(each, Metric)}


def _metric_states(module: torch.nn.Module) -> dict[str, tuple[int, dict[str, Any]]]:
    """Return the states of every torchmetrics object that has seen something."""
    return {
        name: (metric._update_count, _detached(metric.metric_state))
        for name, metric in _metrics(module).items()
        if metric._update_count
    }


def _see_again(module: torch.nn.Module, parts: Sequence[dict[str, Any]]) -> None:
    """Give torchmetrics objects what was seen, in parts that are merged as at a reduction."""
    metrics = _metrics(module)
    for name in {name for part in parts for name in part}:
        metric = metrics[name]
        metric.reset()
        for updates, states in (part[name] for part in parts if name in part):
            states = move_data_to_device(states, metric.device)
            first, metric._update_count = not metric._update_count, metric._update_count + updates
            if first:
                vars(metric).update(states)
            else:
                metric._reduce_states(states)


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    if isinstance(value, list):
        return [_detached(item) for item in value]
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    return value
