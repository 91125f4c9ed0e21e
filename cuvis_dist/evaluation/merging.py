"""How do the pooled metrics of several workers become those of one process?

Each state by the reduction that its metric declares; metrics that declare none are left alone.
"""

from __future__ import annotations

from cuvis_ai_core.node.node import Node
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

from cuvis_dist.nodes.state import adopt
from cuvis_dist.nodes.upstream import pooled_objects

_ASSOCIATIVE = {dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum}


def unmergeable(node: Node) -> str | None:
    """Return the class of a node's torchmetrics that needs one process, or None.

    All of them do in a node that declares no ``POOLED_METRIC_NAMES``: it reports running values,
    which depend on the batches before.
    """
    pools = bool(getattr(node, "POOLED_METRIC_NAMES", ()))
    for metric in node.modules():
        if isinstance(metric, Metric) and not (pools and mergeable(metric)):
            return type(metric).__name__
    return None


def mergeable(metric: Metric) -> bool:
    """Whether the states that copies of a metric have after parts of a split add up to its own.

    Not so for wrappers, whose states are in other metrics, for a metric whose update depends on
    the state before, and for means of means and states without a reduction.
    """
    if any(isinstance(child, Metric) for child in metric.children()):
        return False
    if type(metric).merge_state is not Metric.merge_state:
        return True
    return (
        metric.full_state_update is False
        and not metric.dist_sync_on_step
        and set(metric._reductions.values()) <= _ASSOCIATIVE
    )


def merge_pooled(nodes: dict[str, Node], parts: list[dict[str, Node]]) -> None:
    """Give metric nodes the state that one process has after all parts, in this order.

    Parameters
    ----------
    nodes : dict of str to Node
        Nodes to change, by name.
    parts : list of dict of str to Node
        Copies of the metric nodes, each after its part alone; changed here.
    """
    for name in parts[0]:
        copies = [part[name] for part in parts]
        pooled = [pooled_objects(copy) for copy in copies]
        # A node may show a metric only once it was used: take over the last that shows the most.
        base = max(range(len(parts)), key=lambda i: (len(pooled[i]), i))
        adopt(nodes[name], copies[base])
        others = [p for i, p in enumerate(pooled) if i != base]
        for other in reversed(others):  # merge_state puts what comes in first
            for key, earlier in other.items():
                metric = pooled[base][key]
                metric.merge_state(earlier)
                # merge_state changes neither the count nor a value computed before.
                metric._update_count += earlier.update_count
                metric._computed = None
