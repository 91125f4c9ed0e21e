"""Does a fitted pipeline look sound?

The answer comes from what the nodes froze and what phase 1 counted, in float64; the archive is
not read again. A finding advises and stops nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline

from cuvis_dist.initialization.passes import PassRecord
from cuvis_dist.nodes.catalogue import check, keeps_bands
from cuvis_dist.nodes.health import Fitted
from cuvis_dist.nodes.upstream import edges_into, nodes_before, topological_order

#: So many standard errors are between two means once in 16,000 times, if they are of one thing.
_ERRORS = 4


@dataclass(frozen=True)
class Finding:
    """What a person should look at: the name of a node, and what was found, means and helps."""

    node: str
    message: str

    def __str__(self) -> str:
        return f"{self.node}: {self.message}"


def diagnose(
    pipeline: CuvisPipeline,
    records: Sequence[PassRecord],
    wavelengths: Callable[[], Any] = lambda: None,
) -> list[Finding]:
    """Return what looks bad about the nodes that phase 1 fitted.

    Parameters
    ----------
    pipeline : CuvisPipeline
        As phase 1 left it.
    records : sequence of PassRecord
        Its passes say which nodes it fitted, on how many pixels.
    wavelengths : callable, optional
        Returns the wavelengths in nm (``[C]`` or ``[1, C]``), or None. It is called at most
        once, and only when a band is to be named.

    Returns
    -------
    list of Finding
        In the order of the nodes; empty when the fit looks sound.
    """
    pixels = {name: fit["pixels"] for record in records for name, fit in record.nodes.items()}
    said = {
        name: fit.get("sampled", {}) for record in records for name, fit in record.nodes.items()
    }
    wavelengths = functools.cache(wavelengths)
    findings = []
    for node in topological_order(pipeline):
        if node.name not in pixels:
            continue
        band = functools.partial(_band, pipeline, node, wavelengths)
        edges = edges_into(pipeline, node)
        sources = tuple((source, pixels.get(source.name)) for source, _, _ in edges)
        messages = check(Fitted(node, pixels[node.name], band, sources))
        messages += unlikely_mean(said.get(node.name, {}))
        findings += [Finding(node.name, message) for message in messages]
    return findings


def unlikely_mean(sampled: dict[str, Any]) -> list[str]:
    """Compare the mean of a sample with what it is exactly; one message where they are apart.

    Parameters
    ----------
    sampled : dict
        What the record of a pass says of a node that was fitted on a sample.
    """
    if not (known := sampled.get("check")):
        return []
    error = sampled["standard_errors"]["mean"]["standard_error"]
    apart = abs(known["mean"] - known["exact"])
    if apart <= _ERRORS * error + known["rounding"]:
        return []
    return [
        f"the mean of the sample is {known['mean']:.6g}, and that of all pixels is "
        f"{known['exact']:.6g}, as the first reading says: they are {apart:.2g} apart, with a "
        f"standard error of {error:.2g}. Rounding may spoil the scores, or the sample is not one "
        "of these pixels. Fit with later_levels: exact"
    ]


def _band(
    pipeline: CuvisPipeline,
    node: Node,
    wavelengths: Callable[[], Any],
    index: int,
    channels: int,
) -> str:
    """Name a band, with its wavelength where all nodes before keep the bands of the batch."""
    kept = all(keeps_bands(n) for n in nodes_before(pipeline, [node]))
    known = wavelengths() if kept else None
    values = torch.as_tensor([] if known is None else known).flatten()
    return f"band {index}" + (f" ({float(values[index]):g} nm)" if len(values) == channels else "")
