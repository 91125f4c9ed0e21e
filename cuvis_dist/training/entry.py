"""What does a worker that Ray Train has started do first?

Imports nothing that takes long: Ray Train's controller, which trains nothing, imports this module,
too, and the workers start after that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cuvis_dist.training.assignment import Outcome


def begin_rank(config: dict[str, Any]) -> Outcome | None:
    """Carry out an assignment as one rank of a group.

    Parameters
    ----------
    config : dict
        ``assignment`` and ``driver``: references to the
        :class:`~cuvis_dist.training.assignment.Assignment` and its
        :class:`~cuvis_dist.training.assignment.Driver`.
    """
    import uuid

    import ray
    import ray.train
    import torch

    from cuvis_dist.training.assignment import Seat
    from cuvis_dist.training.distributed import lightning_keywords
    from cuvis_dist.training.rank import run_rank

    context = ray.train.get_context()
    group = [uuid.uuid4().hex]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(group)
    seat = Seat(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_experiment_name(),
        group[0],
        ray.get(config["driver"]),
        lightning_keywords(),
    )
    return run_rank(ray.get(config["assignment"]), seat)
