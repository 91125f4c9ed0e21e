"""What does each step of a run depend on, so that it need not be done again?

A run has three steps, each of which depends on what the one before depends on, and more:

- phase 1 on the pipeline up to its statistical nodes, the train frames and their files, the data
  module's parameters, the ``measuring`` settings, and the seed where it makes a difference;
- the training on everything else that the trainrun says, and the val frames;
- the result on the test frames.

How many workers there are, and where a result goes, is no part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from pytorch_lightning.utilities.seed import isolate_rng

from cuvis_dist.archive import Archive, Contents, Frame, open_archive
from cuvis_dist.errors import CuvisDistError
from cuvis_dist.hashing import hash_settings
from cuvis_dist.initialization.card import built
from cuvis_dist.initialization.matching import measured_part
from cuvis_dist.initialization.plan import make_plan
from cuvis_dist.runs.trainrun import TrainRun
from cuvis_dist.scaling import Scaling

#: In their order.
PHASE_1, TRAINING, RESULT = STEPS = ("phase 1", "training", "result")


@dataclass(frozen=True)
class Dependences:
    """What the steps of a run depend on.

    Attributes
    ----------
    parts : dict of str to dict of str to str
        By step, the SHA-256 of each thing, by name. None for phase 1 where it is left out.
    files : dict of str to Contents
        By step, the files.
    measured : sequence of Frame
        The frames that phase 1 is given; none where it is left out.
    """

    parts: dict[str, dict[str, str]]
    files: dict[str, Contents]
    measured: Sequence[Frame] = ()


def depends_on(
    trainrun: TrainRun, datamodule: pl.LightningDataModule, scaling: Scaling
) -> Dependences:
    """Return what a trainrun's steps depend on.

    Sets up the data module for all three splits. Reads no frame, unless ``reading.verify`` says so.
    """
    with isolate_rng():
        archives = {split: _archive(datamodule, split) for split in ("train", "val", "test")}
    measuring = scaling.measuring
    train = archives["train"]
    sample = None
    if train is not None:
        sample = train.sampled(
            measuring.sample_frames, measuring.sample_fraction, measuring.sample_seed
        )
    parts = {
        PHASE_1: {}
        if trainrun.weights
        else _phase_1(trainrun, scaling) | {"list of train frames": _uids(sample)},
        TRAINING: _training(trainrun)
        | {f"list of {split} frames": _uids(archives[split]) for split in ("train", "val")},
        RESULT: {
            "name of the pipeline": trainrun.pipeline.name,
            "list of test frames": _uids(archives["test"]),
        },
    }
    frames: dict[str, Sequence[Frame]] = {
        PHASE_1: () if trainrun.weights else _frames(sample),
        TRAINING: [*_frames(train), *_frames(archives["val"])],
        RESULT: _frames(archives["test"]),
    }
    every = [frame for step in STEPS for frame in frames[step]]
    contents = Contents.of(every, scaling.reading.verify)
    return Dependences(
        {step: {k: hash_settings(v) for k, v in parts[step].items()} for step in STEPS},
        {step: contents.only(frames[step]) for step in STEPS},
        frames[PHASE_1],
    )


def _archive(datamodule: pl.LightningDataModule, split: str) -> Archive | None:
    try:
        return open_archive(datamodule, split)
    except CuvisDistError:
        return None  # whoever needs the split says so


def _uids(archive: Archive | None) -> list[str] | None:
    return None if archive is None else [frame.uid for frame in archive.frames]


def _frames(archive: Archive | None) -> Sequence[Frame]:
    return () if archive is None else archive.frames


def _phase_1(trainrun: TrainRun, scaling: Scaling) -> dict[str, Any]:
    """Return what phase 1 depends on, but for the frames."""
    pipeline, data = trainrun.pipeline, trainrun.config.data
    streamed = any(step.streamed for step in make_plan(pipeline, scaling.measuring.fold))
    return {
        "pipeline up to its statistical nodes": measured_part(pipeline),
        "data.params": [data.data_module, data.params],
        "data.batch_size": data.batch_size if streamed else None,
        "measuring": scaling.measuring.model_dump(mode="json", exclude={"store"}),
        # Fits by a node's own code may draw random numbers. What nodes begin with is compared
        # where phase 1 is used again: most of it is gone after the fit.
        "training.seed": trainrun.seed if streamed else None,
    }


def _training(trainrun: TrainRun) -> dict[str, Any]:
    """Return what training and calibration depend on besides, but for the frames."""
    config = trainrun.config
    training = config.training.model_dump(mode="json") if config.training else {}
    training.pop("default_root_dir", None)
    data = config.data.model_dump(mode="json", exclude={"splits"})  # their frames are listed
    return {
        "job": trainrun.job,
        "initialization": trainrun.initialization["sha256"] if trainrun.initialization else None,
        "pipeline": _structure(trainrun.pipeline),
        **{f"data.{name}": value for name, value in data.items()},
        **{name: getattr(config, name) for name in _NODES},
        **{f"training.{name}": value for name, value in training.items()},
    }


_NODES = ("loss_nodes", "metric_nodes", "freeze_nodes", "unfreeze_nodes")


def _structure(pipeline: CuvisPipeline) -> dict[str, Any]:
    return {part: built(pipeline)[part] for part in ("nodes", "connections")}
