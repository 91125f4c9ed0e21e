"""Two-phase training of cuvis.ai pipelines on a Ray cluster.

The public names are loaded when first used, so that ``cuvis_dist.statistics`` needs neither Ray
nor cuvis.ai.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cuvis_dist.lazy import found_in

if TYPE_CHECKING:
    from cuvis_dist.initialization.saved import load_initialization
    from cuvis_dist.initialization.trainer import StatisticalTrainer
    from cuvis_dist.nodes.catalogue import NodeFacts
    from cuvis_dist.nodes.recipe import Recipe
    from cuvis_dist.runs.initialized import save_initialization
    from cuvis_dist.runs.trainrun import load_trainrun
    from cuvis_dist.runs.two_phase import run_trainrun
    from cuvis_dist.scaling import Scaling
    from cuvis_dist.training.trainer import GradientTrainer

__all__ = [
    "GradientTrainer",
    "NodeFacts",
    "Recipe",
    "Scaling",
    "StatisticalTrainer",
    "load_initialization",
    "load_trainrun",
    "run_trainrun",
    "save_initialization",
]

__getattr__ = found_in(
    __name__,
    {
        "GradientTrainer": "training.trainer",
        "NodeFacts": "nodes.catalogue",
        "Recipe": "nodes.recipe",
        "Scaling": "scaling",
        "StatisticalTrainer": "initialization.trainer",
        "load_initialization": "initialization.saved",
        "load_trainrun": "runs.trainrun",
        "run_trainrun": "runs.two_phase",
        "save_initialization": "runs.initialized",
    },
)
