"""How does a pipeline's file become a pipeline, of nodes and nothing else?

Upstream imports whatever ``class_name`` a file has and calls it with what the file says, be it
``subprocess.Popen``. Here only nodes are called. To import a module is to run it all the same: what
can be imported in this environment is trusted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.factory import PipelineBuilder
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.utils.node_registry import NodeRegistry
from cuvis_ai_schemas.pipeline import PipelineConfig

from cuvis_dist.errors import InputError
from cuvis_dist.plain import load


def build_pipeline(config: PipelineConfig) -> CuvisPipeline:
    """Build a pipeline as restore-trainrun does.

    Raises
    ------
    InputError
        If a class is no node.
    """
    return PipelineBuilder(_NodesAlone).build_from_config(config.to_dict())


def load_pipeline(path: Path) -> CuvisPipeline:
    """Load a saved pipeline, ``.pt`` beside it, on the CPU.

    Raises
    ------
    NotPlainError
        If its ``.pt`` holds more than tensors and plain values: upstream would unpickle anything.
    RuntimeError
        If it cannot be built; a class that is no node is named.
    """
    registry: Any = _NodesAlone
    weights = path.with_suffix(".pt")
    load(weights, mmap=True)
    return CuvisPipeline.load_pipeline(path, weights, device="cpu", node_registry=registry)


class _NodesAlone(NodeRegistry):
    """Upstream's registry, which can be asked for nothing but nodes."""

    @classmethod
    def get(cls, class_identifier: str, instance: NodeRegistry | None = None) -> type[Node]:
        """Return the class of a node.

        Raises
        ------
        InputError
            If it is none; no module of Python itself is imported to find out.
        """
        found: object = None
        if class_identifier.partition(".")[0] not in sys.stdlib_module_names:
            found = super().get(class_identifier, instance)
        if isinstance(found, type) and issubclass(found, Node):
            return found
        raise InputError(
            f"{class_identifier} is no node: class_name must name a subclass of cuvis_ai_core's "
            "Node"
        )
