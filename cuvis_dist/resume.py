"""What of an earlier run in this output folder can be used again?

``<output_dir>/resume`` belongs to one fingerprint: the trainrun, its pipeline, its frames, and
the settings of :class:`~cuvis_dist.scaling.Scaling` that change bits. It holds the passes of
phase 1 as far as they got (:mod:`cuvis_dist.initialization.stored`), the nodes as phase 1 left
them and, from :mod:`cuvis_dist.training.checkpoint`, the last finished epoch of phase 2. Another
fingerprint starts anew. How many workers there are is no part of it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.config import TrainRunConfig
from loguru import logger
from pytorch_lightning.utilities.seed import isolate_rng
from ray import cloudpickle

from cuvis_dist.archive import open_split
from cuvis_dist.errors import CuvisDistError, one_line
from cuvis_dist.initialization.stored import passes_folder
from cuvis_dist.record import RunRecord
from cuvis_dist.scaling import MEASURING_SETTINGS, Scaling
from cuvis_dist.storage import write_atomically


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
    parts: dict[str, Any] = {
        "trainrun": config.model_dump(mode="json", exclude={"output_dir", "tags"}),
        "pipeline": structure,
        "scaling": scaling.model_dump(mode="json", include=set(MEASURING_SETTINGS)),
    }
    with isolate_rng():
        for split in ("train", "val", "test"):
            parts[f"frames of {split}"] = _uids(datamodule, split)
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()
        for name, part in parts.items()
    }


def _uids(datamodule: pl.LightningDataModule, split: str) -> list[str] | None:
    try:
        return [frame.uid for frame in open_split(datamodule, split)[1]]
    except CuvisDistError:
        return None  # whoever needs the split says so


class Resume:
    """The resume folder of a run: opened, it belongs to the run's fingerprint.

    Parameters
    ----------
    output_dir : Path
        The run's output folder.
    parts : dict of str to str
        From :func:`fingerprint`.
    restart : bool
        Forget what an earlier run left, whatever its fingerprint.
    """

    def __init__(self, output_dir: Path, parts: dict[str, str], restart: bool = False) -> None:
        self.output_dir = output_dir
        self.folder = output_dir / "resume"
        self.parts = parts
        self._same = False
        earlier = self._earlier()
        if earlier is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif restart:
            logger.info(f"starting anew, as asked: what an earlier run left in {self.folder} goes")
            shutil.rmtree(self.folder)
        elif earlier != parts:
            names = sorted(
                name for name in {**parts, **earlier} if parts.get(name) != earlier.get(name)
            )
            logger.warning(
                f"starting anew: an earlier run in {output_dir} had another "
                f"{', another '.join(names)}"
            )
            shutil.rmtree(self.folder)
        else:
            self._same = True

    def _earlier(self) -> dict[str, str] | None:
        try:
            return json.loads((self.folder / "fingerprint.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def finished(self) -> RunRecord | None:
        """Return the record of the same run, if it is done and its result is there."""
        if not self._same:
            return None
        try:
            record = RunRecord.load(self.output_dir)
        except (OSError, ValueError, TypeError, KeyError):
            return None
        saved = Path(record.pipeline)
        there = saved.is_file() and saved.with_suffix(".pt").is_file()
        return record if record.status == "done" and there else None

    def begin(self) -> None:
        """Make the folder the run's own, before it leaves anything there."""
        content = json.dumps(self.parts, indent=2) + "\n"
        write_atomically(self.folder / "fingerprint.json", content.encode())

    def load_initialized(self) -> dict[str, Any] | None:
        """Return what :meth:`save_initialized` was given by an earlier run, if it got so far."""
        path = self.folder / "initialized.pkl"
        if not path.is_file():
            return None
        try:
            return cloudpickle.loads(path.read_bytes())
        except Exception as error:  # a class that has moved since
            logger.warning(f"phase 1 starts anew: {path} cannot be used: {one_line(error)}")
            return None

    def save_initialized(self, **state: Any) -> None:
        """Keep the fitted nodes, and what the record says about phase 1, instead of its passes."""
        write_atomically(self.folder / "initialized.pkl", cloudpickle.dumps(state))
        shutil.rmtree(passes_folder(self.output_dir), ignore_errors=True)

    def finish(self) -> None:
        """Keep the fingerprint alone: the result is saved."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "fingerprint.json":
                path.unlink()
