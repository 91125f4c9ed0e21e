"""What of a node can a person look at: weights of bands, loadings, a mean with its covariance?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cuvis_ai.node.anomaly.rx_detector import RXGlobal
from cuvis_ai.node.channel_mixer import LearnableChannelMixer
from cuvis_ai.node.channel_selector import SoftChannelSelector
from cuvis_ai.node.dimensionality_reduction import TrainablePCA
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.enums import NodeCategory
from torch import Tensor

from cuvis_dist.nodes.catalogue import annotation_port, keeps_bands
from cuvis_dist.nodes.upstream import edges_into, nodes_before, topological_order

#: A covariance of more bands is not kept: nobody sees its cells, and it takes megabytes.
_MOST_BANDS = 1024


@dataclass(frozen=True)
class Portrait:
    """What a node has learnt, as arrays.

    Attributes
    ----------
    node, kind : str
        Its name, and ``weights`` (``[C]``), ``loadings`` (``[K, C]``) or ``gaussian``.
    bands : bool
        Whether the channels are the bands of the batch, so that wavelengths name them.
    values : dict of str to ndarray
        float64, by name.
    """

    node: str
    kind: str
    bands: bool
    values: dict[str, np.ndarray]


def portraits(pipeline: CuvisPipeline) -> list[Portrait]:
    """Return what the nodes of a pipeline have learnt, in topological order."""
    found = []
    for node in topological_order(pipeline):
        for node_class, look in _LOOKS.items():
            if isinstance(node, node_class) and (seen := look(node)):
                kind, tensors = seen
                values = {name: _array(value) for name, value in tensors.items()}
                if all(np.isfinite(value).all() for value in values.values()):
                    bands = all(keeps_bands(n) for n in nodes_before(pipeline, [node]))
                    found.append(Portrait(node.name, kind, bands, values))
    return found


def _array(value: Tensor) -> np.ndarray:
    return value.detach().double().cpu().numpy()


_Seen = tuple[str, dict[str, Tensor]] | None


def _weights(node: Any) -> _Seen:
    return "weights", {"weights": node.get_selection_weights(hard=False)}


def _loadings(node: Any) -> _Seen:
    if not node._components.isfinite().all():
        return None
    return "loadings", {"loadings": node._components, "variances": node._explained_variance}


def _mixer(node: Any) -> _Seen:
    mixing = next((p for p in node.parameters() if p.ndim in (2, 4)), None)
    return None if mixing is None else ("loadings", {"loadings": mixing.flatten(1)})


def _gaussian(node: Any) -> _Seen:
    if not len(node.mu) or len(node.mu) > _MOST_BANDS:
        return None
    eps = torch.tensor(float(node.eps))
    return "gaussian", {"mean": node.mu, "covariance": node.cov, "eps": eps}


_LOOKS: dict[type[Node], Callable[[Any], _Seen]] = {
    SoftChannelSelector: _weights,
    TrainablePCA: _loadings,
    LearnableChannelMixer: _mixer,
    RXGlobal: _gaussian,
}


# ---- which outputs are looked at ---------------------------------------------------------

PortOf = tuple[str, str]
"""A node's name and its output port."""


@dataclass(frozen=True)
class Judged:
    """The outputs in which a pipeline says what it thinks of a pixel; None where it has none.

    Attributes
    ----------
    scores, logits, decisions : tuple of str or None
        Squared distances of an RX detector; what the decider is given, or else the last scores;
        what it decides.
    mask : tuple of str or None
        The annotation.
    bands : int
        The number of bands that the distances are computed from.
    """

    scores: PortOf | None
    logits: PortOf | None
    decisions: PortOf | None
    mask: PortOf | None
    bands: int = 0

    def ports(self) -> set[PortOf]:
        """Return those that there are."""
        return {p for p in (self.scores, self.logits, self.decisions, self.mask) if p}


def judged(pipeline: CuvisPipeline) -> Judged:
    """Return the outputs that a report shows of a pipeline."""
    nodes = topological_order(pipeline)
    rx = next((n for n in nodes if isinstance(n, RXGlobal)), None)
    decider = next((n for n in reversed(nodes) if "decisions" in n.OUTPUT_SPECS), None)
    scoring = [n for n in nodes if "scores" in n.OUTPUT_SPECS and _gives_a_map(n)]
    logits = _into(pipeline, decider, "logits", "scores") if decider else None
    if logits is None and scoring:
        logits = (scoring[-1].name, "scores")
    return Judged(
        (rx.name, "scores") if rx else None,
        logits,
        (decider.name, "decisions") if decider else None,
        next(((n.name, p) for n in nodes if (p := annotation_port(n))), None),
        len(rx.mu) if rx else 0,
    )


def _gives_a_map(node: Node) -> bool:
    spec = node.OUTPUT_SPECS["scores"]
    return not isinstance(spec, list) and node.get_category() is not NodeCategory.METRIC


def _into(pipeline: CuvisPipeline, node: Node, *ports: str) -> PortOf | None:
    def found() -> Iterator[PortOf]:
        for source, port, target in edges_into(pipeline, node):
            if target in ports:
                yield source.name, port

    return next(found(), None)
