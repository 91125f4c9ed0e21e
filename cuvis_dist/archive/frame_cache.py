"""Which decoded frames does a node keep for later passes and epochs, and where?

One folder of a node, which all of its processes share that work for one driver: in memory
(``/dev/shm``) or on a disk. It is removed when the driver ends; where the driver was killed, the
next one on that node removes what nobody uses. How a frame comes from one node to another is the
affair of :mod:`cuvis_dist.execution.borrowing`.
"""

from __future__ import annotations

import functools
import hashlib
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from cuvis_dist.archive.frame_file import PackedFrame, read_frame, unpacked
from cuvis_dist.archive.shelf import MEMORY, Shelf, remove
from cuvis_dist.errors import one_line
from cuvis_dist.storage import is_uri


class Others(Protocol):
    """How a process reaches what other nodes keep."""

    def tell(self, names: list[str], folder: Path) -> None:
        """Say that this node keeps frames, in files of these names in a folder."""

    def get(self, name: str) -> memoryview | None:
        """Return the bytes of a frame's file that another node keeps, or None."""


@dataclass
class Common:
    """What the caches of a data module's splits share.

    Attributes
    ----------
    nodes : dict
        In the driver: which node has computed the shard that begins where; see
        :meth:`FrameCache.note`.
    others : Others or None
        How other nodes are reached, where there are several.
    """

    nodes: dict[tuple[str, str, int], tuple[str, int]] = field(default_factory=dict)
    others: Others | None = None


class FrameCache:
    """Frames of one split that were decoded on this node, up to so many bytes.

    What is in stays in: every pass and epoch reads each frame once, so that a cache that made room
    for the frames read last would drop each one just before it is asked for again. On another node,
    it refers to that node's frames.

    Parameters
    ----------
    kind : str
        ``memory`` or ``disk``.
    limit : int
        Bytes that a node keeps at most, of all splits together.
    name : str
        What the frames of one data module share, and those of no other.
    split : str
        The split that the data module opened.
    common : Common, optional
        What it shares with the caches of other splits.
    """

    def __init__(
        self, kind: str, limit: int, name: str, split: str = "", common: Common | None = None
    ) -> None:
        self.kind, self.limit, self.name, self.split = kind, limit, name, split
        self.common = common or Common()

    def __reduce__(self) -> tuple[Any, ...]:
        common = Common(others=self.common.others)
        return FrameCache, (self.kind, self.limit, self.name, self.split, common)

    def of(self, split: str) -> FrameCache:
        """Return the cache for the frames of a split."""
        return FrameCache(self.kind, self.limit, self.name, split, self.common)

    def note(self, kind: str, numbers: range, node: str) -> None:
        """Remember the node that has read some frames, or batches of them.

        Parameters
        ----------
        kind : str
            What is numbered, by the name of a kind of shards.
        numbers : range
            Which of the split.
        node : str
            The id of the node.
        """
        self.common.nodes[self.split, kind, numbers.start] = node, numbers.stop

    def node(self, kind: str, start: int) -> str | None:
        """Return the node that has read what begins there, as far as it was noted."""
        node, _ = self.common.nodes.get((self.split, kind, start), (None, 0))
        return node

    def decoded(self) -> dict[int, str]:
        """Return the node that has read each frame of the split in shards."""
        return {
            frame: node
            for (split, kind, start), (node, stop) in self.common.nodes.items()
            if (split, kind) == (self.split, "Shard")
            for frame in range(start, stop)
        }

    @property
    def folder(self) -> Path:
        """Where this node keeps the frames of all splits; it need not be there."""
        in_memory = self.kind == "memory" and MEMORY.is_dir()
        place = MEMORY if in_memory else Path(tempfile.gettempdir())
        return place / f"cuvis-dist-{os.getuid()}-frames" / self.name

    def get(self, frame: Any, index: int) -> Any:
        """Return a frame's item, or None if it is not kept as its files are now.

        Parameters
        ----------
        frame : Frame
            Its identity.
        index : int
            Its place in the dataset of the split.
        """
        if not _shelf(self.folder, self.limit).ours:
            return None
        try:
            return read_frame(self.folder / self._file(frame, index))
        except OSError:
            return None

    def put(self, frame: Any, index: int, item: Any) -> None:
        """Keep a frame's item, as :meth:`get` will ask for it, if there is room for it.

        Who is killed meanwhile leaves nothing of it: the next one that keeps a frame sees to that.
        """
        shelf, name = _shelf(self.folder, self.limit), self._file(frame, index)
        if shelf.full or (self.folder / name).exists():
            return
        try:
            packed = PackedFrame(item)
        except Exception as error:  # what a dataset of somebody's own gives cannot be pickled
            shelf.close(f"{frame} cannot be kept: {one_line(error)}")
            return
        self._keep(name, packed.size, packed.write)

    def fetch(self, frame: Any, index: int) -> Any:
        """Return a frame's item from another node, or None if none keeps it and answers in time.

        This node keeps it from then on, if there is room for it.
        """
        if self.common.others is None:
            return None
        name = self._file(frame, index)
        content = self.common.others.get(name)
        if content is None:
            return None
        try:
            item = unpacked(memoryview(bytearray(content)))
        except Exception:  # it was damaged there: nobody depends on it
            return None
        self._keep(name, content.nbytes, lambda file: file.write(content))
        return item

    def _keep(self, name: str, size: int, write: Callable[[BinaryIO], object]) -> None:
        """Keep a file if there is room for it, and let other nodes know."""
        shelf = _shelf(self.folder, self.limit)
        part = None if shelf.full else shelf.begin(name, size)
        if part is None:
            return
        try:
            write(part)
            shelf.finish(part)
        except OSError as error:  # a full disk
            shelf.drop(part)
            shelf.close(f"no more frames are kept in {self.folder}: {one_line(error)}")
            return
        if self.common.others is not None:
            self.common.others.tell([name], self.folder)

    def held(self) -> int:
        """Return how many bytes this node keeps."""
        return _shelf(self.folder, self.limit).held()

    def clear(self) -> None:
        """Remove what this node keeps; who is about to read it, reads the frame itself."""
        remove(self.folder)
        _shelf.cache_clear()

    def _file(self, frame: Any, index: int) -> str:
        """Return a name that changes where a frame's files do."""
        local = [name for name in frame.reads if not is_uri(name)]
        stamps = [(name, _stamp(name)) for name in local]
        identity = self.name, self.split, index, frame.uid, stamps
        return f"{hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()}.frame"


@functools.lru_cache(maxsize=8)
def _shelf(folder: Path, limit: int) -> Shelf:
    return Shelf(folder, limit)


#: By the id of a data module, which need not be hashable, and the kind of the cache.
_caches: dict[int, dict[str, FrameCache]] = {}


def frame_cache(datamodule: Any, kind: str, limit: int) -> FrameCache | None:
    """Return where the frames of a data module are kept: the same for all that read it.

    They are removed from this node when nobody has the module any more.

    Parameters
    ----------
    datamodule : LightningDataModule
        The object as the driver has it. A module of which parameters are changed once frames of
        it are kept would be given those of before; make a new one.
    kind : str
        ``none``, ``memory`` or ``disk``; what stays on devices, too, has ``+device`` behind it, and
        with ``device`` alone no node keeps any.
    limit : int
        Bytes that a node keeps at most.
    """
    kind = kind.removesuffix("+device")
    if kind in ("none", "device"):
        return None
    if id(datamodule) not in _caches:
        _caches[id(datamodule)] = {}
        weakref.finalize(datamodule, _forget, id(datamodule))
    known = _caches[id(datamodule)]
    if kind not in known:
        known[kind] = FrameCache(kind, limit, f"{os.getpid()}-{uuid.uuid4().hex}")
    known[kind].limit = limit  # a later fit may set another one
    return known[kind]


def _forget(module: int) -> None:
    clear_caches(list(_caches.pop(module).values()))


def caches_in_use() -> list[FrameCache]:
    """Return the caches that this driver has."""
    return [cache for known in _caches.values() for cache in known.values()]


def clear_caches(caches: list[FrameCache]) -> None:
    """Remove from this node what it keeps for some caches."""
    for cache in caches:
        cache.clear()


def _stamp(path: str) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return found.st_size, found.st_mtime_ns
