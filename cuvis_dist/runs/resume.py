"""What of an earlier run in this output folder can be used again?

``<output_dir>/resume`` belongs to one fingerprint: the trainrun, its pipeline, its frames, and
the settings of :class:`~cuvis_dist.scaling.Measuring`. It holds the passes of
phase 1 as far as they got (:mod:`cuvis_dist.initialization.kept`), the nodes as phase 1 left
them and, from :mod:`cuvis_dist.training.checkpoint`, the last finished epoch of phase 2. Another
fingerprint starts anew. How many workers there are is no part of it.
"""

from __future__ import annotations

import json
from typing import Any

import pytorch_lightning as pl
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.config import TrainRunConfig
from loguru import logger
from pytorch_lightning.utilities.seed import isolate_rng

from cuvis_dist.archive import open_split
from cuvis_dist.errors import CuvisDistError
from cuvis_dist.hashing import hash_settings
from cuvis_dist.initialization.kept import PASSES
from cuvis_dist.plain import NotPlainError, from_bytes, to_bytes
from cuvis_dist.runs.record import RunRecord
from cuvis_dist.scaling import Scaling
from cuvis_dist.storage import Location, OutputFolder

#: The name, in the output folder, of what phase 1 left.
INITIALIZED = "resume/initialized.state"
_STATE = {"nodes", "passes", "skipped_frames", "findings"}


def fingerprint(
    config: TrainRunConfig,
    pipeline: CuvisPipeline,
    datamodule: pl.LightningDataModule,
    scaling: Scaling,
) -> dict[str, str]:
    """Return the SHA-256 of each thing that a result depends on, by name.

    Sets up the data module for all three splits, and reads no frame.
    """
    structure = pipeline.serialize().model_dump(mode="json", include={"nodes", "connections"})
    where = {"output_dir": True, "tags": True, "training": {"default_root_dir": True}}
    parts: dict[str, Any] = {
        "trainrun": config.model_dump(mode="json", exclude=where),
        "pipeline": structure,
        "measuring": scaling.measuring.model_dump(mode="json"),
    }
    with isolate_rng():
        for split in ("train", "val", "test"):
            parts[f"frames of {split}"] = _uids(datamodule, split)
    return {name: hash_settings(part) for name, part in parts.items()}


def _uids(datamodule: pl.LightningDataModule, split: str) -> list[str] | None:
    try:
        return [frame.uid for frame in open_split(datamodule, split)[1]]
    except CuvisDistError:
        return None  # whoever needs the split says so


class Resume:
    """The resume folder of a run: opened, it belongs to the run's fingerprint.

    Parameters
    ----------
    output_dir : path or URI
        The run's output folder.
    parts : dict of str to str
        From :func:`fingerprint`.
    restart : bool
        Forget what an earlier run left, whatever its fingerprint.
    """

    def __init__(self, output_dir: Location, parts: dict[str, str], restart: bool = False) -> None:
        self.output = OutputFolder(output_dir)
        self.parts = parts
        self._same = False
        earlier = self._earlier()
        if earlier is None:
            self.output.remove_folder("resume")
        elif restart:
            logger.info(f"starting anew, as asked: what an earlier run left in {self.folder} goes")
            self.output.remove_folder("resume")
        elif earlier != parts:
            names = sorted(
                name for name in {**parts, **earlier} if parts.get(name) != earlier.get(name)
            )
            # Nothing is lost where a job that is done is followed by another, as init by train.
            lost = earlier.get("job") == parts.get("job") or self._unfinished()
            logger.log(
                "WARNING" if lost else "INFO",
                f"starting anew: an earlier run in {self.output} had another "
                f"{', another '.join(names)}",
            )
            self.output.remove_folder("resume")
        else:
            self._same = True

    @property
    def folder(self) -> Location:
        """Where it lies."""
        return self.output.at("resume")

    def _earlier(self) -> dict[str, str] | None:
        try:
            content = self.output.read("resume/fingerprint.json")
        except OSError:
            return None
        try:
            return json.loads(content)
        except ValueError:
            return None

    def _unfinished(self) -> bool:
        return self.output.names("resume") != ["resume/fingerprint.json"]

    def finished(self) -> RunRecord | None:
        """Return the record of the same run, if it is done and its result is there."""
        if not self._same:
            return None
        try:
            record = RunRecord.load(self.output.location)
        except CuvisDistError:
            raise
        except (OSError, ValueError, TypeError, KeyError):
            return None
        saved = self.output.name_of(record.pipeline)
        there = saved is not None and all(
            self.output.exists(name) for name in (saved, f"{saved.removesuffix('.yaml')}.pt")
        )
        return record if record.status == "done" and there else None

    def begin(self) -> None:
        """Make the folder the run's own, before it leaves anything there."""
        content = json.dumps(self.parts, indent=2) + "\n"
        self.output.write("resume/fingerprint.json", content.encode())

    def load_initialized(self) -> dict[str, Any] | None:
        """Return what :meth:`save_initialized` was given by an earlier run, if it got so far."""
        if not self.output.exists(INITIALIZED):
            return None
        try:
            state = from_bytes(self.output.read(INITIALIZED))
            if not isinstance(state, dict) or state.keys() != _STATE:
                raise NotPlainError("it is not what was written")
            return state
        except NotPlainError as error:
            self.reject_initialized(error)
            return None

    def reject_initialized(self, error: Exception) -> None:
        """Say that what :meth:`load_initialized` returned, or found, is not used."""
        logger.warning(f"phase 1 starts anew: {self.output.at(INITIALIZED)} is not used: {error}")

    def save_initialized(self, **state: Any) -> None:
        """Keep the states of nodes, and what the record says about phase 1, instead of its passes.

        Parameters
        ----------
        **state
            Plain values: ``nodes``, ``passes``, ``skipped_frames`` and ``findings``.
        """
        assert state.keys() == _STATE
        self.output.write(INITIALIZED, to_bytes(state))
        self.output.remove_folder(PASSES)

    def finish(self) -> None:
        """Keep the fingerprint alone: the result is saved."""
        left = self.output.names("resume")
        for entry in {"/".join(name.split("/")[:2]) for name in left}:
            if entry not in left:
                self.output.remove_folder(entry)
            elif entry != "resume/fingerprint.json":
                self.output.remove(entry)
