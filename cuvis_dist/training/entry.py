"""What does a worker that Ray Train has started do first?

Imports nothing that takes long: Ray Train's controller, which trains nothing, imports this module,
too, and the workers start after that.
"""

from __future__ import annotations

from typing import Any

#: How many seconds a rank waits before it asks again what it is to do.
_ASK_AGAIN = 0.1


def begin_rank(config: dict[str, Any]) -> bytes:
    """Carry out an assignment as one rank of a group; return the pickled outcome.

    The controller, through which it goes, does not open it, and need not import cuvis.ai for that.

    Parameters
    ----------
    config : dict
        ``desk``: the actor that gives references to the
        :class:`~cuvis_dist.training.assignment.Assignment` and its
        :class:`~cuvis_dist.training.assignment.Driver`, as soon as there are any.
    """
    import time
    import uuid

    import ray
    import ray.train
    import torch
    from ray import cloudpickle

    from cuvis_dist.training.assignment import Seat
    from cuvis_dist.training.distributed import lightning_keywords
    from cuvis_dist.training.rank import run_rank

    context = ray.train.get_context()
    group = [uuid.uuid4().hex]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(group)
    while (given := ray.get(config["desk"].take.remote())) is None:
        time.sleep(_ASK_AGAIN)
    assignment, driver = ray.get(given)
    seat = Seat(
        context.get_world_rank(),
        context.get_world_size(),
        context.get_experiment_name(),
        group[0],
        ray.get_runtime_context().get_node_id(),
        driver,
        lightning_keywords(),
    )
    return cloudpickle.dumps(run_rank(assignment, seat))
