"""How is an initialization saved, with a card that says what it was made from?"""

from __future__ import annotations

import os
from typing import Any

from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_schemas.training.data import DataSplitConfig

from cuvis_dist.initialization.card import Card, Source, make_card
from cuvis_dist.initialization.place import place_of
from cuvis_dist.initialization.trainer import StatisticalTrainer
from cuvis_dist.runs.dependences import PHASE_1, Dependences
from cuvis_dist.runs.leaving_out import excluding
from cuvis_dist.runs.record import RunRecord, save_pipeline
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling
from cuvis_dist.storage import Location, OutputFolder


def save_initialization(
    pipeline: CuvisPipeline,
    place: str | os.PathLike[str],
    trainer: StatisticalTrainer | None = None,
    name: str | None = None,
) -> Card:
    """Save the state of a pipeline after phase 1, with a card that says what it was made from.

    Parameters
    ----------
    pipeline : CuvisPipeline
        A fitted pipeline.
    place : path or URI
        It ends in ``.yaml``, ``.pt`` or ``.json``; files of all three endings are written.
    trainer : StatisticalTrainer, optional
        What fitted it: without it, the card does not say what the state was made from.
    name : str, optional
        What the initialization is called, such as a version; by default the pipeline's name and
        the first digits of the state's hash.

    Returns
    -------
    Card
        As it was written.

    Raises
    ------
    InputError, ClusterError
        If the place has another ending, or cannot be written.

    Examples
    --------
    >>> trainer.fit()
    >>> save_initialization(pipeline, "outputs/initialization.pt", trainer)
    """
    folder, stem, _ = place_of(place)
    card = make_card(pipeline, trainer.source() if trainer else None, name)
    _save(pipeline, folder, stem, card)
    return card


def save_phase_1(
    trainrun: TrainRun, as_built: dict[str, Any], depends_on: Dependences, record: RunRecord
) -> Location:
    """Save what ``cuvis-dist init`` has made, with its card; return where the ``.yaml`` lies.

    Parameters
    ----------
    as_built : dict
        The pipeline before the fit: see :func:`~cuvis_dist.initialization.card.built`.
    depends_on : Dependences
        It has the frames and their files.
    record : RunRecord
        It has the passes, findings and metrics.

    Raises
    ------
    InputError, ClusterError
        If the files cannot be written.
    """
    source = Source(
        depends_on.measured,
        depends_on.files[PHASE_1],
        record.passes,
        record.findings,
        Scaling.model_validate(record.scaling).measuring,
    )
    card = make_card(
        trainrun.pipeline,
        source,
        pipeline=as_built,
        trainrun=_how_to_make(trainrun),
        metrics=record.metrics,
        versions=record.versions,
    )
    return _save(trainrun.pipeline, trainrun.output, trainrun.result_name, card)


def _save(pipeline: CuvisPipeline, folder: OutputFolder, name: str, card: Card) -> Location:
    folder.remove(f"{name}.json")  # never the new state beside an old card, if this is cut off
    place = save_pipeline(pipeline, folder, name)
    folder.write(f"{name}.json", card.to_bytes())
    return place


def _how_to_make(trainrun: TrainRun) -> dict[str, Any]:
    """Return the content of a trainrun's file that makes the same initialization."""
    data, splits = trainrun.config.data, trainrun.config.data.splits
    if splits is not None and splits.splits_path:
        file = trainrun.path.parent / splits.splits_path
        if file.is_file():  # what it says now counts, and not where it lies
            splits = DataSplitConfig.model_validate_json(file.read_bytes())
    if splits is not None and trainrun.without:
        splits = excluding(splits, trainrun.without)
    data = data.model_copy(update={"splits": splits})
    return {
        "name": trainrun.config.name,
        "tags": trainrun.config.tags,
        "pipeline": "pipeline.yaml",
        "data": data.model_dump(mode="json", exclude_defaults=True),
        "metric_nodes": trainrun.config.metric_nodes,
        **({"training": {"seed": trainrun.seed}} if trainrun.seed is not None else {}),
    }
