"""How does a pipeline's file become a pipeline, of nodes and nothing else?

Upstream imports whatever ``class_name`` a file has and calls it with what the file says, be it
``subprocess.Popen``. Here only nodes are called. To import a module is to run it all the same: what
can be imported in this environment is trusted.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.factory import PipelineBuilder
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.utils.node_registry import NodeRegistry
from cuvis_ai_schemas.pipeline import PipelineConfig

from cuvis_dist.errors import InputError
from cuvis_dist.plain import load

#: How alike two names are of which one is the other misspelt.
_CLOSE = 0.8


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


def misspelt(node_class: type[Node], hparams: Iterable[str]) -> dict[str, str]:
    """Return which of the names of a node's settings are misspelt, with what is probably meant.

    Upstream leaves unused whatever a constructor takes as ``**kwargs`` and does not know. A name
    counts as misspelt if no constructor of the class has such a parameter or speaks of it, and one
    has a parameter of nearly that name.
    """
    known, spoken = _settings_of(node_class)
    found = {
        name: difflib.get_close_matches(name, known, n=1, cutoff=_CLOSE)
        for name in map(str, hparams)
        if name not in spoken
    }
    return {name: close[0] for name, close in found.items() if close}


def _settings_of(node_class: type[Node]) -> tuple[list[str], set[str]]:
    """Return the parameters of a class's constructors, and all words that their code has."""
    known, spoken = list[str](), set[str]()
    for cls in node_class.__mro__:
        code = getattr(vars(cls).get("__init__"), "__code__", None)
        if code is not None and issubclass(cls, Node):
            named = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
            known += named
            spoken |= {*named, *filter(lambda word: isinstance(word, str), code.co_consts)}
    return known, spoken
