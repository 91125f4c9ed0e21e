"""Does every statistical node of the installed cuvis-ai have a recipe, or a decision to stream?"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import cuvis_ai.node
import pytest
from cuvis_ai_core.node import Node

from cuvis_dist.initialization.recipes import is_known


def catalog():
    """Every public node class of cuvis-ai that defines or inherits a statistical fit."""
    classes = set()
    for module in pkgutil.walk_packages(cuvis_ai.node.__path__, "cuvis_ai.node."):
        for name, value in vars(importlib.import_module(module.name)).items():
            if (
                inspect.isclass(value)
                and issubclass(value, Node)
                and value.__module__.startswith("cuvis_ai.")
                and not name.startswith("_")
                and value.statistical_initialization is not Node.statistical_initialization
            ):
                classes.add(value)
    return sorted(classes, key=lambda cls: cls.__name__)


def test_the_catalog_is_found():
    assert len(catalog()) >= 40


@pytest.mark.parametrize("node_class", catalog(), ids=lambda cls: cls.__name__)
def test_a_statistical_node_is_known(node_class):
    assert is_known(node_class), (
        f"{node_class.__name__} is new or fits itself in a new way: give it a recipe, or decide "
        "that it is streamed, in cuvis_dist/initialization/recipes.py"
    )


def test_a_node_that_nobody_decided_about_is_not_known():
    class New(Node):
        def statistical_initialization(self, input_stream):
            pass

        def forward(self):
            return {}

    assert not is_known(New)
