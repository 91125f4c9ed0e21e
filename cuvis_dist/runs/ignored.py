"""What has somebody written in a trainrun or its pipeline that has no effect? Warned of at once.

Upstream passes over all of it in silence, so that none of it is an error.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from cuvis_ai_core.node.node import Node
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.config import TrainRunConfig
from cuvis_ai_schemas.pipeline import PipelineConfig
from loguru import logger

from cuvis_dist.misspelt import closest
from cuvis_dist.nodes.manifests import declared_plugins
from cuvis_dist.runs.configuration import Configuration
from cuvis_dist.training.monitoring import measuring_nodes


def warn_of_ignored(
    configuration: Configuration,
    pipeline: CuvisPipeline,
    plugins_dirs: Sequence[Path],
    installed: Sequence[Path],
) -> None:
    """Warn of metric nodes without metrics, frozen nodes that are trained, and misspelt names.

    Parameters
    ----------
    configuration : Configuration
        What the files say.
    pipeline : CuvisPipeline
        What was built of them.
    plugins_dirs, installed : sequence of Path
        Where plugin manifests are looked up, and which of these are of an installed package.
    """
    path, config = configuration.path, configuration.config
    named = [node for node in pipeline.nodes() if node.name in config.metric_nodes]
    for name in {node.name for node in named} - {*measuring_nodes(named)}:
        logger.warning(
            f"metric_nodes of trainrun {path} names {name}, which has no output called metrics: "
            "nothing is evaluated of it"
        )
    if configuration.pipeline is None:
        return
    _warn_of_frozen(path, config, pipeline)
    _warn_of_hparams(configuration.pipeline, pipeline)
    if configuration.pipeline.plugins:
        with suppress(Exception):  # who needs the manifests says what is wrong with them
            _warn_of_plugins(
                configuration.pipeline, pipeline, declared_plugins(plugins_dirs, installed)
            )


def _warn_of_frozen(path: Path, config: TrainRunConfig, pipeline: CuvisPipeline) -> None:
    """Warn of nodes in ``freeze_nodes`` that are trained: upstream reads that list and no more."""
    if config.training is None:
        return
    trained = [
        node.name
        for node in pipeline.nodes()
        if node.name in config.freeze_nodes
        and (
            node.name in config.unfreeze_nodes
            or any(parameter.requires_grad for parameter in node.parameters())
        )
    ]
    if trained:
        logger.warning(
            f"freeze_nodes of trainrun {path} freezes nothing, here as in upstream: phase 2 trains "
            f"{', '.join(trained)}, as each node that unfreeze_nodes names or that has parameters "
            "of its own"
        )


def _warn_of_hparams(config: PipelineConfig, pipeline: CuvisPipeline) -> None:
    """Warn of settings that a node's constructor takes as ``**kwargs`` and does not know."""
    classes = {node.name: type(node) for node in pipeline.nodes()}
    for node in config.nodes:
        if node.name in classes:
            for name, meant in misspelt(classes[node.name], node.hparams).items():
                logger.warning(
                    f"node {node.name} of pipeline {pipeline.name}: hparams.{name} is no setting "
                    f"of {classes[node.name].__name__} and has no effect; did you mean {meant}?"
                )


def _warn_of_plugins(
    config: PipelineConfig, pipeline: CuvisPipeline, known: Collection[str]
) -> None:
    """Warn of plugins that no manifest declares, where one of nearly that name is declared."""
    for name in sorted({*(config.plugins or ())} - {*known}):
        if meant := closest(name, known):
            logger.warning(
                f"pipeline {pipeline.name} names the plugin {name}, which no manifest declares; "
                f"did you mean {meant}?"
            )


def misspelt(node_class: type[Node], hparams: Iterable[str]) -> dict[str, str]:
    """Return which of the names of a node's settings are misspelt, with what is probably meant.

    A name counts as misspelt if no constructor of the class has such a parameter or speaks of it,
    and one has a parameter of nearly that name.
    """
    known, spoken = _settings_of(node_class)
    found = {name: closest(name, known) for name in map(str, hparams) if name not in spoken}
    return {name: meant for name, meant in found.items() if meant}


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
