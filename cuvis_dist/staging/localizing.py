"""How do a trainrun's settings with URIs become settings that a data module of upstream's can use?

It opens local paths. So before it is built, every URI in its settings, and in the lists that they
name, becomes the path where this node's cache (:mod:`~cuvis_dist.staging.cache`) will have the
file.
"""

from __future__ import annotations

import csv
import io
import json
from functools import partial
from pathlib import Path
from typing import Any

from cuvis_ai_schemas.training.data import DataConfig, DataSplitConfig
from pyarrow.fs import FileType

from cuvis_dist.errors import InputError, one_line
from cuvis_dist.scaling import Scaling
from cuvis_dist.staging.cache import Staging, staging_here
from cuvis_dist.staging.uris import join, parent
from cuvis_dist.storage import is_uri
from cuvis_dist.universe import read_universe

#: The settings of these data modules may hold URIs; those of others are left as they are.
MODULES = ("npz_multi", "cu3s", "cu3s_multi", "tiff_paired")
_SELECTED = ("paths", "source", "pattern")
_STAGES = ("train", "val", "test", "predict")


def localize(data: DataConfig, scaling: Scaling, base_dir: Path | None = None) -> DataConfig:
    """Return settings with paths of this node's cache in place of URIs.

    Settings without URIs are returned as they are, and so are those of other data modules.

    Parameters
    ----------
    data : DataConfig
        The ``data`` block of a trainrun.
    scaling : Scaling
        Its ``reading.stage_dir`` and ``reading.stage_bytes`` say which cache.
    base_dir : Path, optional
        The folder that a relative ``splits_path`` starts from.

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


def cache_of(scaling: Scaling) -> Staging:
    """Return the cache of this node that the settings name."""
    folder = scaling.reading.stage_dir
    configured = str(folder.expanduser().absolute()) if folder else None
    return staging_here(configured, scaling.reading.stage_bytes)


class _Localizer:
    """Translates one ``data`` block."""

    def __init__(self, data: DataConfig, scaling: Scaling, base_dir: Path) -> None:
        self.data, self.scaling, self.base_dir = data, scaling, base_dir
        self.recursive = str(data.params.get("recursive", False)).lower() in ("1", "true", "yes")

    @property
    def staging(self) -> Staging:
        return cache_of(self.scaling)

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
        except OSError as error:
            raise InputError(f"{place} cannot be read: {one_line(error)}") from error
        read, rows = read_universe(content, place, self.data.data_module)
        locate = partial(self._located, place)
        for row in rows:
            path = (row.get("materialized_path") or "").strip()
            if not path and self.data.data_module == "cu3s_multi":
                path = (row.get("source") or "").strip()
            row["materialized_path"] = locate(path)
            if row.get("annotation"):
                row["annotation"] = locate(row["annotation"].strip())
        columns = dict.fromkeys([*read, "materialized_path"])
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
        """Return selectors whose URIs are paths of the cache.

        With a universe they name its sources, and are returned as they are.
        """
        if self.data.params.get("universe_csv"):
            return value
        if isinstance(value, dict):
            return {k: self._selectors(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [self._selectors(v, key) for v in value]
        if key in _SELECTED and is_uri(value):
            return str(self.staging.path_of(value))
        return value
