"""Which private names of cuvis.ai do we depend on, and why?

Upstream has no public way to these steps and they must not be written a second time, so they
are taken from where they are. ``tests/test_upstream.py`` fails by name when a release moves or
changes one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import torch
from cuvis_ai.node.conversion import ScoreToLogit
from cuvis_ai.node.monitor import TensorBoardMonitorNode
from cuvis_ai_core.data import selectors
from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training import StatisticalTrainer
from cuvis_ai_core.training.evaluation import (
    _pooled_objects as pooled_objects,
)
from cuvis_ai_core.utils.node_registry import NodeRegistry
from cuvis_ai_core.utils.restore import (
    _build_data_module,
    _resolve_splits_path_in_config,
)
from cuvis_ai_core.utils.restore import (
    _create_datamodule_from_config as create_datamodule,
)
from cuvis_ai_core.utils.restore import (
    _discover_plugins_dirs as discover_plugins_dirs,
)
from cuvis_ai_dataloader.data import (
    datamodule_cu3s,
    datamodule_cu3s_multi,
    datamodule_npz_multi,
)
from cuvis_ai_dataloader.data.readers.tiff_reader import TiffCubeReader
from cuvis_ai_schemas.enums import ExecutionStage
from cuvis_ai_schemas.execution import Context
from cuvis_ai_schemas.training import DataConfig
from cuvis_ai_schemas.training.data import SampleRef, Selector, SelectorKind

from cuvis_dist.errors import DataError

__all__ = [
    "accumulated_mean",
    "build_datamodule",
    "counting_measurements",
    "create_datamodule",  # its data module, from the same plugins and splits
    "discover_plugins_dirs",  # the same search order for plugin manifests
    "edges_into",
    "inputs_of",
    "log_to",
    "node_inputs",
    "nodes_before",
    "only_real_numbers",
    "pooled_objects",  # a metric node's live torchmetrics, as an evaluation resets and reads them
    "run_nodes",
    "select_by_recording",
    "topological_order",
]


def build_datamodule(data: DataConfig, plugins_dirs: list[Path], base_dir: Path) -> Any:
    """Build a trainrun's data module as :func:`create_datamodule` does, not yet set up.

    Private: ``_build_data_module`` and ``_resolve_splits_path_in_config``, since upstream's way
    sets up train and val, which a saved pipeline does not need.
    """
    data = _resolve_splits_path_in_config(data, base_dir)
    return _build_data_module(NodeRegistry(), data, plugins_dirs)


def topological_order(pipeline: CuvisPipeline) -> list[Node]:
    """Return the nodes in the order in which a forward runs them.

    Private: ``pipeline._sorted_nodes``; an order of our own could break ties otherwise.
    """
    return list(pipeline._sorted_nodes)


def log_to(node: TensorBoardMonitorNode, folder: Path) -> None:
    """Let a TensorBoard node write to ``folder`` when it next opens one, also if that is there.

    Private: ``TensorBoardMonitorNode._resolve_log_dir``, by which it picks a folder that is not.
    """
    node.log_dir = folder
    node._resolve_log_dir = partial(Path, folder)


def accumulated_mean(node: ScoreToLogit) -> float | None:
    """Return the mean of the scores that ``node`` was fitted on, None before a fit.

    Private: ``ScoreToLogit._welford``, since the node freezes mean + 2 standard deviations only.
    """
    return float(node._welford.mean) if node._welford.count else None


def nodes_before(pipeline: CuvisPipeline, targets: Iterable[Node]) -> set[Node]:
    """Return every node that one of ``targets`` depends on.

    Private: ``pipeline._graph``, as for :func:`edges_into`.
    """
    return set().union(*(nx.ancestors(pipeline._graph, node) for node in targets))


def edges_into(pipeline: CuvisPipeline, node: Node) -> list[tuple[Node, str, str]]:
    """Return ``(predecessor, its port, port of node)`` for each edge into ``node``.

    Private: ``pipeline._graph``, since upstream lists connections only of a saved pipeline.
    """
    return [
        (source, edge["from_port"], edge["to_port"])
        for source, _, edge in pipeline._graph.in_edges(node, data=True)
    ]


def inputs_of(
    pipeline: CuvisPipeline, node: Node, outputs: dict[tuple[str, str], Any], batch: dict[str, Any]
) -> dict[str, Any]:
    """Return what ``node`` receives, given the outputs of the nodes before it.

    Private: ``pipeline._gather_node_inputs``, which decides what comes from the batch.
    """
    return pipeline._gather_node_inputs(node, outputs, batch)


@torch.no_grad()
def node_inputs(pipeline: CuvisPipeline, node: Node, batch: dict[str, Any]) -> dict[str, Any]:
    """Return what ``node`` receives for ``batch`` when it is fitted, keyed by input port.

    The partial forward of upstream's statistical trainer, except that ports are dropped as
    soon as nothing reads them, so that a worker holds few cubes. Private:
    ``pipeline._gather_node_inputs`` and ``StatisticalTrainer._require_predecessor_outputs``,
    which decide what a node is given and what is an error.

    Raises
    ------
    RuntimeError
        If a required input is not produced at the inference stage.
    """
    batch = pipeline.move_batch_to_device(batch)
    outputs = pipeline.forward(
        batch=batch,
        stage=ExecutionStage.INFERENCE,
        upto_node=node,
        free_consumed_ports=True,
        keep_ports={(source.name, port) for source, port, _ in edges_into(pipeline, node)},
    )
    StatisticalTrainer(pipeline, None)._require_predecessor_outputs(node, outputs)
    return pipeline._gather_node_inputs(node, outputs, batch)


@torch.no_grad()
def run_nodes(
    pipeline: CuvisPipeline,
    nodes: Collection[Node],
    outputs: dict[tuple[str, str], Any],
    batch: dict[str, Any],
) -> dict[tuple[str, str], Any]:
    """Return the outputs of ``nodes`` beside the ``outputs`` of those before that they need.

    Upstream's partial forward begins with a batch, and these need not.
    """
    outputs, context = dict(outputs), Context(stage=ExecutionStage.INFERENCE)
    for node in topological_order(pipeline):
        if node in nodes:
            made = node.forward(**inputs_of(pipeline, node, outputs, batch), context=context)
            outputs |= {(node.name, port): value for port, value in made.items()}
    return outputs


@contextmanager
def counting_measurements(
    count: Callable[[str, bool, Callable[[str], Any]], Any],
) -> Iterator[None]:
    """Let ``count(path, needed, theirs)`` do what the cu3s modules do to count measurements.

    Not needed where a list is only checked against the recording. Private: the names by which
    ``datamodule_cu3s`` and ``datamodule_cu3s_multi`` know ``count_measurements`` and
    ``Cu3sCubeReader``, since they open every recording of a split when they are set up.
    """
    single, multi = datamodule_cu3s, datamodule_cu3s_multi
    theirs = single.count_measurements, multi.count_measurements, single.Cu3sCubeReader
    reader: Any = theirs[2]
    replaced: Any = (
        lambda path: count(path, True, theirs[0]),
        lambda path: count(path, False, theirs[1]),
        lambda path, **options: count(path, True, lambda path: reader(path, **options)),
    )
    single.count_measurements, multi.count_measurements, single.Cu3sCubeReader = replaced
    try:
        yield
    finally:
        single.count_measurements, multi.count_measurements, single.Cu3sCubeReader = theirs


class _Numpy:
    """NumPy, except that nothing but real numbers is converted to another type."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    @staticmethod
    def asarray(values: Any, dtype: Any = None) -> np.ndarray:
        return np.asarray(values if dtype is None else _real(values), dtype=dtype)


def _real(values: Any) -> Any:
    found = np.asarray(values).dtype
    if found.kind not in "biuf":
        raise DataError(f"its values are of dtype {found}, and only real numbers can be used")
    return values


@cache
def only_real_numbers() -> None:
    """Let upstream's readers refuse cubes and masks that are no real numbers, in this process.

    They convert to float32 what a file has: complex numbers lose their imaginary part, words and
    dates become numbers. Private: the name by which ``datamodule_npz_multi`` knows NumPy, and
    ``TiffCubeReader._to_hwc``, where the type is still to be seen; to open each file a second
    time for it would be slow.
    """
    replaced: Any = _Numpy()
    datamodule_npz_multi.np = replaced
    theirs = TiffCubeReader._to_hwc

    def checked(raw: np.ndarray, axes: str, path: Path) -> np.ndarray:
        return theirs(_real(raw), axes, path)

    reader: Any = TiffCubeReader
    reader._to_hwc = staticmethod(checked)


@cache
def select_by_recording() -> None:
    """Let upstream look for the frames of a recording among those of that recording alone.

    It looks through the whole archive for each selector, and a run sets its data up many times:
    with 500 recordings of 40 frames each time took 13 s, and 0.2 s so. Private: ``_resolve_one``,
    which still does the selecting, and ``_norm_source``, by which it compares recordings.
    """
    theirs, alike = selectors._resolve_one, selectors._norm_source
    last: list[Any] = [None, 0, {}]  # the frames of an archive, how many, and by recording

    def resolve(
        sel: Selector, refs: list[SampleRef], *, name_to_id: dict[str, int] | None
    ) -> list[SampleRef]:
        named = [sel.source] if sel.kind is SelectorKind.FILE_INDICES else sel.paths
        if sel.kind not in (SelectorKind.FILE_INDICES, SelectorKind.FILES) or len(named) != 1:
            return theirs(sel, refs, name_to_id=name_to_id)
        if last[0] is not refs or last[1] != len(refs):
            by_recording: dict[str, list[SampleRef]] = {}
            spelt: dict[str, str] = {}
            for ref in refs:
                if ref.source not in spelt:
                    spelt[ref.source] = alike(ref.source)
                by_recording.setdefault(spelt[ref.source], []).append(ref)
            last[:] = refs, len(refs), by_recording
        return theirs(sel, last[2].get(alike(named[0]), []), name_to_id=name_to_id)

    selectors._resolve_one = resolve
