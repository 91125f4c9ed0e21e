"""How does a data module of upstream's work on files at URIs?

It opens local paths. So before it is built, every URI in its settings, and in the lists that they
name, becomes the path where this node's cache (:mod:`~cuvis_dist.staging.cache`) will have the
file. While the module is set up, what it opens is fetched; later a frame's files are held while
it is read. In another process, whose cache may lie elsewhere, the same paths mean that one.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any

from cuvis_ai_schemas.training.data import DataConfig, DataSplitConfig
from loguru import logger
from pyarrow.fs import FileType
from ray import cloudpickle

from cuvis_dist.errors import InputError, one_line
from cuvis_dist.nodes import upstream
from cuvis_dist.scaling import Scaling
from cuvis_dist.staging.cache import Staging, staging_here, stagings
from cuvis_dist.staging.uris import join, parent
from cuvis_dist.storage import is_uri

#: Data modules whose settings may hold URIs; those of others are left as they are.
MODULES = ("npz_multi", "cu3s", "cu3s_multi", "tiff_paired")
_SELECTED = ("paths", "source", "pattern")
_STAGES = ("train", "val", "test", "predict")


def localize(data: DataConfig, scaling: Scaling, base_dir: Path | None = None) -> DataConfig:
    """Return settings with paths of this node's cache in place of URIs; the same without URIs.

    Parameters
    ----------
    data : DataConfig
        The ``data`` block of a trainrun.
    scaling : Scaling
        ``stage_dir`` and ``stage_bytes``.
    base_dir : Path, optional
        What a relative ``splits_path`` is relative to.

    Raises
    ------
    InputError
        If a URI or list cannot be used: nothing there, ``..`` in a key, no such file system.
    DataError
        If its store does not answer.
    """
    if data.data_module not in MODULES:
        return data
    return _Localizer(data, scaling, base_dir or Path()).localized()


class _Localizer:
    """Translates one ``data`` block."""

    def __init__(self, data: DataConfig, scaling: Scaling, base_dir: Path) -> None:
        self.data, self.scaling, self.base_dir = data, scaling, base_dir
        self.recursive = str(data.params.get("recursive", False)).lower() in ("1", "true", "yes")

    @property
    def staging(self) -> Staging:
        folder = self.scaling.reading.stage_dir
        configured = str(folder.expanduser().absolute()) if folder else None
        return staging_here(configured, self.scaling.reading.stage_bytes)

    def localized(self) -> DataConfig:
        params = {key: self._param(key, value) for key, value in self.data.params.items()}
        splits = self._splits(self.data.splits)
        return self.data.model_copy(update={"params": params, "splits": splits})

    def _param(self, key: str, value: Any) -> Any:
        if key == "universe_csv":
            return self._universe(str(value)) if value else value
        if isinstance(value, str) and key == "files":
            value = [part.strip() for part in value.split(",")] if "://" in value else value
        if isinstance(value, list):
            return [self._param("", item) for item in value]
        return str(self._shown(value)) if is_uri(value) else value

    def _shown(self, uri: str) -> Path:
        """Let the file or folder at a URI show in the cache, and a recording's labels with it."""
        found = self.staging.look(uri).type
        if found == FileType.Directory:
            return self.staging.place_folder(uri, self.recursive)
        if found != FileType.File:
            raise InputError(f"{uri} does not exist")
        recording, mark, query = uri.partition("?")
        if recording.endswith(".cu3s"):
            labels = f"{recording.removesuffix('.cu3s')}.json{mark}{query}"
            there = self.staging.look(labels).type == FileType.File
            (self.staging.place if there else self.staging.forget)(labels)
        return self.staging.place(uri)

    def _universe(self, place: str) -> str:
        """Return a universe in which paths stand for URIs, and relative paths for their place."""
        if not is_uri(place) and not Path(place).is_file():
            return place  # upstream says so
        try:
            content = self.staging.read(place) if is_uri(place) else Path(place).read_bytes()
            if not is_uri(place) and b"://" not in content:
                return place
            reader = csv.DictReader(io.StringIO(content.decode("utf-8")))
            rows = list(reader)
        except (OSError, ValueError, csv.Error) as error:
            raise InputError(f"{place} cannot be read: {one_line(error)}") from error
        locate = partial(self._located, place)
        for row in rows:
            path = (row.get("materialized_path") or "").strip()
            if not path and self.data.data_module == "cu3s_multi":
                path = (row.get("source") or "").strip()
            row["materialized_path"] = locate(path)
            if row.get("annotation"):
                row["annotation"] = locate(row["annotation"].strip())
        columns = dict.fromkeys([*(reader.fieldnames or ()), "materialized_path"])
        lines = io.StringIO()
        writer = csv.DictWriter(lines, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        uri = place if is_uri(place) else Path(place).resolve().as_uri()
        return str(self.staging.rewrite(uri, lines.getvalue().encode()))

    def _located(self, universe: str, path: str) -> str:
        if is_uri(path):
            return str(self.staging.path_of(path))
        if not path or Path(path).is_absolute():
            return path
        if is_uri(universe):
            return str(self.staging.path_of(join(parent(universe), path)))
        return str(Path(universe).resolve().parent / path)

    def _splits(self, splits: DataSplitConfig | None) -> DataSplitConfig | None:
        if splits is None:
            return None
        values = splits.model_dump(mode="json")
        path = splits.splits_path
        local = self.base_dir / (path or "")
        if path and (is_uri(path) or local.is_file()):
            try:
                content = self.staging.read(path) if is_uri(path) else local.read_bytes()
                if is_uri(path) or b"://" in content:  # no other node could read another file
                    listed = json.loads(content)
                    stages = {stage: values[stage] for stage in _STAGES if values[stage]}
                    values = listed | stages | {"splits_path": None}
            except (OSError, ValueError, TypeError) as error:
                raise InputError(f"{path} cannot be read: {one_line(error)}") from error
        try:
            return DataSplitConfig.model_validate(self._selectors(values))
        except ValueError as error:
            raise InputError(f"the splits {path or ''} are not valid: {one_line(error)}") from error

    def _selectors(self, value: Any, key: str = "") -> Any:
        """Return selectors that name paths; with a universe they name its sources, as they are."""
        if self.data.params.get("universe_csv"):
            return value
        if isinstance(value, dict):
            return {k: self._selectors(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [self._selectors(v, key) for v in value]
        if key in _SELECTED and is_uri(value):
            return str(self.staging.path_of(value))
        return value


# ---- while a module is set up ------------------------------------------------------------


class _Opened(threading.local):
    """What this thread fetches when it is opened, and holds until the block ends."""

    fetch: Callable[[str], None] | None = None


_opened = _Opened()


@contextmanager
def fetched_when_opened() -> Iterator[None]:
    """Fetch each file of a cache that this thread opens in the block; does nothing without one.

    Setting a module up opens files that only the module knows: the first ``.npz`` of a split
    for its wavelengths, labels for a selector by category, a recording to count its frames.
    """
    if not stagings() or _opened.fetch:
        yield
        return
    _listen()
    with ExitStack() as held:

        def fetch(path: str) -> None:
            for staging, uri in _staged(path):
                _opened.fetch = None  # fetching opens files, too
                try:
                    held.enter_context(staging.held([uri]))
                finally:
                    _opened.fetch = fetch

        _opened.fetch = fetch
        try:
            with upstream.counting_measurements(_count):
                yield
        finally:
            _opened.fetch = None


@cache
def _listen() -> None:
    """Hear of every file that Python opens in this process, before it does."""

    def hear(event: str, arguments: tuple) -> None:
        if event == "open" and _opened.fetch and isinstance(arguments[0], str):
            _opened.fetch(arguments[0])

    sys.addaudithook(hear)


def _count(path: str, needed: bool, count: Callable[[str], Any]) -> Any:
    """Count a recording's measurements; one at a URI is only fetched for it if needed."""
    for staging, uri in _staged(path):
        if not needed:  # a list has them; what is wrong there comes out when the frame is read
            return sys.maxsize
        logger.info(f"{uri} is fetched to count its frames; a universe for cu3s_multi lists them")
        with staging.held([uri]):
            return count(path)
    return count(path)


def _staged(path: str | PurePath) -> list[tuple[Staging, str]]:
    """Return the cache that a path belongs to, and the file's URI; nothing for other paths."""
    text = str(path)
    for staging in stagings():
        if text.startswith(f"{staging.files}/") and (uri := staging.uri_of(text)):
            return [(staging, uri)]
    return []


def original(path: str) -> str:
    """Return the URI that a path of a cache stands for, else the path."""
    return next((uri for _, uri in _staged(path)), path)


def with_uris(message: str) -> str:
    """Return a message that names files by their URIs."""
    for staging in stagings():
        message = staging.uris_in(message)
    return message


def staged_files(*paths: str | None) -> tuple[Staging | None, tuple[str, ...]]:
    """Return the cache of those paths that belong to one, and their URIs."""
    found = [pair for path in paths if path for pair in _staged(path)]
    return (found[0][0] if found else None), tuple(dict.fromkeys(uri for _, uri in found))


# ---- between processes -------------------------------------------------------------------


def portable(content: Any) -> Any:
    """Return what pickles as ``content`` with the cache of the receiver in all its paths."""
    return _Portable(content, stagings()) if stagings() else content


class _Portable:
    def __init__(self, content: Any, caches: list[Staging]) -> None:
        self.content, self.caches = content, caches

    def __reduce__(self) -> tuple[Any, ...]:
        stream = io.BytesIO()
        _Pickler(stream, self.caches).dump(self.content)
        return _arrived, (stream.getvalue(), self.caches)


class _Pickler(cloudpickle.Pickler):
    """Writes paths of a cache as the number of the cache and the path in it."""

    def __init__(self, stream: io.BytesIO, caches: list[Staging]) -> None:
        super().__init__(stream)
        self._folders = [f"{staging.files}/" for staging in caches]

    def persistent_id(self, value: Any) -> tuple[int, str, bool] | None:
        if isinstance(value, str | PurePath):
            text = str(value)
            for number, folder in enumerate(self._folders):
                if text.startswith(folder):
                    return number, text.removeprefix(folder), isinstance(value, str)
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, caches: list[Staging]) -> None:
        super().__init__(stream)
        self._caches = caches

    def persistent_load(self, mark: tuple[int, str, bool]) -> str | Path:
        number, inside, as_text = mark
        path = self._caches[number].files / inside
        return str(path) if as_text else path


def _arrived(content: bytes, caches: list[Staging]) -> Any:
    return _Unpickler(io.BytesIO(content), caches).load()
