"""How does a data module become an archive, and what is wrong if it cannot be set up?

Any cuvis.ai data module works whose loaders are torch ``DataLoader``s over map-style datasets.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from cuvis_ai_schemas.training.data import SampleRef
from torch.utils.data import DataLoader, Dataset

from cuvis_dist.archive.frame_cache import FrameCache
from cuvis_dist.archive.frames import Archive, Frame
from cuvis_dist.errors import CuvisDistError, InputError, one_line
from cuvis_dist.nodes import upstream
from cuvis_dist.staging import fetched_when_opened, original, staged_files, with_uris
from cuvis_dist.storage import is_uri


def open_archive(
    datamodule: pl.LightningDataModule, split: str, cache: FrameCache | None = None
) -> Archive:
    """Return the archive of ``split``; raises as :func:`open_split` does.

    ``cache`` keeps the frames that are read, of all splits of the data module.
    """
    return Archive(*open_split(datamodule, split), cache.of(split) if cache else None)


def open_split(datamodule: pl.LightningDataModule, split: str) -> tuple[DataLoader, list[Frame]]:
    """Set up the data module for a split and list its frames.

    Parameters
    ----------
    datamodule : LightningDataModule
        The module; it is set up for the stage that the split belongs to.
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
    upstream.select_by_recording()
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
    """Return ``loader`` if frames can be picked from it by index.

    Raises
    ------
    InputError
        If they cannot, or there is none; ``split`` is named.
    """
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
    """Return an error that says why a data module could not be set up, and what to do.

    Parameters
    ----------
    datamodule : LightningDataModule or str
        The module, or its name where it could not be made.
    split : str
        The split that was asked for.
    error : BaseException
        What was raised.
    """
    name = datamodule if isinstance(datamodule, str) else type(datamodule).__name__
    sources = {} if isinstance(datamodule, str) else _sources(datamodule)
    where = "".join(f", {key} {value}" for key, value in sources.items())
    hint = ""
    if _sdk_missing(error):
        hint = (
            ". Reading .cu3s needs the CUVIS SDK on every machine of the cluster: install it, "
            "set the environment variable CUVIS to its folder, and install cuvis-dist[cu3s]"
        )
    why = one_line(error).removesuffix(".") + hint
    if "is not built" in str(error):  # upstream's advice is for its own developers
        why = "it selects no frames (data.splits of a trainrun says which)"
    return InputError(with_uris(f"{name}{where} cannot set up the {split} split: {why}"))


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
    not keep them. The block is given a dictionary that fills while the module works: refs by the
    ``id`` of their dataset.
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


def _name(path: Any) -> str:
    """Return the URI that a path stands for, or the path from this process's directory."""
    name = original(str(path))
    return name if is_uri(name) else os.path.abspath(name)


def _frames(loader: DataLoader, refs_of: dict[int, list[SampleRef]]) -> list[Frame]:
    """Return the identity of each item of the loader's dataset, as well as its module lets us."""
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
        named = dict.fromkeys(_name(name) for name in (path, labels) if name)
        frames.append(Frame(uid, recording, original(path), files, staging, tuple(named)))
    return [frames[i % len(frames)] for i in range(len(dataset))]
