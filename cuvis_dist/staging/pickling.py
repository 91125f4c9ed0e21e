"""How does an object with paths of this node's cache get to a process with another cache?"""

from __future__ import annotations

import io
import pickle
from pathlib import Path, PurePath
from typing import Any

from ray import cloudpickle

from cuvis_dist.staging.cache import Staging, stagings


def portable(content: Any) -> Any:
    """Return what pickles as ``content`` with the cache of the receiver in all its paths."""
    return _Portable(content, stagings()) if stagings() else content


class _Portable:
    """Content that is pickled with the caches of this process, and unpickled as the content."""

    def __init__(self, content: Any, caches: list[Staging]) -> None:
        self.content, self.caches = content, caches

    def __reduce__(self) -> tuple[Any, ...]:
        stream = io.BytesIO()
        _Pickler(stream, self.caches).dump(self.content)
        return _arrived, (stream.getvalue(), self.caches)


class _Pickler(cloudpickle.Pickler):
    """Writes a path of a cache as the number of the cache and the path in it."""

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
    """Reads the same as paths in the caches of this process."""

    def __init__(self, stream: io.BytesIO, caches: list[Staging]) -> None:
        super().__init__(stream)
        self._caches = caches

    def persistent_load(self, mark: tuple[int, str, bool]) -> str | Path:
        number, inside, as_text = mark
        path = self._caches[number].files / inside
        return str(path) if as_text else path


def _arrived(content: bytes, caches: list[Staging]) -> Any:
    return _Unpickler(io.BytesIO(content), caches).load()
