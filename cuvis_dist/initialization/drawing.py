"""What does a worker keep of a frame for nodes that are fitted on a sample of its pixels?

Some of the pixels that count, as they arrive at the first node that is not fitted yet: the nodes
before run on the chosen pixels alone, which they map one by one. What the frame has besides, such
as wavelengths, is kept beside them where a later node wants it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from torch import Tensor

from cuvis_dist.archive import Frame
from cuvis_dist.errors import DataError, one_line
from cuvis_dist.initialization.inside import Inside
from cuvis_dist.initialization.measuring import annotated, compute_inputs
from cuvis_dist.initialization.plan import Pass
from cuvis_dist.nodes.upstream import edges_into, nodes_before, run_nodes
from cuvis_dist.scaling import Measuring
from cuvis_dist.statistics.drawn import Drawn, draw, expected_per_frame
from cuvis_dist.statistics.statistic import as_array

#: In the name of a kept value, between node and output; what comes from the batch has no node.
_PORT = "."


class Frontier:
    """Which values are kept, and which nodes lie on either side of them.

    Parameters
    ----------
    pipeline : CuvisPipeline
        As far as it is fitted when the pass begins.
    this_pass : Pass
        A pass with later levels.

    Attributes
    ----------
    known : set of Node
        Nodes that run before pixels are kept.
    beyond : set of Node
        Nodes behind them that the later levels need.
    """

    def __init__(self, pipeline: CuvisPipeline, this_pass: Pass) -> None:
        measured = [m for level in this_pass.later for m in level.measurements]
        before = nodes_before(pipeline, [m.node for m in measured])
        unfitted = {*this_pass.nodes}
        self.beyond = {n for n in before if unfitted & {n, *nodes_before(pipeline, [n])}}
        self.known = before - self.beyond
        wanted = {m.node: {m.recipe.port} for m in measured}
        wanted |= {node: {*node.INPUT_SPECS} for node in self.beyond}
        self.names = sorted(
            name for node, ports in wanted.items() for name in self._into(pipeline, node, ports)
        )

    def _into(self, pipeline: CuvisPipeline, node: Node, ports: Collection[str]) -> set[str]:
        """Return the names of the values that some ports of a node receive, as far as known."""
        edges = [edge for edge in edges_into(pipeline, node) if edge[2] in ports]
        alone = {*ports} - {port for _, _, port in edges}
        there = {f"{n.name}{_PORT}{out}" for n, out, _ in edges if n in self.known}
        return there | {f"{_PORT}{port}" for port in alone}


class Drawing:
    """Keeps pixels of frames, one frame after another.

    Parameters
    ----------
    pipeline : CuvisPipeline
        As far as it is fitted when the pass begins.
    names : sequence of str
        What is kept of each pixel: those of a :class:`Frontier`, or of :func:`kept_at`.
    measuring : Measuring
        Which pixels count.
    expected : float
        How many pixels are kept of a frame, on average.
    inside : Inside, optional
        Which pixels are of the bulk: others do not count.
    """

    def __init__(
        self,
        pipeline: CuvisPipeline,
        names: Sequence[str],
        measuring: Measuring,
        expected: float,
        inside: Inside | None = None,
    ) -> None:
        named = {name.rpartition(_PORT)[0] for name in names}
        known = [node for node in pipeline.nodes() if node.name in named]
        self.nodes = {node.name for node in (*known, *nodes_before(pipeline, known))}
        self.names, self.seed = [*names], measuring.sample_seed
        self.pixels, self.expected, self.inside = measuring.pixels, expected, inside
        self._constants: dict[str, Tensor] = {}

    def frame(
        self, pipeline: CuvisPipeline, batch: dict[str, Any], frame: Frame, position: int
    ) -> Drawn | None:
        """Return what is kept of one frame; None where its images differ in size.

        Parameters
        ----------
        pipeline : CuvisPipeline
            The worker's own.
        batch : dict
            The frame as a batch of one, of which everything could be measured.
        frame : Frame
            Its identity.
        position : int
            The frame's position in the archive.

        Raises
        ------
        DataError
            If a node cannot be run on some of its pixels.
        """
        images = {k: v for k, v in batch.items() if isinstance(v, Tensor) and v.ndim >= 3}
        sizes = {tuple(v.shape[:3]) for v in images.values()}
        if len(sizes) != 1:
            return None
        (_, height, width) = sizes.pop()
        index = np.arange(height * width)
        if self.pixels == "unlabelled" and (anomalies := annotated(pipeline, batch)) is not None:
            index = index[(anomalies.reshape(-1) == 0).numpy(force=True)]
        if self.inside is not None:
            index = index[self._of_bulk(pipeline, batch, frame)[index]]
        index, drawn = draw(index, self.seed, frame.uid, self.expected)
        if not len(index):
            return drawn
        rows = torch.as_tensor(index)
        few = {
            k: v.reshape(height * width, -1)
            .index_select(0, rows)
            .reshape(1, len(index), 1, *v.shape[3:])
            for k, v in images.items()
        }
        try:
            kept = self._values(pipeline, batch | few)
        except Exception as error:
            raise DataError(f"no pixels of {frame} can be kept: {one_line(error)}") from error
        values, constants = {}, {}
        for name, value in kept.items():
            if isinstance(value, Tensor) and tuple(value.shape[:3]) == (1, len(index), 1):
                values[name] = as_array(value)[0, :, 0]
            elif value is not None:
                constants[name] = self._once(name, value)
        return replace(
            drawn, frame=np.full(len(index), position), values=values, constants=constants
        )

    def _once(self, name: str, value: Any) -> Any:
        """Return what belongs to a frame as a whole, in memory of its own.

        The same object as of the frame before if it is equal, since a tensor takes as long to be
        pickled as a small frame to be measured.
        """
        if not isinstance(value, Tensor):
            return value
        value, before = value.cpu(), self._constants.get(name)
        if before is None or before.dtype != value.dtype or not torch.equal(before, value):
            self._constants[name] = value.clone()
        return self._constants[name]

    def _of_bulk(self, pipeline: CuvisPipeline, batch: dict[str, Any], frame: Frame) -> np.ndarray:
        """Return which pixels of a frame are of the bulk, ``[N]`` bool."""
        assert self.inside is not None
        (node,) = (node for node in pipeline.nodes() if node.name == self.inside.node)
        inputs = compute_inputs(pipeline, node, batch, str(frame))
        return self.inside.mask(inputs).numpy(force=True)

    def _values(self, pipeline: CuvisPipeline, batch: dict[str, Any]) -> dict[str, Any]:
        """Return what is kept of a batch, by name."""
        batch = pipeline.move_batch_to_device(batch)
        nodes = [node for node in pipeline.nodes() if node.name in self.nodes]
        outputs = run_nodes(pipeline, nodes, {}, batch)
        every = {f"{node}{_PORT}{port}": value for (node, port), value in outputs.items()}
        every |= {f"{_PORT}{port}": value for port, value in batch.items()}
        return {name: every[name] for name in self.names if name in every}


def drawing_for(
    pipeline: CuvisPipeline, this_pass: Pass, measuring: Measuring, frames: int
) -> Drawing | None:
    """Return what keeps pixels for the later levels of a pass; None where it has none.

    Parameters
    ----------
    frames : int
        How many frames the archive has.
    """
    if not this_pass.later:
        return None
    expected = expected_per_frame(measuring.sample_pixels, frames)
    names = Frontier(pipeline, this_pass).names
    return Drawing(pipeline, names, measuring, expected, this_pass.inside)


def kept_at(node: str, port: str) -> str:
    """Return the name of the kept value of a node's output; of the batch's without a node."""
    return f"{node}{_PORT}{port}"


def port_of(name: str) -> tuple[str, str]:
    """Return the node and output of a kept value's name; the batch's have no node."""
    node, _, port = name.rpartition(_PORT)
    return node, port


def given(kept: dict[str, Any]) -> tuple[dict[tuple[str, str], Any], dict[str, Any]]:
    """Return kept values as the outputs of nodes and as a batch."""
    parts = {port_of(name): value for name, value in kept.items()}
    outputs = {(node, port): value for (node, port), value in parts.items() if node}
    return outputs, {port: value for (node, port), value in parts.items() if not node}
