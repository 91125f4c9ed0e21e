"""Which frames are there, how are they cut into shards, and how is one read?

An :class:`Archive` is made from the ``DataLoader`` of any cuvis.ai data module (or any other
map-style one), so that what a frame contains and how it becomes a batch stays the module's
affair. What is added here is identity (which recording, which frame, which file), so that a
shard can be cut and an error can name its culprit.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from cuvis_ai_schemas.training.data import SampleRef
from torch.utils.data import DataLoader, Dataset, default_collate

from cuvis_dist.errors import CuvisDistError, DataError, InputError, one_line
from cuvis_dist.staging import (
    Staging,
    fetched_when_opened,
    original,
    portable,
    staged_files,
    with_uris,
)


@dataclass(frozen=True)
class Frame:
    """Identity of one frame.

    Attributes
    ----------
    uid : str
        ``SampleRef.uid``, or ``<recording>#<position>`` where the data module has no refs.
    recording : str
        ``SampleRef.source``.
    path : str
        The file that is read; the recording itself unless the module keeps frames elsewhere.
    files : tuple of str
        URIs of what is read, as far as it has to be staged.
    staging : Staging or None
        Where to.
    """

    uid: str
    recording: str
    path: str
    files: tuple[str, ...] = ()
    staging: Staging | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return f"frame {self.uid}" + ("" if self.path == self.recording else f" ({self.path})")

    def held(self) -> AbstractContextManager[None]:
        """Have the frame's files on this node as long as the block lasts."""
        return self.staging.held(self.files) if self.staging else nullcontext()


@dataclass(frozen=True)
class Shard:
    """Frames ``start .. stop - 1`` of an archive, all of one recording.

    ``staged`` is the URI that the first of them is read from, if it has to be staged.
    """

    ordinal: int
    start: int
    stop: int
    staged: str | None = None

    def __len__(self) -> int:
        return self.stop - self.start


class NamedFrames(Dataset):
    """A data module's dataset whose read errors name the frame.

    Also resolves relative paths as the driver did: a worker has a working directory of its own.
    Files at URIs are staged for as long as they are read.
    """

    def __init__(self, dataset: Any, frames: Sequence[Frame]) -> None:
        self.dataset = dataset
        self.frames = frames
        self._directory = os.getcwd()

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Any:
        """Read one frame; raises DataError with its recording and path."""
        if os.path.isdir(self._directory):
            os.chdir(self._directory)
        frame = self.frames[index]
        try:
            with frame.held():
                return self.dataset[index]
        except DataError as error:
            raise DataError(f"cannot read {frame}: {error}") from error
        except CuvisDistError:
            raise
        except Exception as error:
            raise DataError(f"cannot read {frame}: {with_uris(one_line(error))}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Let the paths of staged files mean those of the node where this arrives."""
        staged = any(frame.staging for frame in self.frames)
        return self.__dict__ | ({"dataset": portable(self.dataset)} if staged else {})


class Archive:
    """The frames of one split, in the order that the data module resolved.

    Parameters
    ----------
    loader : DataLoader
        The module's loader of the split. Its dataset and ``collate_fn`` are used; its sampler
        and batch size are not, since a shard is read frame by frame.
    frames : sequence of Frame
        One per item of the dataset.

    Attributes
    ----------
    frames : sequence of Frame
        Identities of the frames, in canonical order.
    """

    def __init__(self, loader: DataLoader, frames: Sequence[Frame]) -> None:
        self.dataset = NamedFrames(loader.dataset, tuple(frames))
        self.collate = loader.collate_fn
        self.frames: Sequence[Frame] = self.dataset.frames
        self._items: Sequence[int] = range(len(frames))

    def __len__(self) -> int:
        return len(self.frames)

    def sampled(self, count: int | None, fraction: float | None, seed: int = 0) -> Archive:
        """Return an archive of some of the frames, those whose uids have the smallest hashes.

        Parameters
        ----------
        count : int or None
            At most so many.
        fraction : float or None
            At most this fraction, rounded up.
        seed : int
            Chooses among samples.
        """
        size = len(self) if fraction is None else math.ceil(fraction * len(self))
        size = size if count is None else min(size, count)
        if size == len(self):
            return self
        drawn = sorted(range(len(self)), key=lambda i: _hash(seed, self.frames[i].uid))[:size]
        return self.only(sorted(drawn))

    def only(self, indices: Sequence[int]) -> Archive:
        """Return an archive of these frames, in this order."""
        some = copy.copy(self)
        some.frames = [self.frames[i] for i in indices]
        some._items = [self._items[i] for i in indices]
        return some

    def read(self, index: int) -> dict[str, Any]:
        """Read one frame as a batch of one, as the module's own loader would collate it."""
        item = self.dataset[self._items[index]]
        try:
            if self.collate is default_collate and isinstance(item, dict):
                return _batch_of_one(item)
            return self.collate([item])
        except Exception as error:
            raise DataError(f"cannot batch {self.frames[index]}: {one_line(error)}") from error

    def shards(self, shard_frames: int) -> list[Shard]:
        """Cut the archive into runs of at most ``shard_frames`` frames of one recording."""
        shards: list[Shard] = []
        start = 0
        for stop in range(1, len(self) + 1):
            full = stop - start == shard_frames
            if stop == len(self) or full or self._recording(stop) != self._recording(start):
                files = self.frames[start].files
                shards.append(Shard(len(shards), start, stop, files[0] if files else None))
                start = stop
        return shards

    def _recording(self, index: int) -> str:
        return self.frames[index].recording


def _hash(seed: int, uid: str) -> bytes:
    return hashlib.blake2b(f"{seed}:{uid}".encode(), digest_size=16).digest()


def _batch_of_one(item: dict[str, Any]) -> dict[str, Any]:
    """Return what ``default_collate([item])`` does, with arrays as views: a cube is large."""
    arrays = {k: v for k, v in item.items() if isinstance(v, np.ndarray | torch.Tensor)}
    others = {k: v for k, v in item.items() if k not in arrays}
    views = {k: torch.as_tensor(v).unsqueeze(0) for k, v in arrays.items()}
    return (default_collate([others]) if others else {}) | views


def batch_bytes(batch: dict[str, Any]) -> int:
    """Return the size of a batch's tensors in bytes."""
    return sum(v.nbytes for v in batch.values() if isinstance(v, torch.Tensor))


def open_archive(datamodule: pl.LightningDataModule, split: str) -> Archive:
    """Return the archive of ``split``; raises as :func:`open_split` does."""
    return Archive(*open_split(datamodule, split))


def open_split(datamodule: pl.LightningDataModule, split: str) -> tuple[DataLoader, list[Frame]]:
    """Set up the data module for a split and list its frames.

    Parameters
    ----------
    split : str
        ``train``, ``val``, ``test`` or ``predict`` (every frame, unless the data module is told
        otherwise).

    Returns
    -------
    tuple of DataLoader and list of Frame
        The module's own loader and the identity of each item of its dataset.

    Raises
    ------
    InputError
        If the module cannot be set up, has no such split, or serves no map-style dataset.
    DataError
        If a remote file that it opens is missing, or cannot be fetched.
    """
    stage = {"train": "fit", "val": "validate"}.get(split, split)
    with _recorded_refs(datamodule) as refs_of:
        try:
            with fetched_when_opened():
                datamodule.setup(stage)
                loader = getattr(datamodule, f"{split}_dataloader")()
        except CuvisDistError:
            raise
        except (Exception, SystemExit) as error:  # importing cuvis can exit
            raise setup_error(datamodule, split, error) from error
    return loader, _frames(require_map_style(loader, split), refs_of)


def require_map_style(loader: Any, split: str) -> DataLoader:
    """Return ``loader`` if frames can be picked from it by index; raises InputError if not."""
    dataset = getattr(loader, "dataset", None)
    if not (
        isinstance(loader, DataLoader)
        and hasattr(dataset, "__getitem__")
        and hasattr(dataset, "__len__")
    ):
        raise InputError(
            f"the {split} loader is a {type(loader).__name__} over a {type(dataset).__name__}; "
            "cuvis_dist needs a torch DataLoader over a map-style dataset (one with __len__ "
            "and __getitem__), so that its frames can be dealt to workers"
        )
    if not len(dataset):  # type: ignore[arg-type]
        raise InputError(f"the {split} split has no frames; check the splits of the trainrun")
    return loader


def setup_error(datamodule: Any, split: str, error: BaseException) -> InputError:
    """Explain why a data module (or the one that a name stands for) could not be set up."""
    name = datamodule if isinstance(datamodule, str) else type(datamodule).__name__
    sources = {} if isinstance(datamodule, str) else _sources(datamodule)
    where = "".join(f", {key} {value}" for key, value in sources.items())
    hint = ""
    if _sdk_missing(error):
        hint = (
            ". Reading .cu3s needs the CUVIS SDK on every machine of the cluster: install it, "
            "set the environment variable CUVIS to its folder, and install cuvis-dist[cu3s]"
        )
    elif "is not built" in str(error):
        hint = f". The {split} split of the trainrun selects no frames"
    message = f"{name}{where} cannot set up the {split} split: {one_line(error)}{hint}"
    return InputError(with_uris(message))


def _sources(datamodule: Any) -> dict[str, str]:
    """Return what a data module was told to read, for messages: paths, folders, CSV files."""
    return {
        key.strip("_"): str(value)
        for key, value in vars(datamodule).items()
        if isinstance(value, str | Path) and key.endswith(("_path", "_dir", "_csv"))
    }


def _sdk_missing(error: BaseException | None) -> bool:
    """Whether the error came from importing ``cuvis`` without its C library."""
    while error is not None:
        if isinstance(error, ImportError) and "cuvis" in str(error):
            return True
        frames = error.__traceback__
        while frames is not None:
            if "cuvis_il" in frames.tb_frame.f_code.co_filename:
                return True
            frames = frames.tb_next
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def _recorded_refs(datamodule: Any) -> Iterator[dict[int, list[SampleRef]]]:
    """Record which refs each dataset is built from, while the module sets itself up.

    Selector-driven modules resolve refs and hand them to ``build_dataset_from_refs``; they do
    not keep them.
    """
    refs_of: dict[int, list[SampleRef]] = {}
    build = getattr(datamodule, "build_dataset_from_refs", None)
    if build is None:
        yield refs_of
        return

    def recording(refs: list[SampleRef]) -> Dataset:
        dataset = build(refs)
        refs_of[id(dataset)] = list(refs)
        return dataset

    datamodule.build_dataset_from_refs = recording
    try:
        yield refs_of
    finally:
        del datamodule.build_dataset_from_refs


def _frames(loader: DataLoader, refs_of: dict[int, list[SampleRef]]) -> list[Frame]:
    """Identify each item of the loader's dataset, as well as its module lets us."""
    dataset: Any = loader.dataset
    base = getattr(dataset, "_base", dataset)  # samples_per_frame repeats a base dataset
    rows = getattr(base, "rows", None)  # npz and module-owned cu3s datasets
    sources = getattr(base, "sample_sources", None)  # cu3s datasets
    refs = refs_of.get(id(base))
    frames = []
    for i in range(len(base)):
        row = rows[i] if rows else {}
        source = str(
            refs[i].source if refs else row.get("source") or (sources[i] if sources else "data")
        )
        path = str(row.get("materialized_path") or (sources[i] if sources else source))
        labels = refs[i].annotation if refs else row.get("annotation")
        uid = refs[i].uid if refs else f"{source}#{row.get('index', i)}"
        recording = original(source)
        uid = recording + uid.removeprefix(source) if recording != source else uid
        staging, files = staged_files(path, labels)
        frames.append(Frame(uid, recording, original(path), files, staging))
    return [frames[i % len(frames)] for i in range(len(dataset))]
