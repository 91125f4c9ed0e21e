"""What of an earlier run in this output folder can be used again?

``<output_dir>/resume`` belongs to one fingerprint: the trainrun, its pipeline, its frames, and
the settings of :class:`~cuvis_dist.scaling.Scaling` that change bits. It holds the nodes as
phase 1 left them and, from :mod:`cuvis_dist.training.checkpoint`, the last finished epoch of
phase 2. Another fingerprint starts anew. How many workers there are is no part of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from cuvis_ai_core.pipeline.pipeline import CuvisPipeline
from cuvis_ai_core.training.config import TrainRunConfig
from loguru import logger
from pytorch_lightning.utilities.seed import isolate_rng
from ray import cloudpickle

from cuvis_dist.archive import open_split
from cuvis_dist.errors import CuvisDistError, InputError, one_line
from cuvis_dist.record import RunRecord
from cuvis_dist.scaling import Scaling
from cuvis_dist.storage import write_atomically

#: Settings of ``Scaling`` that change bits, or which frames are used.
_BIT_SETTINGS = (
    "shard_frames",
    "fold",
    "pixels",
    "sample_frames",
    "sample_fraction",
    "sample_seed",
    "worker_gpus",
    "on_error",
    "max_skipped",
)


#: File in a run's folder that the run's process holds.
LOCK = ".lock"


@contextmanager
def only_run(output_dir: Path) -> Iterator[None]:
    """Keep a second run out of ``output_dir`` for as long as the block lasts.

    The lock is the process's: it is gone when that dies, however it does.

    Raises
    ------
    InputError
        If another run has the folder, with its process and host.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    with open(output_dir / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise InputError(
                f"another run is writing to {output_dir} ({file.read().strip()}): wait until it "
                "has ended, stop it, or give this one another --output-dir"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


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
        "scaling": scaling.model_dump(mode="json", include=set(_BIT_SETTINGS)),
    }
    with isolate_rng():
        for split in ("train", "val", "test"):
            parts[f"frames of {split}"] = _uids(datamodule, split)
    return {
        name: hashlib.sha256(json.dumps(part, sort_keys=True, default=str).encode()).hexdigest()
        for name, part in parts.items()
    }


def sha256(*paths: Path) -> str:
    """Return the SHA-256 of the bytes of some files."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


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
            # Nothing is lost where a job that is done is followed by another, as init by train.
            lost = earlier.get("job") == parts.get("job") or self._unfinished()
            logger.log(
                "WARNING" if lost else "INFO",
                f"starting anew: an earlier run in {output_dir} had another "
                f"{', another '.join(names)}",
            )
            shutil.rmtree(self.folder)
        else:
            self._same = True

    def _earlier(self) -> dict[str, str] | None:
        try:
            return json.loads((self.folder / "fingerprint.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def _unfinished(self) -> bool:
        return any(path.name != "fingerprint.json" for path in self.folder.iterdir())

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
        """Keep the fitted nodes, and what the record says about phase 1."""
        write_atomically(self.folder / "initialized.pkl", cloudpickle.dumps(state))

    def finish(self) -> None:
        """Keep the fingerprint alone: the result is saved."""
        for path in self.folder.iterdir():
            if path.name != "fingerprint.json":
                path.unlink()
