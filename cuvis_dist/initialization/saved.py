"""How is the state of an initialization read, and taken into a pipeline that was built anew?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from loguru import logger

from cuvis_dist.errors import InputError
from cuvis_dist.initialization.card import Card, Initialization
from cuvis_dist.initialization.matching import take, why_not
from cuvis_dist.initialization.place import find
from cuvis_dist.nodes.state import hash_states
from cuvis_dist.plain import NotPlainError, load
from cuvis_dist.yaml_file import read_yaml


def load_initialization(pipeline: CuvisPipeline, place: str | os.PathLike[str]) -> Initialization:
    """Take the state of an initialization into a pipeline, whose nodes count as fitted then.

    The pipeline's nodes, settings and connections stay what they are.

    Parameters
    ----------
    pipeline : CuvisPipeline
        Built anew, by code or from a file.
    place : path or URI
        ``.yaml``, ``.pt`` or ``.json`` of what :func:`~cuvis_dist.runs.initialized.\
save_initialization` or ``cuvis-dist init`` left. A saved pipeline without a card is taken, too,
        with a warning.

    Returns
    -------
    Initialization
        What was loaded, with its card.

    Raises
    ------
    InputError
        If a file is missing or cannot be read, is not what the card describes, or does not fit
        the pipeline, of which nothing was changed then.

    Examples
    --------
    >>> pipeline = build_pipeline()
    >>> load_initialization(pipeline, "outputs/initialization.pt")
    """
    found = read_initialization(place)
    if reason := why_not(pipeline, found):
        raise InputError(f"{found.file} does not fit the pipeline {pipeline.name}: {reason}")
    for node in pipeline.nodes():
        if node.name in found.states:
            take(node, found.states[node.name])
    if found.card is None:
        logger.warning(f"{found.file} has no card: nothing says what it was made from")
    return found


def read_initialization(place: str | os.PathLike[str]) -> Initialization:
    """Read an initialization, or the state of another saved pipeline.

    Raises
    ------
    InputError
        If a file is missing or cannot be read, or is not what the card describes.
    ClusterError
        If it lies in a store that does not answer.
    """
    files = find(place)
    weights, structure, beside = files["pt"], files["yaml"], files["json"]
    assert weights is not None
    states = _states(weights)
    sha256 = hash_states(states)
    if beside is None:
        known = read_yaml(structure, "saved pipeline") if structure else None
        return Initialization(weights, sha256, states, None, known)
    card = Card.from_bytes(beside.read_bytes(), beside)
    if card.state != sha256:
        raise InputError(
            f"{weights} is not the state that its card {beside} describes: one of the two was "
            "changed or replaced. Make the initialization again, or remove the card"
        )
    return Initialization(weights, sha256, states, card, card.pipeline)


def _states(file: Path) -> dict[str, dict[str, Any]]:
    """Return what the ``.pt`` of a saved pipeline holds, by node and name."""
    try:
        content = load(file)
    except NotPlainError as error:
        raise InputError(f"{file} cannot be loaded: {error}") from error
    states = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(states, dict) or not all(map(_is_state, states.values())):
        raise InputError(
            f"{file} is no saved pipeline: it has no state_dict of nodes with their tensors"
        )
    return {str(name): dict(state) for name, state in states.items()}


def _is_state(state: Any) -> bool:
    return isinstance(state, dict) and all(isinstance(v, torch.Tensor) for v in state.values())
